"""Proves a loaded model before it is called ready, and measures how much of it fits a step.

Steps are kept near `TARGET_STEP_S`, so that nobody waits long behind somebody else's prompt or
video, and so that a silence says something. It knows no requests but its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from server.core import (
    GenerationRequest,
    SamplingParams,
    Tiles,
    VisionInput,
    VisionLayout,
    VisionSpec,
)
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.worker import StepRunner
from server.errors import CheckpointError

TARGET_STEP_S = 1.0
MIN_TOKENS_PER_STEP = 16
MAX_TOKENS_PER_STEP = 2048
MAX_TILES_PER_STEP = 16

FIRST_PROBE_TOKENS = 32
PROBE_GROWTH = 4
LONG_ENOUGH_S = TARGET_STEP_S / 8
"""A probe that took so long is dominated by work that grows with its tokens."""


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What a step may hold, and the longest step (seconds) that was seen while finding it."""

    max_tokens: int
    max_tiles: int
    slowest_s: float


def warm_up(
    runner: StepRunner, pool: BlockPool, *, vision: VisionSpec | None, max_tokens: int | None
) -> StepBudget:
    """Generates, encodes and measures; CheckpointError where no usable logits come out.

    `max_tokens` is the explicit setting, which is taken as it is; None finds it. Where even the
    least step takes longer than the target, the least is what there is.
    """
    slowest_s = _longest_step_s(runner, pool, _request((0,), max_tokens=2), [])
    if max_tokens is None:
        max_tokens, prefill_s = _measured_tokens(runner, pool)
        slowest_s = max(slowest_s, prefill_s)
    max_tiles = 1
    if vision is not None:
        picture = VisionInput("image", VisionLayout((vision.image_queries,)), digest="")
        ids = (vision.image_token_id,) * picture.num_tokens
        side = vision.tile_size
        tiles = np.zeros((1, side, side, 3), np.uint8)
        request = _request(ids, max_tokens=1, vision=(picture,))
        tile_s = _longest_step_s(runner, pool, request, [tiles])
        max_tiles = max(1, min(MAX_TILES_PER_STEP, int(TARGET_STEP_S / tile_s)))
        slowest_s = max(slowest_s, tile_s)
    return StepBudget(max_tokens, max_tiles, slowest_s)


def _measured_tokens(runner: StepRunner, pool: BlockPool) -> tuple[int, float]:
    """The tokens that fit the target, by growing a prompt until its step is long enough to tell."""
    most = min(MAX_TOKENS_PER_STEP, pool.num_tokens - 1)
    num_tokens = min(FIRST_PROBE_TOKENS, most)
    while True:
        request = _request((0,) * num_tokens, max_tokens=1)
        step_s = _longest_step_s(runner, pool, request, [])
        if step_s >= LONG_ENOUGH_S or num_tokens * PROBE_GROWTH > most:
            break
        num_tokens *= PROBE_GROWTH
    fitting = int(num_tokens * TARGET_STEP_S / step_s)
    return max(MIN_TOKENS_PER_STEP, min(MAX_TOKENS_PER_STEP, fitting)), step_s


def _longest_step_s(
    runner: StepRunner, pool: BlockPool, request: GenerationRequest, tiles: list[Tiles]
) -> float:
    """Runs the request to its end, each prompt in one step."""
    scheduler = Scheduler(
        pool, max_tokens_per_step=MAX_TOKENS_PER_STEP, max_tiles_per_step=MAX_TILES_PER_STEP
    )
    scheduler.add(Sequence.from_request(request, tiles))
    longest_s = 0.0
    while batch := scheduler.schedule():
        started_s = time.monotonic()
        outputs = runner.run(batch)
        longest_s = max(longest_s, time.monotonic() - started_s)
        for event in scheduler.commit(batch, outputs):
            if event.finish_reason == "error":
                raise CheckpointError("the model gave no usable logits in its self-test")
    scheduler.check()
    return longest_s


def _request(
    ids: tuple[int, ...], *, max_tokens: int, vision: tuple[VisionInput, ...] = ()
) -> GenerationRequest:
    return GenerationRequest(
        request_id="warm-up",
        tenant="",
        prompt_ids=ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
        vision=vision,
        vision_starts=(0,) * len(vision),
    )
