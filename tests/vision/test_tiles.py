"""Pictures to tiles: the official token table, and every step against a reference written apart."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from server.core import Tiles, VisionSpec
from server.vision.tiles import (
    fit_to_tile,
    image_layout,
    image_tiles,
    image_token_range,
    kept_features,
    largest_resize,
    max_tiles,
    select_best_resolution,
    vision_input,
)

PAD = (127, 127, 127)
COLOUR = (200, 40, 90)


def candidates(side: int, max_tiles: int, *, with_1x1: bool = True) -> tuple[tuple[int, int], ...]:
    return tuple(
        (rows * side, columns * side)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles + 1)
        if rows * columns <= max_tiles and (with_1x1 or rows * columns > 1)
    )


OFFICIAL = VisionSpec(
    tile_size=378,
    candidate_resolutions=candidates(378, 9),
    image_queries=81,
    video_slow_queries=81,
    video_fast_queries=9,
    first_last_frames_slow=False,
    max_canvases=12,
    image_token_id=100271,
    video_token_id=100270,
)
SMALL = replace(OFFICIAL, tile_size=14, candidate_resolutions=candidates(14, 9))

sides = st.integers(1, 3000)


def canvas_of(tiles: Tiles, rows: int, columns: int) -> np.ndarray:
    """The local tiles put together again."""
    return np.concatenate(
        [np.concatenate(list(tiles[r * columns : (r + 1) * columns]), axis=1) for r in range(rows)]
    )


def shown_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what is not of the pad colour."""
    inside = (pixels != PAD).any(axis=-1)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    assert inside[top : rows[-1] + 1, left : columns[-1] + 1].all()
    return top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1


TABLE = [
    # (width, height), grid, resized local (h, w), thumbnail (h, w), feature rows x columns, tokens
    ((224, 224), (1, 1), (378, 378), (378, 378), (9, 9), 171),
    ((378, 378), (1, 1), (378, 378), (378, 378), (9, 9), 171),
    ((50, 37), (1, 1), (280, 378), (280, 378), (7, 9), 151),
    ((640, 480), (2, 2), (567, 756), (284, 378), (14, 18), 347),
    ((800, 600), (2, 3), (756, 1008), (284, 378), (18, 25), 549),
    ((1024, 768), (3, 3), (851, 1134), (284, 378), (21, 27), 669),
    ((4000, 3000), (3, 3), (851, 1134), (284, 378), (21, 27), 669),
    ((1920, 1080), (2, 4), (756, 1344), (213, 378), (18, 32), 675),
    ((1080, 1920), (4, 2), (1344, 756), (378, 213), (32, 18), 689),
    ((1000, 3000), (4, 2), (1512, 504), (378, 126), (36, 12), 549),
    ((3000, 1000), (2, 4), (504, 1512), (126, 378), (12, 36), 525),
    ((1134, 1134), (3, 3), (1134, 1134), (378, 378), (27, 27), 837),
]


