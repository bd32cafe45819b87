"""Proves a loaded model before it is called ready, and measures how much of it fits a step.

Steps are kept near `TARGET_STEP_S`, so that nobody waits long behind somebody else's prompt or
video, and so that a silence says something. It knows no requests but its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
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
from server.engine.encodings import EncoderCache
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Sequence, Span, SpanOutput, StepBudget
from server.engine.worker import StepRunner
from server.errors import CheckpointError, ConfigError

TARGET_STEP_S = 1.0
TARGET_WAIT_S = TARGET_STEP_S / 4
"""What running answers wait for pictures and videos in a step, unless their own part takes longer.
On a machine for which the model is large that is about their own part: they go on at half speed."""
MIN_TOKENS_PER_STEP = 16
MAX_TOKENS_PER_STEP = 1024
"""Larger steps are no faster, and a first token is told when its step ends."""
MIN_MEDIA_TOKENS_BESIDE_ANSWERS = 64
"""Fewer rows than this cost nearly as much as these: the weights are read for them all. Fewer it is
where these would take longer than `TARGET_WAIT_S`."""

FIRST_PROBE_TOKENS = 32
PROBE_GROWTH = 4
LONG_ENOUGH_S = TARGET_STEP_S / 20
"""By which a probe must take longer than an answer: enough to tell what one more token costs."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The budget that was found, and the longest step (seconds) that was seen while finding it.

    A tile is to be encoded in `stages_per_tile` stages, for which the budget has the price.
    """

    budget: StepBudget
    stages_per_tile: int
    slowest_s: float


def warm_up(
    runner: StepRunner,
    pool: BlockPool,
    *,
    vision: VisionSpec | None,
    max_stages_per_tile: int,
    max_tokens: int | None,
    max_context: int,
    clock: Callable[[], float] = time.monotonic,
) -> WarmUp:
    """Generates, encodes and measures; CheckpointError where no usable logits come out.

    `max_tokens` is the explicit setting, which is taken as it is; None finds it, and what positions
    cost that have others before them, `max_context` at most. Where even the least step takes longer
    than the target, the least is what there is.
    """
    probe = _Probe(runner, pool, clock)
    probe.run(_request((0,), max_tokens=2))  # the first steps of all: what is set up is set up here
    answer_s = min(probe.run(_request((0,), max_tokens=3))[1:])
    num_tokens, prompt_s = _long_enough_prompt(probe, pool, answer_s)
    # What one more token costs: a step of one token has read all weights already.
    token_s = max(prompt_s - answer_s, prompt_s / 10) / max(1, num_tokens - 1)
    position_price = context_price = 0.0
    if max_tokens is None:
        fitting = (TARGET_STEP_S - answer_s) / token_s
        max_tokens = max(MIN_TOKENS_PER_STEP, min(MAX_TOKENS_PER_STEP, int(fitting)))
        position_price = max_tokens / max(fitting, max_tokens)
        context_price = position_price * _context_s(probe, pool, max_context) / token_s
    least_beside = min(MIN_MEDIA_TOKENS_BESIDE_ANSWERS, math.ceil(TARGET_WAIT_S / token_s))
    media_beside_answers = max(1, min(max_tokens, max(least_beside, int(answer_s / token_s))))
    tile_s = _tile_s(probe, vision, num_cached=pool.num_tokens) if vision is not None else 0.0
    tokens_per_tile = tile_s / token_s
    # So many that one of them fits beside answers, and leaves half of any step to others.
    longest_stage = max(1, min(media_beside_answers, max_tokens // 2))
    num_stages = max(1, min(max_stages_per_tile, math.ceil(tokens_per_tile / longest_stage)))
    budget = StepBudget(
        max_tokens=max_tokens,
        tokens_per_stage=max(1, math.ceil(tokens_per_tile / num_stages)),
        max_media_tokens_beside_answers=media_beside_answers,
        position_price=position_price,
        context_price=context_price,
    )
    return WarmUp(budget, num_stages, probe.slowest_s)


def _long_enough_prompt(probe: _Probe, pool: BlockPool, answer_s: float) -> tuple[int, float]:
    """A prompt's tokens and seconds, grown until its step is long enough to tell."""
    most = min(MAX_TOKENS_PER_STEP, pool.num_tokens - 1)
    num_tokens = min(FIRST_PROBE_TOKENS, most)
    while True:
        request = _request((0,) * num_tokens, max_tokens=1)
        # Twice: one hiccup must not make every later step small.
        step_s = min(max(probe.run(request)) for _ in range(2))
        if step_s - answer_s >= LONG_ENOUGH_S or num_tokens * PROBE_GROWTH > most:
            return num_tokens, step_s
        num_tokens *= PROBE_GROWTH


