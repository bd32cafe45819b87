"""Pictures to uint8 tiles: choose the canvas, resize, pad, cut, and count the tokens they become.

The rules are those of the checkpoint's own image processor (the LLaVA-NeXT "anyres" scheme) and
work on uint8 with Pillow, because its antialiased resizing is part of what the model was trained
on. Pure functions of (picture, VisionSpec); nothing here knows where a picture came from.
"""

import hashlib
import math
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from server.core import MediaKind, Tiles, VisionInput, VisionLayout, VisionSpec

Detail = Literal["low", "high"]
Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""


def image_tiles(
    image: Image.Image,
    spec: VisionSpec,
    *,
    detail: Detail = "high",
    max_grids: int | None = None,
    size: Size | None = None,
) -> tuple[VisionInput, Tiles]:
    """Cut an upright RGB picture into its thumbnail and the tiles of its best canvas.

    `detail="low"` keeps the thumbnail alone; `max_grids` bounds the tiles beside it. `size` is the
    picture's true (width, height) where `image` is a reduced copy: all but the pixels follows it.
    """
    size = image.size if size is None else size
    layout = image_layout(size, spec, detail=detail, max_grids=max_grids)
    tiles = np.asarray(fit_to_tile(image, spec, size=size))[None]
    if layout.local_grid is not None:
        canvas = _letterbox(image, _filled_canvas(size, layout.local_grid, spec), spec)
        tiles = np.concatenate([tiles, _cut(canvas, *layout.local_grid, spec.tile_size)])
    return vision_input("image", layout, tiles, spec), tiles


def image_layout(
    size: Size, spec: VisionSpec, *, detail: Detail = "high", max_grids: int | None = None
) -> VisionLayout:
    """What an upright picture of that (width, height) becomes; known before it is decoded."""
    candidates = _candidates(spec, max_grids)
    if detail == "low" or not candidates:
        return VisionLayout(tile_queries=(spec.image_queries,), newline=spec.unpad)
    canvas_height, canvas_width = select_best_resolution(size, candidates)
    tile_rows, tile_columns = canvas_height // spec.tile_size, canvas_width // spec.tile_size
    return VisionLayout(
        tile_queries=(spec.image_queries,) * (1 + tile_rows * tile_columns),
        local_grid=(tile_rows, tile_columns),
        kept=kept_features(size, tile_rows, tile_columns, spec),
        newline=spec.unpad,
    )


def largest_resize(
    size: Size, spec: VisionSpec, *, detail: Detail = "high", max_grids: int | None = None
) -> Size:
    """The largest (width, height) in each direction that `image_tiles` resizes a picture to."""
    width, height, _, _ = _fitted_tile(size, spec)
    layout = image_layout(size, spec, detail=detail, max_grids=max_grids)
    if layout.local_grid is not None:
        local_width, local_height, _, _ = _filled_canvas(size, layout.local_grid, spec)
        width, height = max(width, local_width), max(height, local_height)
    return width, height


def max_tiles(spec: VisionSpec, *, detail: Detail = "high", max_grids: int | None = None) -> int:
    """The most tiles that any picture becomes, its thumbnail included."""
    if detail == "low":
        return 1
    return 1 + max((_num_grids(c, spec) for c in _candidates(spec, max_grids)), default=0)


def image_token_range(spec: VisionSpec) -> tuple[int, int]:
    """The least and the most tokens of a picture.

    The least is its thumbnail alone, the most one that fills the most expensive grid exactly.
    """
    largest = [
        image_layout((width, height), spec).num_tokens
        for height, width in spec.candidate_resolutions
    ]
    least = image_layout((1, 1), spec, detail="low").num_tokens
    return least, max([least, *largest])


def _candidates(spec: VisionSpec, max_grids: int | None) -> tuple[tuple[int, int], ...]:
    if max_grids is None:
        return spec.candidate_resolutions
    return tuple(c for c in spec.candidate_resolutions if _num_grids(c, spec) <= max_grids)


def _num_grids(resolution: tuple[int, int], spec: VisionSpec) -> int:
    return (resolution[0] // spec.tile_size) * (resolution[1] // spec.tile_size)


def select_best_resolution(size: Size, candidates: tuple[tuple[int, int], ...]) -> tuple[int, int]:
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
    size: Size, tile_rows: int, tile_columns: int, spec: VisionSpec
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


def fit_to_tile(image: Image.Image, spec: VisionSpec, *, size: Size | None = None) -> Image.Image:
    """The whole picture in one tile: letterboxed on the pad colour, or squashed if configured.

    `size` is the picture's true size where `image` is a reduced copy.
    """
    sizes = _fitted_tile(image.size if size is None else size, spec)
    return Image.fromarray(_letterbox(image, sizes, spec))


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


def _fitted_tile(size: Size, spec: VisionSpec) -> tuple[int, int, int, int]:
    """(new width, new height, tile width, tile height) of the whole picture in one tile."""
    side = spec.tile_size
    width, height = size
    if not spec.pad_to_square:
        return side, side, side, side
    if width > height:
        return side, math.ceil(height / width * side), side, side
    return math.ceil(width / height * side), side, side, side


def _filled_canvas(
    size: Size, grid: tuple[int, int], spec: VisionSpec
) -> tuple[int, int, int, int]:
    """(new width, new height, canvas width, canvas height) of the largest fit into the canvas."""
    width, height = size
    canvas_height, canvas_width = grid[0] * spec.tile_size, grid[1] * spec.tile_size
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
