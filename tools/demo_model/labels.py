"""What every patch and every output token of a tile ought to know about the object it shows.

The label picture goes through the very same cutting as the picture, with nearest neighbour, so
that both agree to the pixel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.core import Tiles, VisionInput, VisionSpec
from server.vision.frames import video_tiles
from server.vision.tiles import image_tiles
from tools.demo_model.scenes import COLOURS, PLACES, SHAPES, Clip, Item, Scene

Labels = npt.NDArray[np.int8]

NUM_BINS = 8
CODE_LENGTH = 0.5
# shape (0 ground, 1.. shapes, 5 digit), colour, digit, place, x bin, y bin, number's four digits
CLASSES = (6, 11, 11, 6, NUM_BINS, NUM_BINS, 11, 11, 11, 11)
NUM_CODES = 15  # 0 ground, 1..4 items, 10..13 digits
PLACE_POINTS = np.array(list(PLACES.values()))
SHAPE_NAMES, COLOUR_NAMES, PLACE_NAMES = list(SHAPES), list(COLOURS), list(PLACES)

# One grid at most: tiles of a larger canvas would each speak of places within themselves, and
# telling those from the thumbnail's took the decoder far longer than the resolution was worth.
SPEC = VisionSpec(
    tile_size=112,
    candidate_resolutions=((112, 112),),
    image_queries=16,
    video_slow_queries=16,
    video_fast_queries=4,
    first_last_frames_slow=False,
    max_canvases=12,
    image_token_id=0,
    video_token_id=1,
)
NEAREST = replace(SPEC, resample=int(Image.Resampling.NEAREST))


def counts_of(tiles: Tiles, cells: int) -> npt.NDArray[np.int32]:
    """How often each code occurs in each of the squares: [tiles, cells * cells, codes]."""
    codes = tiles[:, ::2, ::2, 0]
    codes = np.where(codes >= NUM_CODES, 0, codes)
    count, side, _ = codes.shape
    step = side // cells
    squares = codes.reshape(count, cells, step, cells, step).swapaxes(2, 3)
    squares = squares.reshape(count * cells * cells, step * step).astype(np.int32)
    squares += np.arange(len(squares), dtype=np.int32)[:, None] * NUM_CODES
    flat = np.bincount(squares.ravel(), minlength=count * cells * cells * NUM_CODES)
    return flat.reshape(count, cells * cells, NUM_CODES).astype(np.int32)


def winners(counts: npt.NDArray[np.int32], least: int) -> npt.NDArray[np.int64]:
    """The object that covers most of a square, 0 where none covers at least that many points."""
    objects = counts.copy()
    objects[..., 0] = 0
    best = objects.argmax(-1)
    return np.where(objects.max(-1) >= least, best, 0)


def centroids(tiles: Tiles) -> npt.NDArray[np.float64]:
    """[tiles, codes, 2]: where each object's visible middle is, x and y in 0..1 of the tile."""
    codes = tiles[:, ::4, ::4, 0]
    codes = np.where(codes >= NUM_CODES, 0, codes).astype(np.int64)
    count, side, _ = codes.shape
    keys = (codes + np.arange(count)[:, None, None] * NUM_CODES).ravel()
    size = count * NUM_CODES
    total = np.maximum(np.bincount(keys, minlength=size), 1)
    ramp = np.arange(side, dtype=np.float64)
    across = np.broadcast_to(ramp[None, None, :], codes.shape).ravel()
    down = np.broadcast_to(ramp[None, :, None], codes.shape).ravel()
    x = np.bincount(keys, weights=across, minlength=size) / total
    y = np.bincount(keys, weights=down, minlength=size) / total
    return (np.stack([x, y], -1) / side).reshape(count, NUM_CODES, 2)


