"""Frames to tiles: how many, when, how many tokens each, and how they are fitted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.core import VisionSpec
from server.errors import InvalidRequest
from server.media.video import decode_video
from server.vision.frames import (
    frame_queries,
    sample_times,
    video_layout,
    video_tiles,
    wanted_window,
)
from server.vision.tiles import fit_to_tile
from tests.clips import clip
from tests.limits import limits

SPEC = VisionSpec(
    tile_size=28,
    candidate_resolutions=((28, 28), (28, 56)),
    image_queries=81,
    video_slow_queries=81,
    video_fast_queries=9,
    first_last_frames_slow=False,
    max_canvases=12,
    image_token_id=100271,
    video_token_id=100270,
)
PAD = [127, 127, 127]


def frames(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, (index % 256, 10, 200)) for index in range(count)]


@pytest.mark.parametrize(
    ("num_frames", "tokens"),
    [
        (1, 81),
        (2, 90),
        (8, 144),
        (9, 153),
        (10, 234),
        (16, 288),
        (32, 576),
        (64, 1152),
        (100, 1764),
        (108, 1836),
    ],
)
def test_the_token_table(num_frames: int, tokens: int) -> None:
    medium, tiles = video_tiles(frames(num_frames), SPEC)
    assert (medium.kind, medium.num_tokens) == ("video", tokens)
    assert tiles.shape == (num_frames, 28, 28, 3) and tiles.dtype == np.uint8
    layout = medium.layout
    assert layout.local_grid is None and layout.kept is None and not layout.newline


def test_the_first_frame_of_each_canvas_is_slow() -> None:
    """The worked list of the facts: six full canvases and one of two frames."""
    queries = frame_queries(56, SPEC)
    offsets = [sum(queries[:index]) for index in range(57)]
    assert [index for index, count in enumerate(queries) if count == 81] == list(range(0, 56, 9))
    assert set(queries) == {81, 9} and offsets[56] == 6 * 153 + 90


@given(num_frames=st.integers(1, 108), per_canvas=st.integers(1, 9))
def test_tokens_canvas_by_canvas(num_frames: int, per_canvas: int) -> None:
    spec = replace(SPEC, frames_per_canvas=per_canvas)
    total = 0
    for start in range(0, num_frames, per_canvas):
        total += 81 + 9 * (min(per_canvas, num_frames - start) - 1)
    assert sum(frame_queries(num_frames, spec)) == total


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [(1, (81,)), (2, (81, 81)), (3, (81, 9, 81)), (11, (81, *[9] * 9, 81))],
)
def test_first_and_last_frame_slow(num_frames: int, expected: tuple[int, ...]) -> None:
    assert frame_queries(num_frames, replace(SPEC, first_last_frames_slow=True)) == expected


def test_full_length_with_first_and_last_slow() -> None:
    queries = frame_queries(108, replace(SPEC, first_last_frames_slow=True))
    assert sum(queries) == 1116


@pytest.mark.parametrize(
    ("duration_s", "count"),
    [
        (0.0, 1),
        (0.04, 1),
        (0.5, 1),
        (0.79, 1),
        (0.8, 2),
        (1.0, 2),
        (1.2, 3),  # 1.2 / 0.4 is a hair under 3 in floats
        (1.2 - 1e-9, 3),
        (2.0, 5),
        (5.0, 12),
        (43.1, 107),
        (43.2, 108),
        (44.0, 108),
        (3600.0, 108),
    ],
)
def test_how_many_moments(duration_s: float, count: int) -> None:
    times = sample_times(duration_s, SPEC)
    assert len(times) == count
    assert times == pytest.approx([(i + 0.5) * duration_s / count for i in range(count)])


@given(duration_s=st.floats(0, 1e6), max_canvases=st.integers(1, 12))
def test_moments_lie_inside_and_apart(duration_s: float, max_canvases: int) -> None:
    times = sample_times(duration_s, replace(SPEC, max_canvases=max_canvases))
    assert 1 <= len(times) <= max_canvases * 9
    assert all(math.isfinite(time) and 0 <= time <= duration_s for time in times)
    assert times == sorted(times)
    if len(times) > 1:
        assert min(b - a for a, b in itertools.pairwise(times)) >= 0.4 - 1e-6


def test_a_frame_is_letterboxed_into_its_cell() -> None:
    _, tiles = video_tiles([Image.new("RGB", (40, 20), (9, 8, 7))], SPEC)
    assert (tiles[0, 7:21] == [9, 8, 7]).all()
    assert (tiles[0, :7] == PAD).all() and (tiles[0, 21:] == PAD).all()
    _, tiles = video_tiles([Image.new("RGB", (20, 40), (9, 8, 7))], SPEC)
    assert (tiles[0, :, 7:21] == [9, 8, 7]).all()
    assert (tiles[0, :, :7] == PAD).all() and (tiles[0, :, 21:] == PAD).all()


def test_frames_keep_their_order() -> None:
    _, tiles = video_tiles(frames(20, (28, 28)), SPEC)
    assert tiles[:, 0, 0, 0].tolist() == list(range(20))


def test_fitting_while_decoding_gives_the_same_tiles() -> None:
    """The promise between the decoder and this room: small frames early, same answer."""
    for data in (clip(20), clip(8, rotation=90, scale=2)):
        times = partial(sample_times, spec=SPEC)
        full = decode_video(data, limits(), sample_times=times, fit=lambda frame: frame)
        small = decode_video(
            data, limits(), sample_times=times, fit=partial(fit_to_tile, spec=SPEC)
        )
        assert {frame.size for frame in small.frames} == {(28, 28)}
        expected, expected_tiles = video_tiles(full.frames, SPEC)
        medium, tiles = video_tiles(small.frames, SPEC)
        assert np.array_equal(tiles, expected_tiles)
        assert medium == expected


@pytest.mark.parametrize(
    ("num_frames", "num_tokens"),
    [(1, 81), (2, 90), (8, 144), (9, 153), (10, 234), (64, 1152), (108, 1836), (300, 1836)],
)
def test_clips_at_two_frames_a_second_cost_what_the_table_says(
    num_frames: int, num_tokens: int
) -> None:
    video = decode_video(
        clip(num_frames),
        limits(),
        sample_times=partial(sample_times, spec=SPEC),
        fit=partial(fit_to_tile, spec=SPEC),
    )
    assert video_tiles(video.frames, SPEC)[0].num_tokens == num_tokens


def test_the_digest() -> None:
    medium, _ = video_tiles(frames(11), SPEC)
    again, _ = video_tiles(frames(11), SPEC)
    assert medium.digest == again.digest
    variants = [
        medium,
        video_tiles(frames(9), SPEC)[0],
        video_tiles(frames(11)[::-1], SPEC)[0],
        video_tiles(frames(11, (30, 40)), SPEC)[0],
        video_tiles(frames(11), replace(SPEC, first_last_frames_slow=True))[0],
        video_tiles(frames(11), replace(SPEC, video_fast_queries=4))[0],
        video_tiles(frames(11), replace(SPEC, image_std=(0.4, 0.5, 0.5)))[0],
    ]
    assert len({variant.digest for variant in variants}) == len(variants)


# What a request may ask for.

seconds = st.floats(0, 5000)


@given(
    duration_s=seconds,
    fps=st.none() | st.floats(0.01, 100),
    num_frames=st.none() | st.integers(1, 400),
    max_frames=st.none() | st.integers(1, 400),
    start_s=st.none() | seconds,
    length_s=st.none() | seconds,
)
def test_whatever_is_asked_for_lies_in_the_window_and_within_the_limits(
    duration_s: float,
    fps: float | None,
    num_frames: int | None,
    max_frames: int | None,
    start_s: float | None,
    length_s: float | None,
) -> None:
    end_s = None if length_s is None else (start_s or 0.0) + length_s
    times = partial(
        sample_times,
        duration_s,
        SPEC,
        fps=fps,
        num_frames=num_frames,
        max_frames=max_frames,
        start_s=start_s,
        end_s=end_s,
    )
    if start_s and start_s >= duration_s:
        with pytest.raises(InvalidRequest, match="start_s"):
            times()
        return
    first, last = wanted_window(duration_s, start_s=start_s, end_s=end_s)
    assert 0 <= first <= last <= duration_s
    moments = times()
    assert moments == sorted(moments)
    assert all(first <= moment <= last for moment in moments)
    limit = min(108, max_frames or 108)
    if num_frames is not None:
        assert len(moments) == min(num_frames, limit)
    else:
        wanted = (last - first) * (fps or 2.5)
        assert abs(len(moments) - min(max(wanted, 1), limit)) < 1 + 1e-3
        assert len(moments) <= max(wanted, 1) + 1e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 1.0}, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5]),
        ({"fps": 0.01}, [5.0]),
        ({"num_frames": 2}, [2.5, 7.5]),
        ({"num_frames": 4, "max_frames": 2}, [2.5, 7.5]),
        ({"fps": 1.0, "start_s": 8.0}, [8.5, 9.5]),
        ({"num_frames": 2, "start_s": 2.0, "end_s": 4.0}, [2.5, 3.5]),
        ({"num_frames": 1, "end_s": 1e9}, [5.0]),
        ({"num_frames": 1, "start_s": 3.0, "end_s": 3.0}, [3.0]),
    ],
)
def test_moments_asked_for(options: dict[str, Any], expected: list[float]) -> None:
    assert sample_times(10.0, SPEC, **options) == pytest.approx(expected)


def test_windows_that_are_none() -> None:
    assert wanted_window(0.0, start_s=0.0, end_s=None) == (0.0, 0.0)
    for start_s, end_s in ((10.0, None), (1e9, None), (3.0, 2.0)):
        with pytest.raises(InvalidRequest) as caught:
            wanted_window(10.0, start_s=start_s, end_s=end_s)
        assert caught.value.code == "invalid_value"


@given(num_frames=st.integers(1, 108))
def test_the_layout_is_known_before_decoding(num_frames: int) -> None:
    medium, _ = video_tiles(frames(num_frames), SPEC)
    assert medium.layout == video_layout(num_frames, SPEC)
