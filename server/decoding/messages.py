"""What crosses between the HTTP process, the forker and the decoders, and its encoding.

Each message is one packet of a Unix socket, msgpack, short; bytes of media and pixels never cross
here but in files whose descriptors come along. What a decoder says may be a stranger's words:
whoever reads it checks it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from server.core import VisionSpec
from server.decoding.jobs import FramesJob, ImageJob, Job, VideoJob
from server.media.limits import DecodeLimits

MAX_TASK_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 4 * 1024


class Start(msgspec.Struct, frozen=True):
    """The first message to the forker: all that it and its decoders are ever told of settings."""

    limits: DecodeLimits
    spec: VisionSpec


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Make a decoder; its end of a socket comes along."""

    number: int


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End a decoder, whatever it does."""

    number: int


ToForker: TypeAlias = Fork | Kill


class Ready(msgspec.Struct, frozen=True):
    """The first message of the forker, and of each decoder: which protections it had to do without.

    The names are for the log.
    """

    missing: tuple[str, ...]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One of the jobs. With it comes the file to read, of so many bytes, and one for the tiles.

    A probe needs no file for tiles and gets none.
    """

    num_bytes: int
    is_probe: bool
    image: ImageJob | None = None
    video: VideoJob | None = None
    frames: FramesJob | None = None

    @property
    def job(self) -> Job:
        job = self.image or self.video or self.frames
        if job is None:
            raise ValueError("a task without a job")
        return job


def task_of(job: Job, *, num_bytes: int, is_probe: bool) -> Task:
    return Task(
        num_bytes=num_bytes,
        is_probe=is_probe,
        image=job if isinstance(job, ImageJob) else None,
        video=job if isinstance(job, VideoJob) else None,
        frames=job if isinstance(job, FramesJob) else None,
    )


ErrorName: TypeAlias = Literal["damaged", "unsupported", "too large", "invalid value"]
Side: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a task: an error with its public message, or the rest."""

    error: ErrorName | None = None
    message: str = ""
    size: tuple[Side, Side] = (1, 1)
    num_tiles: Count = 0
    num_frames: Count | None = None
    duration_s: Seconds | None = None
    decode_s: Seconds = 0.0
    preprocess_s: Seconds = 0.0


encode = msgspec.msgpack.Encoder().encode
decode_start = msgspec.msgpack.Decoder(Start).decode
decode_to_forker = msgspec.msgpack.Decoder(ToForker).decode
decode_ready = msgspec.msgpack.Decoder(Ready).decode
decode_task = msgspec.msgpack.Decoder(Task).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
