"""The runner over a random model: whatever the batches, the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.attention.backend import choose_backend
from server.core import GenerationRequest, VisionInput, VisionLayout
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.runner import Runner, choose_cache_bytes
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Sequence, Span, StepBudget
from server.model.checkpoint import load_model
from server.model.config import CheckpointInfo
from server.model.vlm import VisionLanguageModel
from tests.engine.samples import make_request, make_tiles

BLOCK_SIZE = 4
SIDE = 56

PICTURE = VisionInput(
    "image",
    VisionLayout((16, 16, 16), local_grid=(1, 2), kept=(1, 0, 2, 8), newline=True),
    "a" * 64,
)
OTHER_PICTURE = replace(PICTURE, digest="c" * 64)
VIDEO = VisionInput("video", VisionLayout((16, *[4] * 8, 16, 4, 4)), "b" * 64)

Answer = Callable[..., dict[str, list[int]]]


def make_scheduler(
    *, chunk: int = 10_000, tile_price: int = 1, max_running: int = 1, num_blocks: int = 256
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
        EncoderCache(max_bytes=1 << 20, bytes_per_token=1),
        budget=StepBudget(chunk, tile_price, chunk),
        max_running=max_running,
    )


@pytest.fixture(scope="module")
def model(tiny_info: CheckpointInfo) -> VisionLanguageModel:
    backend = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE)
    loaded = load_model(
        tiny_info,
        device="cpu",
        dtype="float32",
        backend=backend,
        progress=lambda num_bytes, total_bytes: None,
    )
    # Random weights answer nearly anything with the same few tokens: spread the logits.
    for name, parameter in loaded.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            parameter.data.mul_(8.0)
    return loaded


@pytest.fixture
def make_runner(model: VisionLanguageModel, tiny_info: CheckpointInfo) -> Callable[[], Runner]:
    def make() -> Runner:
        text, vision = tiny_info.text, tiny_info.vision
        assert vision is not None and vision.video_token_id is not None
        backend = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE)
        caches = backend.allocate(
            text.num_layers,
            256,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        return Runner(
            model,
            caches,
            block_size=BLOCK_SIZE,
            device="cpu",
            placeholder_ids=frozenset({vision.image_token_id, vision.video_token_id}),
        )

    return make


@pytest.fixture
def answer(make_runner: Callable[[], Runner]) -> Answer:
    def run(
        *requests: GenerationRequest,
        chunk: int = 10_000,
        tile_price: int = 1,
        max_running: int = 1,
        num_blocks: int = 256,
    ) -> dict[str, list[int]]:
        scheduler = make_scheduler(
            chunk=chunk, tile_price=tile_price, max_running=max_running, num_blocks=num_blocks
        )
        runner = make_runner()
        for request in requests:
            scheduler.add(Sequence.from_request(request, make_tiles(request, side=SIDE)))
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        while batch := scheduler.schedule():
            for event in scheduler.commit(batch, runner.run(batch)):
                assert event.token_id is not None
                answers[event.request_id].append(event.token_id)
        scheduler.check()
        return answers

    return run


@pytest.fixture
def requests(tiny_info: CheckpointInfo) -> list[GenerationRequest]:
    """Text, a picture, a video, both; greedy and sampled."""
    spec = tiny_info.vision
    assert spec is not None
    prompts: list[tuple[int | VisionInput, ...]] = [
        tuple(range(60, 81)),
        (7, 8, PICTURE, 9),
        (7, VIDEO, 9, 10),
        (7, OTHER_PICTURE, 8, VIDEO, 9),
    ]
    return [
        make_request(
            f"{index}-{temperature}",
            prompt=prompt,
            max_tokens=8,
            temperature=temperature,
            seed=index,
            spec=spec,
        )
        for index, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
    ]


@pytest.mark.parametrize(("chunk", "tile_price"), [(1, 1), (3, 2), (8, 2), (10_000, 2000)], ids=str)
def test_chunking_never_changes_tokens(
    answer: Answer, requests: list[GenerationRequest], chunk: int, tile_price: int
) -> None:
    whole = answer(*requests)
    assert len({tuple(ids) for ids in whole.values()}) > len(requests) // 2  # worth comparing
    assert answer(*requests, chunk=chunk, tile_price=tile_price) == whole


@pytest.mark.parametrize(("chunk", "max_running"), [(10_000, 8), (10, 3)])
def test_neighbours_never_change_tokens(
    answer: Answer, requests: list[GenerationRequest], chunk: int, max_running: int
) -> None:
    together = answer(*requests, chunk=chunk, max_running=max_running)
    assert together == answer(*requests)


def test_preemption_never_changes_tokens(answer: Answer, requests: list[GenerationRequest]) -> None:
    """Room for the longest alone, so that all of them together often have to go back."""
    longest = max(len(request.prompt_ids) + 8 for request in requests)
    together = answer(*requests, max_running=8, num_blocks=-(-longest // BLOCK_SIZE) + 2)
    assert together == answer(*requests)


def test_a_warm_cache_never_changes_tokens(
    answer: Answer, requests: list[GenerationRequest]
) -> None:
    again = [replace(request, request_id=f"{request.request_id} again") for request in requests]
    answers = answer(*requests, *again)
    for request in requests:
        assert answers[request.request_id] == answers[f"{request.request_id} again"]


def test_another_picture_gives_another_answer(
    answer: Answer, requests: list[GenerationRequest]
) -> None:
    other = replace(requests[2], vision=(OTHER_PICTURE,))
    assert answer(requests[2]) != answer(other)


def test_a_missing_medium_is_noticed_before_the_forward(
    make_runner: Callable[[], Runner], requests: list[GenerationRequest]
) -> None:
    sequence = Sequence.from_request(requests[2], make_tiles(requests[2], side=SIDE))
    sequence.media = []
    sequence.block_table = list(range(20))
    with pytest.raises(RuntimeError, match="placeholders and features differ"):
        make_runner().run(Batch([Span(sequence, 0, len(sequence))], [], []))


def test_running_a_step_again_gives_the_same(
    make_runner: Callable[[], Runner], requests: list[GenerationRequest]
) -> None:
    runner = make_runner()
    scheduler = make_scheduler(chunk=20, tile_price=4)
    request = requests[-1]
    scheduler.add(Sequence.from_request(request, make_tiles(request, side=SIDE)))
    while batch := scheduler.schedule():
        outputs = runner.run(batch)
        assert runner.run(batch) == outputs
        scheduler.commit(batch, outputs)


def test_nan_logits_end_their_request_alone(
    make_runner: Callable[[], Runner],
    model: VisionLanguageModel,
    requests: list[GenerationRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def logits_with_a_nan(hidden: Tensor) -> Tensor:
        logits = VisionLanguageModel.logits(model, hidden)
        logits[0, 5] = math.nan
        return logits

    monkeypatch.setattr(model, "logits", logits_with_a_nan)
    sequences = [Sequence.from_request(request, []) for request in requests[:2]]
    for index, sequence in enumerate(sequences):
        sequence.block_table = list(range(10 * index, 10 * index + 10))
    spans = [Span(sequence, 0, len(sequence)) for sequence in sequences]
    bad, good = make_runner().run(Batch(spans, [], []))
    assert (bad.token_id, bad.error_code) == (None, "internal_error")
    assert good.token_id is not None and good.error_code is None


def test_the_cache_on_a_cpu_holds_a_few_contexts() -> None:
    size = choose_cache_bytes("cpu", configured=None, bytes_per_token=100, context_length=64)
    assert size == 16 * 6400
    more_than_there_is = choose_cache_bytes(
        "cpu", configured=None, bytes_per_token=1 << 30, context_length=1 << 20
    )
    assert more_than_there_is == 1 << 50  # one context, whatever it takes
    assert choose_cache_bytes("cpu", configured=7, bytes_per_token=1, context_length=1) == 7
