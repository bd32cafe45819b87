"""What the HTTP process may know of a running engine: plain values, learnt when it became ready."""

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
    max_tokens_per_step: int
    max_tokens_beside_answers: int
    tokens_per_tile: int
    slowest_step_s: float
    load_s: float