def _context_s(probe: _Probe, pool: BlockPool, max_context: int) -> float:
    """Seconds that each position before it adds to a position."""
    stop = min(max_context, pool.num_tokens)
    num_tokens = min(FIRST_PROBE_TOKENS, stop // 2)
    if not num_tokens:
        return 0.0
    far_s, near_s = (
        min(probe.span_s(end - num_tokens, end) for _ in range(2)) for end in (stop, num_tokens)
    )
    return max(0.0, far_s - near_s) / (num_tokens * (stop - num_tokens))


def _tile_s(probe: _Probe, vision: VisionSpec, *, num_cached: int) -> float:
    """Seconds for one tile, after a whole picture of one has gone through everything."""
    picture = VisionInput("image", VisionLayout((vision.image_queries,)), digest="")
    ids = (vision.image_token_id,) * picture.num_tokens
    tiles = np.zeros((1, vision.tile_size, vision.tile_size, 3), np.uint8)
    request = _request(ids, max_tokens=1, vision=(picture,))
    if len(ids) + 1 > num_cached:
        raise ConfigError(
            f"the key/value cache holds {num_cached} tokens, but one tile alone takes {len(ids)}: "
            "raise model.max_context or engine.kv_cache_bytes"
        )
    probe.run(request, [tiles])
    return min(probe.first_step_s(request, [tiles], max_tokens=1) for _ in range(2))


class _Probe:
    """Runs requests of its own, one at a time, each prompt in one step."""

    def __init__(self, runner: StepRunner, pool: BlockPool, clock: Callable[[], float]) -> None:
        self.slowest_s = 0.0
        self._clock = clock
        self._runner = runner
        self._pool = pool

    def run(self, request: GenerationRequest, tiles: AbstractSequence[Tiles] = ()) -> list[float]:
        """The seconds of each of its steps."""
        scheduler = self._begin(request, tiles, max_tokens=MAX_TOKENS_PER_STEP)
        steps_s: list[float] = []
        while batch := scheduler.schedule():
            outputs, step_s = self._timed(batch)
            steps_s.append(step_s)
            for event in scheduler.commit(batch, outputs):
                if event.finish_reason == "error":
                    raise CheckpointError("the model gave no usable logits in its self-test")
        scheduler.check()
        return steps_s

    def first_step_s(
        self, request: GenerationRequest, tiles: AbstractSequence[Tiles], *, max_tokens: int
    ) -> float:
        """The seconds of its first step, of so many tokens: a tile is priced as one of them."""
        scheduler = self._begin(request, tiles, max_tokens=max_tokens)
        batch = scheduler.schedule()
        assert batch is not None
        _, step_s = self._timed(batch)
        scheduler.abort(request.request_id)
        scheduler.check()
        return step_s

    def span_s(self, start: int, stop: int) -> float:
        """The seconds of a step of these positions, as if those before them had been computed."""
        sequence = Sequence.from_request(_request((0,) * stop, max_tokens=1), [])
        sequence.num_computed = start
        sequence.block_table = list(range(self._pool.blocks_for(stop)))
        return self._timed(Batch([Span(sequence, start, stop)], [], []))[1]

    def _begin(
        self, request: GenerationRequest, tiles: AbstractSequence[Tiles], *, max_tokens: int
    ) -> Scheduler:
        scheduler = Scheduler(
            self._pool,
            EncoderCache(max_bytes=0, bytes_per_token=1),
            budget=StepBudget(max_tokens, 1, max_tokens),
            max_running=1,
        )
        scheduler.add(Sequence.from_request(request, list(tiles)))
        return scheduler

    def _timed(self, batch: Batch) -> tuple[AbstractSequence[SpanOutput], float]:
        started_s = self._clock()
        outputs = self._runner.run(batch)
        step_s = self._clock() - started_s
        self.slowest_s = max(self.slowest_s, step_s)
        return outputs, step_s


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
