"""The nouns of the engine: a request in progress, and what one step computes of it.

The scheduler decides with these and the runner computes with them; neither needs the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from server.core import GenerationRequest, Tiles, TokenLogprobs, VisionInput
from server.engine.encodings import Encoding

SequenceStatus = Literal["waiting", "running", "finished"]

SequenceKey: TypeAlias = tuple[str, int]
"""A request's id and the number of the choice."""


class TokenMask(Protocol):
    """Which ids may come next, by a grammar that sees each token as it is chosen."""

    def allowed(self) -> npt.NDArray[np.int32] | None:
        """int32 [ceil(ids / 32)]: bit i % 32 of word i // 32 is set where id i may come.

        `ids` is the width of the logits. None where every id may. Asking changes nothing: a step
        that is run again asks again. Where nothing may come no bit is set, and the choice fails.
        """

    def accept(self, token_id: int) -> None:
        """The id has been chosen, and another will be. Said once for each, and never raises."""


@dataclass(slots=True, eq=False)
class Medium:
    """One picture or video of a sequence. Its placeholders are the positions [start, stop).

    `encoding` is held from when the sequence joins until those positions are computed. `encode_s`
    is how long the medium was encoded in the times it was held before.
    """

    vision: VisionInput
    start: int
    tiles: Tiles
    encoding: Encoding | None = None
    encode_s: float = 0.0

    @property
    def stop(self) -> int:
        return self.start + self.vision.num_tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request in progress. It owns its block table.

    token_ids   | prompt ............ | generated ... |
                0        num_computed                 len(sequence)
    cached      [0, num_computed)                     keys and values are in the blocks
    to compute  [num_computed, len(sequence))         its last position gives the next token
    """

    request: GenerationRequest
    token_ids: list[int]
    media: list[Medium]
    choice: int = 0
    constraint: TokenMask | None = None
    status: SequenceStatus = "waiting"
    num_computed: int = 0
    num_cached: int | None = None
    """Of the prompt: how much of it was in the cache when the sequence first joined."""
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Of its full blocks from the first on, as far as they have been made."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    """Of the prompt's ids from the first on, which follows from nothing; only if asked for."""

    @classmethod
    def from_request(
        cls,
        request: GenerationRequest,
        tiles: list[Tiles],
        *,
        choice: int = 0,
        constraint: TokenMask | None = None,
    ) -> Sequence:
        """One of the choices; all of them may have the same tiles, but each its own constraint."""
        media = [
            Medium(vision, start, medium_tiles)
            for vision, start, medium_tiles in zip(
                request.vision, request.vision_starts, tiles, strict=True
            )
        ]
        return cls(request, list(request.prompt_ids), media, choice, constraint)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def key(self) -> SequenceKey:
        return self.request.request_id, self.choice

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    def is_placeholder(self, position: int) -> bool:
        """Whether what stands there was made of pixels."""
        return any(medium.start <= position < medium.stop for medium in self.media)

    @property
    def tells_prompt(self) -> bool:
        """Whether the prompt's log-probabilities were asked for; they come once a request."""
        return self.choice == 0 and self.request.sampling.num_prompt_logprobs is not None

    @property
    def must_compute_prompt(self) -> bool:
        """Whether something is still to be told that is not in the cache."""
        return self.tells_prompt and len(self.prompt_logprobs) < len(self.request.prompt_ids)

    @property
    def is_answering(self) -> bool:
        """Whether one position is left to compute, and nothing that has to be encoded first."""
        return self.num_to_compute == 1 and not self.is_being_encoded

    @property
    def is_being_encoded(self) -> bool:
        """Whether there is a medium whose positions cannot be computed yet."""
        return any(
            medium.encoding is not None and not medium.encoding.is_complete for medium in self.media
        )

    @property
    def has_media_to_compute(self) -> bool:
        """Whether positions of a picture or video are not in its blocks yet."""
        return any(medium.encoding is not None for medium in self.media)

    @property
    def num_tile_bytes(self) -> int:
        return sum(medium.tiles.nbytes for medium in self.media)

    @property
    def max_tokens(self) -> int:
        """The most positions it can come to hold, prompt and answer together."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Span:
    """The positions [start, stop) of a sequence, computed in one step.

    Prefill, a chunk of one, and decode (a span of length one) differ in nothing else.
    """

    sequence: Sequence
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_sampled(self) -> bool:
        """Whether this span reaches the end of what is known, so that a token follows from it."""
        return self.stop == len(self.sequence)

    @property
    def told_positions(self) -> range:
        """The positions of the prompt whose log-probabilities this span has to give.

        Each follows from the position before it. What was told before it is not told again when it
        is computed again.
        """
        if not self.sequence.must_compute_prompt:
            return range(0)
        first = max(self.start + 1, len(self.sequence.prompt_logprobs))
        return range(first, min(self.stop + 1, len(self.sequence.request.prompt_ids)))


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may hold, all of it priced in tokens of a prompt.

    A token is the price of a position, or more where that takes longer than 1 / `max_tokens` of the
    longest step: `position_price` and, for each position before it, `context_price`.
    `tokens_per_stage` is the price of one stage of one tile. `max_media_tokens_beside_answers` is
    the limit for tiles, and for prompts up to the end of their last medium, in a step that running
    answers wait for. One stage of the eldest prompt may exceed it, and `max_tokens` too where it
    would leave nothing of a step to anybody else.
    """

    max_tokens: int
    tokens_per_stage: int
    max_media_tokens_beside_answers: int
    position_price: float = 0.0
    context_price: float = 0.0

    def price(self, start: int, stop: int) -> float:
        """Of the positions [start, stop)."""
        num_positions = stop - start
        context = num_positions * (start + stop) / 2
        return max(
            num_positions, num_positions * self.position_price + context * self.context_price
        )

    def stop_within(self, start: int, allowance: int) -> int:
        """How far positions from `start` on go for so much."""
        # price(start, start + n) = slope * n ** 2 / 2 + first * n, solved for n.
        slope, first = self.context_price, self.position_price + start * self.context_price
        root = math.sqrt(first**2 + 2 * slope * allowance)
        fitting = allowance if not root else int(2 * allowance / (first + root))
        return start + min(allowance, fitting)


