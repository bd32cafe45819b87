"""Frames of a video to uint8 tiles: which moments to look at, and how many tokens each is worth.

Nine frames make a canvas; the first of a canvas is "slow" (many tokens), the others "fast" (few).
Pure functions of (frames, VisionSpec); nothing here decodes anything.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from server.core import Tiles, VisionInput, VisionLayout, VisionSpec
from server.errors import InvalidStretch
from server.vision.tiles import fit_to_tile, vision_input

BASE_INTERVAL_S = 0.4
"""Least time between two sampled frames, as in the model's first official release."""


def sample_times(
    duration_s: float,
    spec: VisionSpec,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> list[float]:
    """The moments (seconds from the first frame) at which a video of that duration is looked at.

    Each is the middle of one of as many equal parts of the wanted window. Their number is
    `num_frames`, or follows from `fps`, or from the model's own interval; always at least one and
    at most `max_frames` and what the model takes.
    """
    start_s, end_s = wanted_window(duration_s, start_s=start_s, end_s=end_s)
    length_s = end_s - start_s
    if num_frames is None:
        # a length summed from frame times may lie a hair under a multiple of the interval
        per_second = 1 / BASE_INTERVAL_S if fps is None else fps
        num_frames = math.floor(min(length_s * per_second, spec.max_frames) + 1e-6)
    limit = spec.max_frames if max_frames is None else min(max_frames, spec.max_frames)
    num_frames = max(1, min(num_frames, limit))
    return [start_s + (index + 0.5) * length_s / num_frames for index in range(num_frames)]


def wanted_window(
    duration_s: float, *, start_s: float | None, end_s: float | None
) -> tuple[float, float]:
    """From when to when a video is looked at, within its duration; seconds from the first frame."""
    start_s = 0.0 if start_s is None else start_s
    if start_s > 0 and start_s >= duration_s:
        raise InvalidStretch(
            f"start_s is {start_s:g}; the video ends after {duration_s:.3f} seconds."
        )
    end_s = duration_s if end_s is None else min(end_s, duration_s)
    if end_s < start_s:
        raise InvalidStretch(f"end_s is {end_s:g}, before start_s, which is {start_s:g}.")
    return start_s, end_s


def frame_queries(num_frames: int, spec: VisionSpec) -> tuple[int, ...]:
    """Tokens of each frame, in time order."""
    slow, fast = spec.video_slow_queries, spec.video_fast_queries
    if spec.first_last_frames_slow:
        ends = {0, num_frames - 1}
        return tuple(slow if index in ends else fast for index in range(num_frames))
    per_canvas = spec.frames_per_canvas
    return tuple(slow if index % per_canvas == 0 else fast for index in range(num_frames))


def video_token_range(spec: VisionSpec) -> tuple[int, int]:
    """The least and the most tokens of a video: of one frame, and of as many as are looked at."""
    return sum(frame_queries(1, spec)), sum(frame_queries(spec.max_frames, spec))


def video_tiles(frames: Sequence[Image.Image], spec: VisionSpec) -> tuple[VisionInput, Tiles]:
    """One tile a frame, letterboxed, in time order; `frames` are RGB, at most `spec.max_frames`."""
    tiles = np.stack([np.asarray(_fitted(frame, spec)) for frame in frames])
    return vision_input("video", video_layout(len(frames), spec), tiles, spec), tiles


def video_layout(num_frames: int, spec: VisionSpec) -> VisionLayout:
    """What so many frames become; known before any of them is decoded."""
    return VisionLayout(tile_queries=frame_queries(num_frames, spec))


def _fitted(frame: Image.Image, spec: VisionSpec) -> Image.Image:
    """A frame that was fitted while it was decoded is left as it is."""
    side = spec.tile_size
    return frame if frame.size == (side, side) else fit_to_tile(frame, spec)
