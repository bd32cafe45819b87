"""The nouns of the engine: a request in progress, and what one step computes of it.

The scheduler decides with these and the runner computes with them; neither needs the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from server.core import GenerationRequest, Tiles, VisionInput
from server.engine.encodings import Encoding

SequenceStatus = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Medium:
    """One picture or video of a sequence. Its placeholders are the positions [start, stop).

    `encoding` is held from when the sequence joins until those positions are computed.
    """

    vision: VisionInput
    start: int
    tiles: Tiles
    encoding: Encoding | None = None

    @property
    def stop(self) -> int:
        return self.start + self.vision.num_tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress. It owns its block table.

    token_ids   | prompt ............ | generated ... |
                0        num_computed                 len(sequence)
    cached      [0, num_computed)                     keys and values are in the blocks
    to compute  [num_computed, len(sequence))         its last position gives the next token
    """

    request: GenerationRequest
    token_ids: list[int]
    media: list[Medium]
    status: SequenceStatus = "waiting"
    num_computed: int = 0
    num_cached: int | None = None
    """Of the prompt: how much of it was in the cache when the sequence first joined."""
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Of its full blocks from the first on, as far as they have been made."""

    @classmethod
    def from_request(cls, request: GenerationRequest, tiles: list[Tiles]) -> Sequence:
        media = [
            Medium(vision, start, medium_tiles)
            for vision, start, medium_tiles in zip(
                request.vision, request.vision_starts, tiles, strict=True
            )
        ]
        return cls(request, list(request.prompt_ids), media)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_answering(self) -> bool:
        """Whether one position is left to compute, and nothing that has to be encoded first."""
        return self.num_to_compute == 1 and all(
            medium.encoding is None or medium.encoding.is_complete for medium in self.media
        )

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


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may hold, all of it priced in tokens of a prompt.

    `max_tokens_beside_answers` is the limit for prompts and tiles in a step that running answers
    wait for. A step that could hold nothing else may hold one tile, whatever a tile costs.
    """

    max_tokens: int
    tokens_per_tile: int
    max_tokens_beside_answers: int


@dataclass(frozen=True, slots=True)
class VisionSlice:
    """The tiles [start, stop) of a sequence's medium, encoded in one step, before its spans."""

    sequence: Sequence
    encoding: Encoding
    medium: Medium
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


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
    """What a step made of one span: the next token where it was sampled, or why it failed."""

    token_id: int | None = None
    error_code: str | None = None


class DeviceError(Exception):
    """The device is in doubt: nothing more can be computed in this process."""
