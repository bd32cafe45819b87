"""Pictures to uint8 tiles: choose the canvas, resize, pad, cut, and count the tokens they become.

The rules are those of the checkpoint's own image processor (the LLaVA-NeXT "anyres" scheme) and
work on uint8 with Pillow, because its antialiased resizing is part of what the model was trained
on. Pure functions of (picture, VisionSpec); nothing here knows where a picture came from.
"""

import hashlib
import math
from typing import Literal

import numpy as np
from PIL import Image

from server.core import MediaKind, Tiles, VisionInput, VisionLayout, VisionSpec

Detail = Literal["low", "high"]


def image_tiles(
    image: Image.Image, spec: VisionSpec, *, detail: Detail = "high"
) -> tuple[VisionInput, Tiles]:
    """Cut an upright RGB picture into its thumbnail and the tiles of its best canvas.

    `detail="low"` keeps the thumbnail alone.
    """
    thumbnail = np.asarray(fit_to_tile(image, spec))[None]
    if detail == "low" or not spec.candidate_resolutions:
        layout = VisionLayout(tile_queries=(spec.image_queries,), newline=spec.unpad)
        return vision_input("image", layout, thumbnail, spec), thumbnail

    canvas_height, canvas_width = select_best_resolution(image.size, spec.candidate_resolutions)
    canvas = _letterbox(image, _resized_to_fill(image.size, canvas_height, canvas_width), spec)
    tile_rows, tile_columns = canvas_height // spec.tile_size, canvas_width // spec.tile_size
    tiles = np.concatenate([thumbnail, _cut(canvas, tile_rows, tile_columns, spec.tile_size)])
    layout = VisionLayout(
        tile_queries=(spec.image_queries,) * len(tiles),
        local_grid=(tile_rows, tile_columns),
        kept=kept_features(image.size, tile_rows, tile_columns, spec),
        newline=spec.unpad,
    )
    return vision_input("image", layout, tiles, spec), tiles


def select_best_resolution(
    size: tuple[int, int], candidates: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The (height, width) that keeps most of a (width, height) picture and wastes least.

    Candidates are tried in order and the first wins a tie, as in the official code.
    """
    width, height = size
    best, most_effective, least_wasted = candidates[0], 0, math.inf
    for canvas_height, canvas_width in candidates:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_height * canvas_width - effective
        if effective > most_effective or (effective == most_effective and wasted < least_wasted):
            best, most_effective, least_wasted = (canvas_height, canvas_width), effective, wasted
    return best


def kept_features(
    size: tuple[int, int], tile_rows: int, tile_columns: int, spec: VisionSpec
) -> tuple[int, int, int, int]:
    """The (top, left, rows, columns) of the local feature map that shows picture, not padding.

    Integer maths of the official `unpad_image`: what it drops, it drops on both sides.
    """
    side = math.isqrt(spec.image_queries)
    rows, columns = tile_rows * side, tile_columns * side
    if not spec.unpad:
        return 0, 0, rows, columns
    width, height = size
    if width / height > columns / rows:
        top = (rows - int(height * (columns / width))) // 2
        return top, 0, rows - 2 * top, columns
    left = (columns - int(width * (rows / height))) // 2
    return 0, left, rows, columns - 2 * left


def fit_to_tile(image: Image.Image, spec: VisionSpec) -> Image.Image:
    """The whole picture in one tile: letterboxed on the pad colour, or squashed if configured."""
    side = spec.tile_size
    width, height = image.size
    if not spec.pad_to_square:
        return image.resize((side, side), _resample(spec))
    if width > height:
        size = side, math.ceil(height / width * side)
    else:
        size = math.ceil(width / height * side), side
    return Image.fromarray(_letterbox(image, (*size, side, side), spec))


def vision_input(
    kind: MediaKind, layout: VisionLayout, tiles: Tiles, spec: VisionSpec
) -> VisionInput:
    """A medium with its digest: SHA-256 over tiles and all settings that shape its features."""
    settings = repr(
        (kind, layout, tiles.shape, spec.image_mean, spec.image_std, spec.rescale_factor)
    )
    digest = hashlib.sha256(len(settings).to_bytes(8, "big") + settings.encode())
    digest.update(np.ascontiguousarray(tiles).data)
    return VisionInput(kind=kind, layout=layout, digest=digest.hexdigest())


def _resized_to_fill(
    size: tuple[int, int], canvas_height: int, canvas_width: int
) -> tuple[int, int, int, int]:
    """(new width, new height, canvas width, canvas height) of the largest fit into the canvas."""
    width, height = size
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        new_height = min(math.ceil(height * scale_width), canvas_height)
        return canvas_width, new_height, canvas_width, canvas_height
    new_width = min(math.ceil(width * scale_height), canvas_width)
    return new_width, canvas_height, canvas_width, canvas_height


def _letterbox(image: Image.Image, sizes: tuple[int, int, int, int], spec: VisionSpec) -> Tiles:
    """Resize to (new width, new height), centred on a pad-coloured (canvas width, height)."""
    new_width, new_height, canvas_width, canvas_height = sizes
    canvas = np.empty((canvas_height, canvas_width, 3), dtype=np.uint8)
    canvas[:] = spec.pad_colour
    top, left = (canvas_height - new_height) // 2, (canvas_width - new_width) // 2
    resized = image.resize((new_width, new_height), _resample(spec))
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas


def _cut(canvas: Tiles, tile_rows: int, tile_columns: int, side: int) -> Tiles:
    """Row-major tiles [rows * columns, side, side, 3] of [rows * side, columns * side, 3]."""
    grid = canvas.reshape(tile_rows, side, tile_columns, side, 3)
    return grid.swapaxes(1, 2).reshape(tile_rows * tile_columns, side, side, 3)


def _resample(spec: VisionSpec) -> Image.Resampling:
    return Image.Resampling(spec.resample)
