"""The demo model in bfloat16: how far results go apart when the same is computed in other portions.

In 16 bits every sum is rounded, and portions of another size are summed in another order, but where
our own loops compute all of a step. What may come of it is documented in docs/model.md; in float32
tokens are the same, see test_runner and test_demo_model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.attention.backend import choose_backend
from server.chat.tokenizer import Tokenizer
from server.core import GenerationRequest, SamplingParams
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, StepBudget
from server.hub import find_checkpoint
from server.kernels.machine import product_units
from server.model.checkpoint import load_model, pack_for_cpu
from server.model.config import read_checkpoint

TOLERANCE = 0.25
"""How far log-probabilities may differ, of tokens that are as likely as the next line says.
0.09 has been seen."""

LIKELY = -8.0

NUM_IDS = 70
TEXT = "".join(
    [
        "<|im_start|>user\nHow many circles are there?<|im_end|>\n<|im_start|>assistant\n",
        "There are two circles: a red circle on the left and a blue circle on the right. ",
        "왼쪽에 빨간 원이 하나, 오른쪽에 파란 원이 하나 있습니다.",
    ]
)
Logprobs = Callable[..., dict[str, list[float]]]


@pytest.fixture(scope="module")
def logprobs() -> Logprobs:
    info = read_checkpoint(find_checkpoint(None, revision=None, show_progress=False).folder)

    def run(
        *requests: GenerationRequest,
        dtype: str = "bfloat16",
        chunk: int = 10_000,
        attention: str = "cpu",
    ) -> dict[str, list[float]]:
        """Of each position of the prompts but the first, by request."""
        backend = choose_backend(
            attention, device="cpu", dtype=getattr(torch, dtype), head_dim=info.text.head_dim
        )
        model = load_model(
            info, device="cpu", dtype=dtype, backend=backend, progress=lambda done, total: None
        )
        pack_for_cpu(model, info)
        text, num_blocks = info.text, 2 * len(requests) + 2
        caches = backend.allocate(
            text.num_layers,
            num_blocks,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=getattr(torch, dtype),
            device="cpu",
        )
        scheduler = Scheduler(
            BlockPool(num_blocks=num_blocks, block_size=backend.page_size),
            EncoderCache(max_bytes=0, bytes_per_token=1),
            budget=StepBudget(chunk, 1, chunk),
            max_running=len(requests),
        )
        runner = Runner(model, caches, block_size=backend.page_size, device="cpu")
        for request in requests:
            scheduler.add(Sequence.from_request(request, []))
        told: dict[str, list[float]] = {}
        while batch := scheduler.schedule():
            for event in scheduler.commit(batch, runner.run(batch)):
                if event.prompt_logprobs:
                    told[event.request_id] = [
                        each.logprob for each in event.prompt_logprobs if each is not None
                    ]
        return told

    return run


@pytest.fixture(scope="module")
def request_() -> GenerationRequest:
    return prompt_of(1)


def prompt_of(seed: int) -> GenerationRequest:
    folder = find_checkpoint(None, revision=None, show_progress=False).folder
    words = Tokenizer.from_folder(folder).encode_text(TEXT)
    start = seed % len(words)
    ids = tuple((words * 2)[start : start + NUM_IDS])
    sampling = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=0)
    return GenerationRequest(str(seed), "", ids, sampling)


def furthest(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == NUM_IDS - 1
    likely = [(a, b) for a, b in zip(one, other, strict=True) if max(a, b) > LIKELY]
    assert len(likely) > NUM_IDS // 4
    return max(abs(a - b) for a, b in likely)


@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_portions_of_any_size_are_close(
    logprobs: Logprobs, request_: GenerationRequest, chunk: int
) -> None:
    exact = logprobs(request_, dtype="float32")
    assert 0 < furthest(logprobs(request_, chunk=chunk)["1"], exact["1"]) < TOLERANCE


@pytest.mark.parametrize("num_neighbours", [1, 6, 31])
def test_neighbours_move_little(
    logprobs: Logprobs, request_: GenerationRequest, num_neighbours: int
) -> None:
    neighbours = [prompt_of(seed) for seed in range(2, 2 + num_neighbours)]
    alone, together = logprobs(request_), logprobs(request_, *neighbours, chunk=64)
    assert furthest(alone["1"], together["1"]) < TOLERANCE


by_pairs = pytest.mark.skipif(
    not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16"
)


@by_pairs
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_our_loops_compute_the_same_in_portions_of_any_size(
    logprobs: Logprobs, request_: GenerationRequest, chunk: int
) -> None:
    whole = logprobs(request_, attention="auto")
    assert logprobs(request_, attention="auto", chunk=chunk) == whole


@by_pairs
@pytest.mark.parametrize("num_neighbours", [1, 6, 31])
def test_neighbours_do_not_move_what_our_loops_compute(
    logprobs: Logprobs, request_: GenerationRequest, num_neighbours: int
) -> None:
    neighbours = [prompt_of(seed) for seed in range(2, 2 + num_neighbours)]
    alone = logprobs(request_, attention="auto")
    together = logprobs(request_, *neighbours, attention="auto", chunk=64)
    assert together["1"] == alone["1"]


@by_pairs
def test_our_loops_are_close_to_float32(logprobs: Logprobs, request_: GenerationRequest) -> None:
    exact = logprobs(request_, dtype="float32")
    assert 0 < furthest(logprobs(request_, attention="auto")["1"], exact["1"]) < TOLERANCE
