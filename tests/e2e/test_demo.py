"""The demo model that comes with the package, through the real server and the real client: it sees.

A candidate for the demo can be tried by naming its folder in the environment as DEMO_CHECKPOINT.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import pytest
from PIL import Image, ImageDraw

from tests.e2e.conftest import (
    RunningServer,
    data_url,
    picture_url,
    serving,
    with_picture,
    with_video,
)
from tools.demo_model.acceptance import Item, acceptance_set


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    candidate = os.environ.get("DEMO_CHECKPOINT")
    flags = ("--model", candidate) if candidate else ()
    with serving(tmp_path_factory.mktemp("demo"), *flags) as server:
        yield server


def content_of(item: Item) -> list[dict[str, object]]:
    if item.spacing_s is None:
        return with_picture(item.question, picture_url(item.frames[0]))
    return with_video(item.question, video_url(item.frames, spacing_s=item.spacing_s))


def video_url(frames: tuple[Image.Image, ...], *, spacing_s: float) -> str:
    """The frames as H.264, which wants even sides."""
    encoded = io.BytesIO()
    rate = 1 / Fraction(spacing_s).limit_denominator(1000)
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        width, height = (side // 2 * 2 for side in frames[0].size)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in frames:
            even = picture.convert("RGB").crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode(None))
    return data_url(encoded.getvalue(), "video/mp4")


@pytest.mark.parametrize(
    ("is_video", "num_asked", "num_right"), [(False, 20, 18), (True, 5, 4)], ids=["scenes", "clips"]
)
def test_the_answers_of_the_acceptance_set_are_right(
    demo: RunningServer, is_video: bool, num_asked: int, num_right: int
) -> None:
    items = [item for item in acceptance_set() if (item.spacing_s is not None) == is_video]
    assert len(items) == num_asked
    said = [demo.ask(content_of(item)) for item in items]
    wrong = [
        (item.question, answer, item.answer)
        for item, answer in zip(items, said, strict=True)
        if not item.is_right(answer)
    ]
    assert num_asked - len(wrong) >= num_right, wrong


def test_one_picture_in_four_formats_gives_one_answer(demo: RunningServer) -> None:
    picture = Image.new("RGB", (320, 240), (235, 235, 235))
    ImageDraw.Draw(picture).ellipse((30, 30, 140, 140), fill=(220, 30, 30))
    urls = [
        picture_url(picture),
        picture_url(picture, "JPEG", quality=100, subsampling=0),
        picture_url(picture, "WEBP", lossless=True),
        picture_url(picture, "GIF"),
    ]
    answers = {demo.ask(with_picture("What is in the picture?", url)) for url in urls}
    assert len(answers) == 1
    assert "red circle" in answers.pop().lower()


def test_an_answer_comes_whole_or_streamed_in_korean(demo: RunningServer) -> None:
    asked: dict[str, Any] = {
        "model": demo.model,
        "messages": [{"role": "user", "content": "안녕하세요"}],
        "temperature": 0,
        "max_tokens": 100,
    }
    whole = demo.client.chat.completions.create(**asked)
    stream = demo.client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert not any("\ufffd" in piece for piece in pieces)
    assert any("가" <= character <= "힣" for character in "".join(pieces))
