"""The demo model as the engine process runs it: each greedy answer is the one given alone.

Whatever the portions of the prompt, the neighbours, what the caches hold, and who has to go back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

import pytest
import torch

from server.attention.backend import choose_backend
from server.chat.tokenizer import Tokenizer
from server.core import GenerationRequest, TokenEvent, VisionInput, VisionLayout
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, StepBudget
from server.hub import find_checkpoint
from server.kernels.machine import product_units
from server.model.checkpoint import load_model, pack_for_cpu
from server.model.config import CheckpointInfo, read_checkpoint
from server.model.vlm import VisionLanguageModel
from tests.engine.samples import make_request, make_tiles

QUESTIONS = (
    "How many circles are there?",
    "원은 모두 몇 개인가요?",
    "What colour is the square on the left, and what is written below it?",
    "Describe the picture.",
    "오른쪽에 있는 도형의 색을 말해 주세요.",
    "안녕하세요",
    "Which shape is the largest?",
    "Count from one to ten.",
)
LATER = " There are two circles: a red circle on the left and a blue circle on the right." * 2
BY_PAIRS = pytest.mark.skipif(
    not product_units(torch.bfloat16), reason="this CPU has no units for pairs of bfloat16"
)


@dataclass(frozen=True, slots=True)
class Demo:
    """The model in one precision, and the answers it gives to each of `requests` alone."""

    info: CheckpointInfo
    model: VisionLanguageModel
    dtype: str
    requests: list[GenerationRequest]
    alone: dict[str, list[int | None]]


@dataclass(frozen=True, slots=True)
class Run:
    scheduler: Scheduler
    events: list[TokenEvent]
    batch_sizes: set[int]

    @property
    def answers(self) -> dict[str, list[int | None]]:
        answers: dict[str, list[int | None]] = {}
        for event in self.events:
            answers.setdefault(event.request_id, []).append(event.token_id)
        return answers


def run(
    demo: Demo,
    requests: AbstractSequence[GenerationRequest],
    *,
    chunk: int = 10_000,
    max_running: int = 1,
    num_blocks: int = 200,
) -> Run:
    """All of them, from caches that are cold."""
    text, dtype = demo.info.text, getattr(torch, demo.dtype)
    backend = choose_backend(device="cpu", dtype=dtype, head_dim=text.head_dim)
    caches = backend.allocate(
        text.num_layers,
        num_blocks,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        dtype=dtype,
        device="cpu",
    )
    vision = demo.info.vision
    assert vision is not None and vision.video_token_id is not None
    runner = Runner(
        demo.model,
        caches,
        block_size=backend.page_size,
        device="cpu",
        placeholder_ids=frozenset({vision.image_token_id, vision.video_token_id}),
    )
    scheduler = Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=backend.page_size),
        EncoderCache(max_bytes=1 << 20, bytes_per_token=1),
        budget=StepBudget(chunk, 1, chunk),
        max_running=max_running,
    )
    for request in requests:
        tiles = make_tiles(request, side=vision.tile_size)
        scheduler.add(Sequence.from_request(request, tiles))
    result = Run(scheduler, [], set())
    while batch := scheduler.schedule():
        result.events.extend(scheduler.commit(batch, runner.run(batch)))
        result.batch_sizes.add(len(batch.spans))
    scheduler.check()
    return result


def asked_alone(demo: Demo) -> Demo:
    answers = [run(demo, [each]).answers for each in demo.requests]
    return replace(demo, alone={name: ids for each in answers for name, ids in each.items()})


def make_requests(info: CheckpointInfo) -> list[GenerationRequest]:
    """32 that begin differently; some are longer than a page, some have one of two pictures."""
    assert info.vision is not None
    tokenizer = Tokenizer.from_folder(info.path)
    layout = VisionLayout((info.vision.image_queries,))
    requests = []
    for number in range(32):
        question = QUESTIONS[number % len(QUESTIONS)] + LATER * (number % 5 == 4)
        text = f"{number}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt: list[int | VisionInput] = [*tokenizer.encode_prompt(text)]
        if number % 4 == 1:
            prompt.insert(3, VisionInput("image", layout, "ab"[number % 8 // 4] * 64))
        max_tokens = 12 + number % 3
        requests.append(
            make_request(str(number), prompt=prompt, max_tokens=max_tokens, spec=info.vision)
        )
    return requests


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=BY_PAIRS)])
def demo(request: pytest.FixtureRequest) -> Demo:
    dtype = request.param
    info = read_checkpoint(find_checkpoint(None, revision=None, show_progress=False).folder)
    backend = choose_backend(device="cpu", dtype=getattr(torch, dtype), head_dim=info.text.head_dim)
    model = load_model(
        info, device="cpu", dtype=dtype, backend=backend, progress=lambda done, total: None
    )
    pack_for_cpu(model, info)
    demo = asked_alone(Demo(info, model, dtype, make_requests(info), {}))
    assert len({tuple(answer) for answer in demo.alone.values()}) > 16  # worth comparing
    return demo


@pytest.fixture(scope="module")
def demo_at_length(demo: Demo) -> Demo:
    """Eight of them, each answer longer than a page."""
    requests = [
        replace(each, sampling=replace(each.sampling, max_tokens=100)) for each in demo.requests[:8]
    ]
    return asked_alone(replace(demo, requests=requests))


@pytest.mark.parametrize("max_running", [2, 7, 32])
@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_portions_and_neighbours_never_change_an_answer(
    demo: Demo, chunk: int, max_running: int
) -> None:
    together = run(demo, demo.requests, chunk=chunk, max_running=max_running)
    # In small portions the first have their answers before the last have begun.
    assert max(together.batch_sizes) == max_running or chunk < 10_000
    assert together.answers == demo.alone


@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_the_portions_of_a_prompt_never_change_an_answer(demo: Demo, chunk: int) -> None:
    for each in demo.requests[:8]:
        assert (
            run(demo, [each], chunk=chunk).answers[each.request_id] == (demo.alone[each.request_id])
        )


@pytest.mark.parametrize("max_running", [1, 7, 32])
def test_warm_caches_never_change_an_answer(demo: Demo, max_running: int) -> None:
    again = [replace(each, request_id=f"again {each.request_id}") for each in demo.requests]
    both = run(demo, [*demo.requests, *again], max_running=max_running)
    num_cached = Counter[str]()
    for event in both.events:
        num_cached[event.request_id] += event.num_cached_tokens
    assert sum(num_cached[each.request_id] > 0 for each in again) > 4
    assert both.scheduler.encoder_cache.num_hits > 0
    for each in demo.requests:
        answer = demo.alone[each.request_id]
        assert both.answers[each.request_id] == both.answers[f"again {each.request_id}"] == answer


@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_who_has_to_go_back_gives_the_same_answer(demo_at_length: Demo, chunk: int) -> None:
    requests = demo_at_length.requests
    crowded = run(demo_at_length, requests, chunk=chunk, max_running=8, num_blocks=5)
    assert crowded.scheduler.counts.num_preemptions > 0
    assert crowded.answers == demo_at_length.alone
