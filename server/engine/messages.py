"""What crosses between the HTTP process and the engine process, and its encoding.

A message is one msgpack frame; the uint8 tiles of a request follow it as raw frames of their own.
Both ends are ours, but nothing is ever turned into an object by a name that came in a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from server.core import GenerationRequest, Tiles, TokenEvent
from server.engine.facts import EngineFacts, EngineStats


class Start(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message to the engine process: all it is ever told of the configuration."""

    checkpoint: str
    device: str
    dtype: str
    attention: str
    max_context: int | None
    num_threads: int | None
    block_size: int | None
    kv_cache_bytes: int | None
    encoder_cache_bytes: int
    max_requests_running: int
    max_tokens_per_step: int | None


class Submit(msgspec.Struct, frozen=True, tag=True):
    """`tile_shapes[i]` is the shape of the i-th of the frames that follow."""

    request: GenerationRequest
    tile_shapes: tuple[tuple[int, int, int, int], ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """One choice of a request is not wanted any more, or none of them."""

    request_id: str
    choice: int | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process at the next step."""


ToEngine: TypeAlias = Start | Submit | Abort | Stop


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Bytes of weights read so far; both zero before that is known."""

    num_bytes: int
    total_bytes: int


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be served at all; `message` is the operator's one line."""

    message: str
    is_config: bool


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The self-test has generated; requests may come."""

    facts: EngineFacts


class Building(msgspec.Struct, frozen=True, tag=True):
    """The matchers of these requests are being built from now on, or may be, and of no others."""

    request_ids: tuple[str, ...]


class Joined(msgspec.Struct, frozen=True, tag=True):
    """These requests are in the running set from the step that now begins."""

    request_ids: tuple[str, ...]


class Progress(msgspec.Struct, frozen=True, tag=True):
    """One after each step, and one every second while idle: the sign of life.

    `stats` are those after the events. They come now and then, and always when nothing is left.
    """

    events: tuple[TokenEvent, ...] = ()
    stats: EngineStats | None = None


FromEngine: TypeAlias = Loading | LoadFailed | Ready | Building | Joined | Progress

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _ENCODER.encode(message)


def submit_frames(request: GenerationRequest, tiles: Sequence[Tiles]) -> list[bytes | memoryview]:
    """The message that asks for an answer, and the pixels behind it."""
    arrays = [np.ascontiguousarray(medium) for medium in tiles]
    shapes = tuple((a.shape[0], a.shape[1], a.shape[2], a.shape[3]) for a in arrays)
    return [encode(Submit(request, shapes)), *(array.reshape(-1).data for array in arrays)]


def decode_to_engine(frame: bytes) -> ToEngine:
    message: ToEngine = _TO_ENGINE.decode(frame)
    return message


def decode_from_engine(frame: bytes) -> FromEngine:
    message: FromEngine = _FROM_ENGINE.decode(frame)
    return message


def tiles_of(message: Submit, frames: Sequence[bytes | memoryview]) -> list[Tiles]:
    """The arrays of a `Submit`, as read-only views of its frames."""
    if len(frames) != len(message.tile_shapes):
        raise ValueError("frames and shapes differ in number")
    return [
        np.frombuffer(frame, np.uint8).reshape(shape)
        for frame, shape in zip(frames, message.tile_shapes, strict=True)
    ]