@pytest.mark.parametrize(("size", "grid", "local", "thumbnail", "features", "tokens"), TABLE)
def test_the_token_table(
    size: tuple[int, int],
    grid: tuple[int, int],
    local: tuple[int, int],
    thumbnail: tuple[int, int],
    features: tuple[int, int],
    tokens: int,
) -> None:
    medium, tiles = image_tiles(Image.new("RGB", size, COLOUR), OFFICIAL)
    assert (medium.kind, medium.num_tokens) == ("image", tokens)
    assert tiles.shape == (1 + grid[0] * grid[1], 378, 378, 3) and tiles.dtype == np.uint8
    layout = medium.layout
    assert layout.tile_queries == (81,) * len(tiles)
    assert layout.local_grid == grid and layout.newline
    assert layout.kept is not None and layout.kept[2:] == features

    height, width = thumbnail
    assert shown_box(tiles[0]) == ((378 - height) // 2, (378 - width) // 2, height, width)
    canvas_height, canvas_width = grid[0] * 378, grid[1] * 378
    height, width = local
    expected = ((canvas_height - height) // 2, (canvas_width - width) // 2, height, width)
    assert shown_box(canvas_of(tiles[1:], *grid)) == expected


def test_without_a_grid_of_one_tile() -> None:
    spec = replace(OFFICIAL, candidate_resolutions=candidates(378, 9, with_1x1=False))
    medium, _ = image_tiles(Image.new("RGB", (224, 224)), spec)
    assert (medium.layout.local_grid, medium.num_tokens) == ((1, 2), 180)


def test_the_candidates_are_those_of_the_facts() -> None:
    assert len(candidates(378, 9)) == 23 and len(candidates(378, 9, with_1x1=False)) == 22
    assert candidates(378, 9)[:2] == ((378, 378), (378, 756))


@given(width=sides, height=sides, max_tiles=st.integers(1, 9))
def test_the_best_resolution(width: int, height: int, max_tiles: int) -> None:
    """Most of the picture kept, then least of the canvas wasted, then first in the list."""
    options = candidates(378, max_tiles)

    def rank(option: tuple[int, int]) -> tuple[int, int]:
        scale = min(option[1] / width, option[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, option[0] * option[1] - kept

    assert select_best_resolution((width, height), options) == min(options, key=rank)


@given(width=sides, height=sides, grid=st.sampled_from(candidates(1, 9)), side=st.integers(1, 9))
def test_kept_features(width: int, height: int, grid: tuple[int, int], side: int) -> None:
    """Against the official way: crop a feature map with slices, on the exact proportions."""
    spec = replace(OFFICIAL, image_queries=side**2)
    rows, columns = grid[0] * side, grid[1] * side
    # at an exact whole number the official float maths may fall on either side
    assume(Fraction(height * columns, width).denominator > 1 or height * columns == rows * width)
    assume(Fraction(width * rows, height).denominator > 1 or height * columns == rows * width)
    features = np.arange(rows * columns).reshape(rows, columns)
    if Fraction(width, height) > Fraction(columns, rows):
        dropped = (rows - height * columns // width) // 2
        cropped = features[dropped : rows - dropped]
    else:
        dropped = (columns - width * rows // height) // 2
        cropped = features[:, dropped : columns - dropped]
    top, left, num_rows, num_columns = kept_features((width, height), *grid, spec)
    assert np.array_equal(features[top : top + num_rows, left : left + num_columns], cropped)
    assert (num_rows, num_columns) == cropped.shape


@given(width=st.integers(1, 400), height=st.integers(1, 400), max_tiles=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_any_picture(width: int, height: int, max_tiles: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    spec = replace(SMALL, candidate_resolutions=candidates(14, max_tiles))
    medium, tiles = image_tiles(Image.new("RGB", (width, height), COLOUR), spec)
    layout = medium.layout
    assert layout.local_grid is not None and layout.kept is not None
    rows, columns = layout.local_grid
    assert tiles.shape == (1 + rows * columns, 14, 14, 3)
    assert len(layout.tile_queries) == len(tiles)
    top, left, kept_rows, kept_columns = layout.kept
    assert top >= 0 and top + kept_rows <= 9 * rows
    assert left >= 0 and left + kept_columns <= 9 * columns
    assert kept_rows == 9 * rows or kept_columns == 9 * columns  # padding is on two sides only
    assert kept_rows > 0 and kept_columns > 0
    assert medium.num_tokens == 81 + kept_rows * (kept_columns + 1)
    # centred, touching two opposite edges
    for pixels in (tiles[0], canvas_of(tiles[1:], rows, columns)):
        box_top, box_left, box_height, box_width = shown_box(pixels)
        assert box_top == (pixels.shape[0] - box_height) // 2
        assert box_left == (pixels.shape[1] - box_width) // 2
        assert box_height == pixels.shape[0] or box_width == pixels.shape[1]


def test_tiles_are_the_picture_cut_row_by_row() -> None:
    """A picture that fills its canvas is not resampled: each tile is a plain crop of it."""
    noise = np.random.default_rng(1).integers(0, 256, (2 * 14, 3 * 14, 3), dtype=np.uint8)
    medium, tiles = image_tiles(Image.fromarray(noise), SMALL)
    assert medium.layout.local_grid == (2, 3)
    for row in range(2):
        for column in range(3):
            crop = noise[row * 14 : (row + 1) * 14, column * 14 : (column + 1) * 14]
            assert np.array_equal(tiles[1 + row * 3 + column], crop)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_the_picture_is_resized_once_with_the_configured_filter(
    resample: Image.Resampling,
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    spec = replace(OFFICIAL, resample=int(resample))
    _, tiles = image_tiles(picture, spec)
    canvas = canvas_of(tiles[1:], 2, 3)
    local = np.asarray(picture.resize((1008, 756), resample))
    assert np.array_equal(canvas[:, 63 : 63 + 1008], local)
    thumbnail = np.asarray(picture.resize((378, 284), resample))
    assert np.array_equal(tiles[0][47 : 47 + 284], thumbnail)


@pytest.mark.parametrize("size", [(800, 600), (600, 800), (37, 50), (378, 378)])
def test_low_detail_is_the_thumbnail_and_a_newline(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, COLOUR)
    low, low_tiles = image_tiles(picture, OFFICIAL, detail="low")
    _, high_tiles = image_tiles(picture, OFFICIAL)
    assert low.num_tokens == 82
    assert (low.layout.tile_queries, low.layout.local_grid, low.layout.newline) == (
        (81,),
        None,
        True,
    )
    assert np.array_equal(low_tiles, high_tiles[:1])


def test_without_candidates_there_is_the_thumbnail_only() -> None:
    spec = replace(OFFICIAL, candidate_resolutions=())
    medium, tiles = image_tiles(Image.new("RGB", (800, 600)), spec)
    assert (medium.num_tokens, len(tiles)) == (82, 1)


def test_without_unpad_the_padding_is_kept_and_there_are_no_newlines() -> None:
    spec = replace(OFFICIAL, unpad=False)
    medium, _ = image_tiles(Image.new("RGB", (800, 600)), spec)
    assert medium.layout.kept == (0, 0, 18, 27)
    assert medium.num_tokens == 81 + 18 * 27
    low, _ = image_tiles(Image.new("RGB", (800, 600)), spec, detail="low")
    assert low.num_tokens == 81


def test_without_padding_the_thumbnail_is_squashed() -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    fitted = fit_to_tile(picture, replace(SMALL, pad_to_square=False))
    expected = picture.resize((14, 14), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(fitted), np.asarray(expected))


def test_the_pad_colour_follows_the_mean() -> None:
    spec = replace(SMALL, image_mean=(0.1, 0.5, 1.0))
    fitted = np.asarray(fit_to_tile(Image.new("RGB", (28, 14), COLOUR), spec))
    assert fitted[0, 0].tolist() == [25, 127, 255]
    assert fitted[7, 7].tolist() == list(COLOUR)


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (16384, 82), (1, 1), (3, 1)])
def test_extreme_shapes_still_show_something(size: tuple[int, int]) -> None:
    medium, tiles = image_tiles(Image.new("RGB", size, COLOUR), OFFICIAL)
    for tile in tiles[:1]:
        assert (tile == COLOUR).all(axis=-1).any()
    assert medium.layout.local_grid is not None
    assert (canvas_of(tiles[1:], *medium.layout.local_grid) == COLOUR).all(axis=-1).any()
    assert medium.num_tokens > 81


def test_the_thumbnails_other_side_is_rounded_up() -> None:
    for width, height in ((1000, 333), (333, 1000), (379, 378), (640, 481)):
        box = shown_box(
            np.asarray(fit_to_tile(Image.new("RGB", (width, height), COLOUR), OFFICIAL))
        )
        shorter = math.ceil(min(width, height) / max(width, height) * 378)
        assert sorted(box[2:]) == [shorter, 378]


def test_equal_pictures_have_equal_digests() -> None:
    picture = Image.new("RGB", (80, 60), COLOUR)
    first, _ = image_tiles(picture, SMALL)
    again, _ = image_tiles(picture.copy(), replace(SMALL))
    assert first.digest == again.digest
    assert len(first.digest) == 64 and int(first.digest, 16) >= 0


def test_the_digest_tells_apart_what_the_model_would_see_differently() -> None:
    picture = Image.new("RGB", (80, 60), COLOUR)
    other = picture.copy()
    other.putpixel((40, 30), (0, 0, 0))
    variants = [
        image_tiles(picture, SMALL),
        image_tiles(picture, SMALL, detail="low"),
        image_tiles(other, SMALL),
        image_tiles(picture.transpose(Image.Transpose.ROTATE_90), SMALL),
        image_tiles(picture, replace(SMALL, image_mean=(0.4, 0.5, 0.5))),
        image_tiles(picture, replace(SMALL, image_std=(0.4, 0.5, 0.5))),
        image_tiles(picture, replace(SMALL, rescale_factor=1 / 127)),
        image_tiles(picture, replace(SMALL, image_queries=16)),
        image_tiles(picture, replace(SMALL, unpad=False)),
        image_tiles(picture, replace(SMALL, candidate_resolutions=candidates(14, 4))),
    ]
    digests = [medium.digest for medium, _ in variants]
    assert len(set(digests)) == len(digests)


def test_the_digest_depends_on_kind_and_shape() -> None:
    medium, tiles = image_tiles(Image.new("RGB", (28, 14), COLOUR), SMALL)
    as_video = vision_input("video", medium.layout, tiles, SMALL)
    assert as_video.digest != medium.digest
    reshaped = vision_input("image", medium.layout, tiles.reshape(-1, 7, 28, 3), SMALL)
    assert reshaped.digest != medium.digest
    one = tiles.copy()
    one[-1, -1, -1, -1] ^= 1
    assert vision_input("image", medium.layout, one, SMALL).digest != medium.digest


def test_a_tile_that_is_not_contiguous_has_the_digest_of_its_copy() -> None:
    medium, tiles = image_tiles(Image.new("RGB", (28, 14), COLOUR), SMALL)
    turned = np.asfortranarray(tiles)
    assert vision_input("image", medium.layout, turned, SMALL).digest == medium.digest


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    max_tiles_of_spec=st.integers(1, 9),
    with_1x1=st.booleans(),
    detail=st.sampled_from(["low", "high"]),
    max_grids=st.none() | st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_the_layout_is_known_before_decoding(
    width: int,
    height: int,
    max_tiles_of_spec: int,
    with_1x1: bool,
    detail: Literal["low", "high"],
    max_grids: int | None,
) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    options = candidates(14, max_tiles_of_spec, with_1x1=with_1x1)
    spec = replace(SMALL, candidate_resolutions=options)
    picture = Image.new("RGB", (width, height), COLOUR)
    medium, tiles = image_tiles(picture, spec, detail=detail, max_grids=max_grids)
    layout = image_layout((width, height), spec, detail=detail, max_grids=max_grids)
    assert medium.layout == layout
    assert len(tiles) == len(layout.tile_queries)
    assert len(tiles) <= max_tiles(spec, detail=detail, max_grids=max_grids)
    least, most = image_token_range(spec)
    assert least <= layout.num_tokens <= most
    if max_grids is not None:
        assert len(tiles) - 1 <= max_grids
    if layout.local_grid is None:
        assert medium.num_tokens == 82
        assert detail == "low" or all(h * w // 196 > (max_grids or 9) for h, w in options)
    largest = largest_resize((width, height), spec, detail=detail, max_grids=max_grids)
    local = [] if layout.local_grid is None else [canvas_of(tiles[1:], *layout.local_grid)]
    boxes = [shown_box(pixels) for pixels in (tiles[0], *local)]
    assert largest == (max(box[3] for box in boxes), max(box[2] for box in boxes))


def test_more_grids_than_there_are_change_nothing() -> None:
    picture = Image.new("RGB", (4000, 3000), COLOUR)
    plain, _ = image_tiles(picture, OFFICIAL)
    assert plain.layout.local_grid == (3, 3)
    for max_grids, grid in ((9, (3, 3)), (12, (3, 3)), (8, (2, 3)), (4, (2, 2)), (1, (1, 1))):
        medium, _ = image_tiles(picture, OFFICIAL, max_grids=max_grids)
        assert medium.layout.local_grid == grid


def test_a_reduced_copy_has_the_true_pictures_layout() -> None:
    """4001 x 2999 halved has another proportion; all but the pixels follows the true size."""
    picture = Image.new("RGB", (4001, 2999), COLOUR)
    reduced = Image.new("RGB", (2001, 1500), COLOUR)
    medium, tiles = image_tiles(picture, OFFICIAL)
    of_reduced, reduced_tiles = image_tiles(reduced, OFFICIAL, size=(4001, 2999))
    assert of_reduced.layout == medium.layout
    assert np.array_equal(reduced_tiles, tiles)
