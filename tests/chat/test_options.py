from __future__ import annotations

import math
from typing import Any

import pytest

from server.chat.options import (
    FIELDS_OF,
    NO_OPTIONS,
    MediaOptions,
    check_kind,
    check_limits,
    check_together,
    parse_options,
    parse_request_options,
)
from server.core import VisionSpec
from server.errors import InvalidRequest

EVERYTHING: dict[str, Any] = {
    "detail": "low",
    "max_grids": 3,
    "fps": 0.5,
    "max_frames": 9,
    "start_s": 0,
    "end_s": 2.5,
}


def test_all_options_of_a_request() -> None:
    options, budget = parse_request_options(EVERYTHING | {"visual_token_budget": 500.0}, "o")
    assert options == MediaOptions(
        detail="low", max_grids=3, fps=0.5, max_frames=9, start_s=0.0, end_s=2.5
    )
    assert budget == 500
    assert parse_request_options(None, "o") == (NO_OPTIONS, None)
    assert parse_request_options(dict.fromkeys(EVERYTHING), "o") == (NO_OPTIONS, None)


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        ([], "invalid_type", "o"),
        ("x", "invalid_type", "o"),
        ({"frames": 3}, "unknown_parameter", "o.frames"),
        ({"visual_token_budget": 0}, "invalid_value", "o.visual_token_budget"),
        ({"visual_token_budget": True}, "invalid_type", "o.visual_token_budget"),
        ({"max_grids": 0}, "invalid_value", "o.max_grids"),
        ({"max_grids": 1.5}, "invalid_type", "o.max_grids"),
        ({"max_grids": "1"}, "invalid_type", "o.max_grids"),
        ({"num_frames": -1}, "invalid_value", "o.num_frames"),
        ({"max_frames": 2**70}, "invalid_value", "o.max_frames"),
        ({"fps": 0}, "invalid_value", "o.fps"),
        ({"fps": 1e9}, "invalid_value", "o.fps"),
        ({"fps": math.inf}, "invalid_value", "o.fps"),
        ({"fps": math.nan}, "invalid_value", "o.fps"),
        ({"fps": True}, "invalid_type", "o.fps"),
        ({"start_s": -0.1}, "invalid_value", "o.start_s"),
        ({"end_s": 0}, "invalid_value", "o.end_s"),
        ({"start_s": 2, "end_s": 2}, "invalid_value", "o.end_s"),
        ({"fps": 1, "num_frames": 2}, "invalid_value", "o.num_frames"),
        ({"detail": "medium"}, "invalid_value", "o.detail"),
        ({"detail": 1}, "invalid_type", "o.detail"),
    ],
)
def test_faults(value: Any, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request_options(value, "o")
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(("kind", "other"), [("image", "video"), ("video", "image")])
def test_a_part_takes_the_options_of_its_kind_only(kind: Any, other: Any) -> None:
    for name in FIELDS_OF[other]:
        with pytest.raises(InvalidRequest) as caught:
            parse_options({name: 1}, "o", kind=kind)
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", f"o.{name}")
    with pytest.raises(InvalidRequest) as caught:
        parse_options({"visual_token_budget": 1}, "o", kind=kind)
    assert caught.value.code == "unknown_parameter"


def test_what_is_known_late_is_refused_late() -> None:
    check_kind(MediaOptions(fps=1.0), "video", "o")
    with pytest.raises(InvalidRequest) as caught:
        check_kind(MediaOptions(fps=1.0), "image", "o")
    assert caught.value.param == "o.fps"


def test_the_nearer_word_holds() -> None:
    request = MediaOptions(detail="low", fps=1.0, start_s=1.0, max_frames=5)
    assert NO_OPTIONS.over(request) == request
    assert MediaOptions(start_s=0.0, detail="auto").over(request) == MediaOptions(
        detail="auto", fps=1.0, start_s=0.0, max_frames=5
    )
    assert MediaOptions(num_frames=3).over(request).fps is None
    assert MediaOptions(fps=2.0).over(MediaOptions(num_frames=3)) == MediaOptions(fps=2.0)
    with pytest.raises(InvalidRequest):
        check_together(MediaOptions(end_s=1.0).over(request), "o")


def test_nothing_goes_beyond_the_checkpoint(vision: VisionSpec) -> None:
    assert (vision.max_grids, vision.max_frames) == (4, 18)
    check_limits(MediaOptions(max_grids=4, num_frames=18, max_frames=18), vision, "o")
    for name, limit in {"max_grids": 4, "num_frames": 18, "max_frames": 18}.items():
        with pytest.raises(InvalidRequest, match=f"at most {limit}") as caught:
            check_limits(MediaOptions(**{name: limit + 1}), vision, "o")
        assert caught.value.param == f"o.{name}"
