"""What the HTTP process may know of a running engine: plain values.

Some are learnt once, when it became ready, others are told while it works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EngineStatus = Literal["loading", "ready", "silent", "restarting", "crashed", "stopping"]
"""`silent` is ready, but late with its sign of life. `crashed` means that restarting was given up:
an operator has to act."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Measured at start, the same for every request.

    `max_request_tokens` is the context, of prompt and answer together; the cache holds at least
    one. Prompt ids must be below `logits_width` and `embedding_rows`. `slowest_step_s` is the
    longest step seen while the limits of a step were measured.
    """

    logits_width: int
    embedding_rows: int
    max_request_tokens: int
    kv_tokens: int
    kv_bytes: int
    block_size: int
    device: str
    dtype: str
    attention: str
    slowest_step_s: float
    load_s: float


STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Steps are counted by how long they took: up to each of these, and beyond the last."""


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """What was counted since the server started: it never falls, whatever process is gone.

    The prefix cache is asked once for each request, when it first joins. A prompt that had to give
    up its blocks is computed again, and counted again. `num_steps_up_to[i]` is the number of steps
    that took at most `STEP_BOUNDS_S[i]` and longer than the bound before.
    """

    num_steps: int = 0
    steps_s: float = 0.0
    num_steps_up_to: tuple[int, ...] = (0,) * (len(STEP_BOUNDS_S) + 1)
    num_prompt_tokens_computed: int = 0
    num_tokens_generated: int = 0
    num_preemptions: int = 0
    num_prefix_tokens_looked_up: int = 0
    num_prefix_tokens_hit: int = 0
    num_encodings_hit: int = 0
    num_encodings_missed: int = 0

    def plus(self, other: EngineTotals) -> EngineTotals:
        steps = zip(self.num_steps_up_to, other.num_steps_up_to, strict=True)
        return EngineTotals(
            num_steps=self.num_steps + other.num_steps,
            steps_s=self.steps_s + other.steps_s,
            num_steps_up_to=tuple(ours + theirs for ours, theirs in steps),
            num_prompt_tokens_computed=(
                self.num_prompt_tokens_computed + other.num_prompt_tokens_computed
            ),
            num_tokens_generated=self.num_tokens_generated + other.num_tokens_generated,
            num_preemptions=self.num_preemptions + other.num_preemptions,
            num_prefix_tokens_looked_up=(
                self.num_prefix_tokens_looked_up + other.num_prefix_tokens_looked_up
            ),
            num_prefix_tokens_hit=self.num_prefix_tokens_hit + other.num_prefix_tokens_hit,
            num_encodings_hit=self.num_encodings_hit + other.num_encodings_hit,
            num_encodings_missed=self.num_encodings_missed + other.num_encodings_missed,
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine process holds at a moment, and what it has counted.

    Used blocks and held encodings belong to requests that run; cached blocks and kept encodings
    belong to nobody and make room for whoever needs it.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    encoder_held_bytes: int = 0
    encoder_kept_bytes: int = 0
    running_tile_bytes: int = 0
    totals: EngineTotals = EngineTotals()


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The admitted requests as the HTTP process knows them: started, or still waiting."""

    num_started: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    waiting_tile_bytes: int = 0
