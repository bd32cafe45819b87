"""What may be asked of a decoder, and what comes of it.

Must not know that decoding happens in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from server.core import MediaKind, Tiles, VisionInput


@dataclass(frozen=True, slots=True)
class ImageJob:
    """A picture. `max_grids` bounds its tiles, the thumbnail not counted."""

    detail: Literal["low", "high"] = "high"
    max_grids: int | None = None


@dataclass(frozen=True, slots=True)
class VideoJob:
    """A video file. What is None is left to the model's own rule; times are in seconds."""

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class FramesJob:
    """A video that is a list of pictures, `fps` of them for each second.

    They lie one after another in the file, `lengths` bytes each.
    """

    lengths: tuple[int, ...]
    fps: float = 1.0
    num_frames: int | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None


Job: TypeAlias = ImageJob | VideoJob | FramesJob


def kind_of(job: Job) -> MediaKind:
    return "image" if isinstance(job, ImageJob) else "video"


@dataclass(frozen=True, slots=True)
class Decoded:
    """A medium ready for the engine.

    `size` is the (width, height) of the upright picture or of the first frame shown. `num_frames`
    is how many frames were taken, None of a picture, which has no `duration_s` either. `decode_s`
    and `preprocess_s` are what getting the pixels and making tiles of them took.
    """

    vision: VisionInput
    tiles: Tiles
    size: tuple[int, int]
    duration_s: float | None
    num_frames: int | None
    decode_s: float
    preprocess_s: float


@dataclass(frozen=True, slots=True)
class Probed:
    """What is known of a medium without decoding it.

    `size` is a picture's upright (width, height); of a video it is that of the stored frames, which
    may be shown turned. `num_frames` is how many frames the job would take, None of a picture.
    """

    size: tuple[int, int]
    duration_s: float | None
    num_frames: int | None
