"""What other engines let a chat request say beside OpenAI's fields, through the real client."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.e2e.conftest import (
    ANSWER_S,
    RunningServer,
    data_url,
    picture_url,
    serving,
    with_picture,
    with_video,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("demo")) as server:
        yield server


def circle() -> str:
    picture = Image.new("RGB", (320, 240), (235, 235, 235))
    ImageDraw.Draw(picture).ellipse((30, 30, 140, 140), fill=(220, 30, 30))
    return picture_url(picture)


def clip() -> str:
    frames = [Image.new("L", (64, 48), 10 + 20 * index) for index in range(4)]
    encoded = io.BytesIO()
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=400)
    return data_url(encoded.getvalue(), "video/gif")


CONTENTS: dict[str, Any] = {
    "text": "안녕하세요",
    "picture": with_picture("What is in the picture?", circle()),
    "video": with_video("What happens?", clip()),
}


def complete(server: RunningServer, messages: list[dict[str, Any]], **extra: Any) -> Any:
    return server.client.chat.completions.create(
        model=server.model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=60,
        extra_body=extra,
    )


def cached_tokens(completion: Any) -> int:
    return int(completion.usage.prompt_tokens_details.cached_tokens)


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_an_answer_cut_anywhere_is_continued_as_it_was(demo: RunningServer, kind: str) -> None:
    question = {"role": "user", "content": CONTENTS[kind]}
    answer = complete(demo, [question]).choices[0].message.content
    words = answer.split(" ")
    assert len(words) > 1, answer
    begun = " ".join(words[: len(words) // 2])
    messages = [question, {"role": "assistant", "content": begun}]
    continued = complete(demo, messages, continue_final_message=True)
    assert begun + continued.choices[0].message.content == answer
    echoed = complete(
        demo, messages, continue_final_message=True, add_generation_prompt=False, echo=True
    )
    assert echoed.choices[0].message.content == answer
    texts = ["", ""]
    for chunk in demo.client.chat.completions.create(
        model=demo.model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=60,
        n=2,
        stream=True,
        extra_body={"continue_final_message": True, "echo": True},
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [answer, answer]


def test_each_salt_has_caches_of_its_own(demo: RunningServer) -> None:
    """The second time everything but the last block is there, under the same salt alone."""
    words = " ".join(str(number) for number in range(60))
    content = [{"type": "text", "text": words}, *with_picture("And here?", circle())]
    question = [{"role": "user", "content": content}]
    cached = [
        cached_tokens(complete(demo, question, **salt))
        for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}) * 2
    ]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] == cached[4] == cached[5] > 64


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize(
    "ending", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}], ids=str
)
def test_a_conversation_has_the_tokens_that_are_counted(
    demo: RunningServer, kind: str, ending: dict[str, bool]
) -> None:
    asked = {
        "model": demo.model,
        "messages": [
            {"role": "user", "content": CONTENTS[kind]},
            {"role": "assistant", "content": "A"},
        ],
        **ending,
    }
    response = httpx.post(f"{demo.url}/tokenize", json=asked, timeout=ANSWER_S)
    assert response.status_code == 200, response.text
    told = httpx.post(
        f"{demo.url}/v1/chat/completions?dry_run=true", json=asked, timeout=ANSWER_S
    ).json()["usage"]
    counted = response.json()
    assert counted["count"] == len(counted["tokens"]) == told["prompt_tokens"]
    for medium in told["media"]:
        commonest = max(set(counted["tokens"]), key=counted["tokens"].count)
        assert counted["tokens"].count(commonest) >= medium["tokens"] > 1


def test_media_options_change_what_is_counted(demo: RunningServer) -> None:
    messages = [{"role": "user", "content": CONTENTS["picture"]}]
    whole, thumbnail = (
        httpx.post(
            f"{demo.url}/tokenize",
            json={"messages": messages, "media_options": options},
            timeout=ANSWER_S,
        ).json()["count"]
        for options in ({}, {"detail": "low"})
    )
    assert thumbnail < whole


def test_a_faulty_picture_is_refused_as_in_a_chat(demo: RunningServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [part]}]
    response = httpx.post(f"{demo.url}/tokenize", json={"messages": messages}, timeout=ANSWER_S)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_image_media_type")
    assert error["param"] == "messages[0].content[0].image_url.url"