@dataclass(frozen=True, slots=True)
class VisionSlice:
    """The stages [start, stop) of a sequence's medium, encoded in one step, before its spans.

    The stages of its tiles are counted through, one tile after another.
    """

    sequence: Sequence
    encoding: Encoding
    medium: Medium
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tiles(self) -> Iterator[tuple[int, int]]:
        """Each tile that goes on, with how many stages it will have passed."""
        per_tile = self.encoding.stages_per_tile
        for tile in range(self.start // per_tile, -(-self.stop // per_tile)):
            yield tile, min(per_tile, self.stop - tile * per_tile)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: first the vision slices, then the spans, one a sequence at most.

    `joined` are the sequences that were waiting until now. A span never needs what another
    sequence's slice makes in the same step, so that each sequence can be computed alone.
    """

    spans: list[Span]
    vision: list[VisionSlice]
    joined: list[Sequence]

    @property
    def num_tokens(self) -> int:
        return sum(len(span) for span in self.spans)

    def alone(self) -> Iterator[tuple[Sequence, Batch]]:
        """The same step as one batch for each of its sequences."""
        parts = [piece.sequence for piece in self.vision] + [span.sequence for span in self.spans]
        for sequence in dict.fromkeys(parts):
            spans = [span for span in self.spans if span.sequence is sequence]
            vision = [piece for piece in self.vision if piece.sequence is sequence]
            yield sequence, Batch(spans, vision, [])


@dataclass(frozen=True, slots=True)
class SpanOutput:
    """What a step made of one span: the next token where it was sampled, or why it failed.

    `prompt_logprobs` are those of the span's `told_positions`.
    """

    token_id: int | None = None
    error_code: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class DeviceError(Exception):
    """The device is in doubt: nothing more can be computed in this process."""
