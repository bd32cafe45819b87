"""How long the steps take, and what the engine tells of itself: now and then, and when it is idle.

Made from counts that are kept anyway, so that a step costs the same whoever looks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from server.engine.facts import STEP_BOUNDS_S, EngineStats, EngineTotals
from server.engine.scheduler import Scheduler

INTERVAL_S = 0.25
"""While there is work, what is told is at most so old; longer steps aside."""


class Meter:
    """Of one scheduler, for the life of the process."""

    def __init__(
        self, scheduler: Scheduler, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._num_steps_up_to = [0] * (len(STEP_BOUNDS_S) + 1)
        self._steps_s = 0.0
        self._step_began_s = 0.0
        self._next_told_s = clock()

    def begin_step(self) -> None:
        self._step_began_s = self._clock()

    def end_step(self) -> None:
        duration_s = self._clock() - self._step_began_s
        self._steps_s += duration_s
        self._num_steps_up_to[bisect_left(STEP_BOUNDS_S, duration_s)] += 1

    def stats_if_due(self) -> EngineStats | None:
        """None where something was told a moment ago and there is more to come."""
        now_s = self._clock()
        if now_s < self._next_told_s and not self._scheduler.idle:
            return None
        self._next_told_s = now_s + INTERVAL_S
        return self._stats()

    def _stats(self) -> EngineStats:
        scheduler = self._scheduler
        counts = scheduler.counts
        encodings = scheduler.encoder_cache
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks_used=scheduler.pool.num_used,
            num_blocks_cached=scheduler.pool.num_cached,
            encoder_held_bytes=encodings.held_bytes,
            encoder_kept_bytes=encodings.kept_bytes,
            running_tile_bytes=scheduler.running_tile_bytes,
            totals=EngineTotals(
                num_steps=sum(self._num_steps_up_to),
                steps_s=self._steps_s,
                num_steps_up_to=tuple(self._num_steps_up_to),
                num_prompt_tokens_computed=counts.num_prompt_tokens_computed,
                num_tokens_generated=counts.num_tokens_generated,
                num_preemptions=counts.num_preemptions,
                num_prefix_tokens_looked_up=counts.num_prefix_tokens_looked_up,
                num_prefix_tokens_hit=counts.num_prefix_tokens_hit,
                num_encodings_hit=encodings.num_hits,
                num_encodings_missed=encodings.num_misses,
            ),
        )
