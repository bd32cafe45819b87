"""Frames of a video to uint8 tiles: which moments to look at, and how many tokens each is worth.

Nine frames make a canvas; the first of a canvas is "slow" (many tokens), the others "fast" (few).
Pure functions of (frames, VisionSpec); nothing here decodes anything.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from server.core import Tiles, VisionInput, VisionLayout, VisionSpec
from server.vision.tiles import fit_to_tile, vision_input

BASE_INTERVAL_S = 0.4
"""Least time between two sampled frames, as in the model's first official release."""


def sample_times(duration_s: float, spec: VisionSpec) -> list[float]:
    """The moments (seconds from the first frame) at which a video of that duration is looked at."""
    # a duration summed from frame times may lie a hair under a multiple of the interval
    num_available = math.floor(duration_s / BASE_INTERVAL_S + 1e-6)
    num_frames = min(spec.max_frames, max(1, num_available))
    return [(index + 0.5) * duration_s / num_frames for index in range(num_frames)]


def frame_queries(num_frames: int, spec: VisionSpec) -> tuple[int, ...]:
    """Tokens of each frame, in time order."""
    slow, fast = spec.video_slow_queries, spec.video_fast_queries
    if spec.first_last_frames_slow:
        ends = {0, num_frames - 1}
        return tuple(slow if index in ends else fast for index in range(num_frames))
    per_canvas = spec.frames_per_canvas
    return tuple(slow if index % per_canvas == 0 else fast for index in range(num_frames))


def video_tiles(frames: Sequence[Image.Image], spec: VisionSpec) -> tuple[VisionInput, Tiles]:
    """One tile a frame, letterboxed, in time order; `frames` are RGB, at most `spec.max_frames`."""
    tiles = np.stack([np.asarray(_fitted(frame, spec)) for frame in frames])
    layout = VisionLayout(tile_queries=frame_queries(len(frames), spec))
    return vision_input("video", layout, tiles, spec), tiles


def _fitted(frame: Image.Image, spec: VisionSpec) -> Image.Image:
    """A frame that was fitted while it was decoded is left as it is."""
    side = spec.tile_size
    return frame if frame.size == (side, side) else fit_to_tile(frame, spec)