def describe_codes(items: tuple[Item, ...], scene: Scene | None) -> Labels:
    """[codes, fields] with everything but the bins; -1 where there is nothing to learn."""
    table = np.full((NUM_CODES, len(CLASSES)), -1, dtype=np.int8)
    table[0, 0] = 0
    for index, item in enumerate(items):
        row = table[index + 1]
        row[0] = SHAPE_NAMES.index(item.shape) + 1
        row[1] = COLOUR_NAMES.index(item.colour) + 1
        row[3] = PLACE_NAMES.index(item.place) + 1 if item.place else -1
    if scene is not None and scene.number is not None:
        number = scene.number
        for index, digit in enumerate(number.digits):
            row = table[10 + index]
            row[0] = len(SHAPES) + 1
            row[1] = COLOUR_NAMES.index(number.colour) + 1
            row[2] = int(digit) + 1
            row[3] = PLACE_NAMES.index(number.place) + 1
            row[6:10] = 0
            row[6 : 6 + len(number.digits)] = [int(value) + 1 for value in number.digits]
    return table


def look_up(tiles: Tiles, table: Labels, cells: int, whole: npt.NDArray[np.bool_]) -> Labels:
    """[tiles, cells * cells, fields]. A tile that shows only a part of the picture speaks of what
    it shows: the place within itself, the digits that are visible."""
    chosen = winners(counts_of(tiles, cells), 4 if cells == 8 else 5)
    found = table[chosen].copy()
    middles = centroids(tiles)
    middle = np.take_along_axis(
        middles[:, None], np.broadcast_to(chosen[..., None, None], (*chosen.shape, 1, 2)), axis=2
    )[:, :, 0]
    found[..., 4:6] = (middle * NUM_BINS).astype(np.int8)
    found[chosen == 0, 4:6] = -1
    for index in np.flatnonzero(~whole):
        gaps = np.abs(middle[index][:, None] - PLACE_POINTS[None]).sum(-1)
        asked = found[index, :, 3] > 0
        found[index, asked, 3] = gaps.argmin(-1)[asked] + 1
        shown = counts_of(tiles[index : index + 1], 1)[0, 0]
        if shown[10:14].max() > 0:
            visible = [
                int(table[10 + digit, 2])
                for digit in range(4)
                if shown[10 + digit] > 0.4 * shown[10:14].max()
            ]
            row = np.zeros(4, dtype=np.int8)
            row[: len(visible)] = visible
            found[index, found[index, :, 2] > 0, 6:10] = row
    return found


def picture(
    scene: Scene, *, detail: Literal["low", "high"] = "high", with_tiles: bool = True
) -> tuple[VisionInput, Tiles, Tiles, Labels]:
    """The medium, its tiles, the tiles of label codes, and what each code means."""
    medium, codes = image_tiles(scene.labels.convert("RGB"), NEAREST, detail=detail)
    tiles = image_tiles(scene.image, SPEC, detail=detail)[1] if with_tiles else codes
    return medium, tiles, codes, describe_codes(scene.items, scene)


def clip_frames(
    clip: Clip, *, with_tiles: bool = True
) -> tuple[VisionInput, Tiles, Tiles, list[Labels]]:
    """The medium, its tiles, the tiles of label codes, and what each code means in each frame."""
    medium, codes = video_tiles([label.convert("RGB") for label in clip.labels], NEAREST)
    tiles = video_tiles(clip.frames, SPEC)[1] if with_tiles else codes
    return medium, tiles, codes, [describe_codes((item,), None) for item in clip.items]


def code_book(hidden_size: int) -> npt.NDArray[np.float32]:
    """The direction of each label in the embedding space: orthogonal rows [labels, hidden].

    An output token is trained to be the sum of its labels' directions, so that the decoder can
    learn from such sums before the tower can see.
    """
    rows = np.random.default_rng(7).standard_normal((hidden_size, hidden_size))
    basis, _ = np.linalg.qr(rows)
    return (CODE_LENGTH * basis[: sum(CLASSES)]).astype(np.float32)


def many_hot(wanted: Labels) -> npt.NDArray[np.float32]:
    """[.., fields] -> [.., labels], 1 for every label that holds."""
    parts = [
        (wanted[..., index, None] == np.arange(count)).astype(np.float32)
        for index, count in enumerate(CLASSES)
    ]
    return np.concatenate(parts, -1)
