"""POST /v1/responses over the demo model, through the real server and the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.conftest import until
from tests.e2e.conftest import ANSWER_S, REPOSITORY, RunningServer, data_url, serving

ASKED: dict[str, Any] = {"temperature": 0, "max_output_tokens": 100}


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("responses")) as server:
        yield server


def example(name: str, media_type: str) -> str:
    return data_url((REPOSITORY / "docs" / name).read_bytes(), media_type)


def asking(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": list(parts)}]


PICTURE = {"type": "input_image", "image_url": example("example.png", "image/png")}
QUESTION = {"type": "input_text", "text": "What is in the picture?"}


def test_a_picture_is_seen_whole_and_streamed_as_in_a_chat(demo: RunningServer) -> None:
    asked = ASKED | {"model": demo.model, "input": asking(PICTURE, QUESTION)}
    raw = demo.client.responses.with_raw_response.create(**asked)
    whole = raw.parse()
    assert "red circle" in whole.output_text.lower()
    part = {"type": "image_url", "image_url": {"url": PICTURE["image_url"]}}
    assert whole.output_text == demo.ask([part, {"type": "text", "text": QUESTION["text"]}])
    assert "encode;dur=" in raw.headers["server-timing"]
    assert int(raw.headers["openai-processing-ms"]) >= 0
    usage: Any = whole.to_dict()["usage"]
    assert usage["media"][0]["path"] == "input[0].content[0]"
    assert usage["media"][0]["tokens"] == usage["input_tokens_details"]["image_tokens"] > 0

    with demo.client.responses.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(pieces) == final.output_text == whole.output_text
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens

    count = {"model": demo.model, "input": asked["input"]}
    counted = demo.client.responses.input_tokens.count(**count)
    assert counted.input_tokens == whole.usage.input_tokens


def test_a_video_may_come_as_a_file(demo: RunningServer) -> None:
    video = {"type": "input_file", "file_data": example("example.mp4", "video/mp4")}
    question = {"type": "input_text", "text": "Which way does it move?"}
    response = demo.client.responses.create(
        model=demo.model, input=asking(video, question), **ASKED
    )
    assert "right" in response.output_text.lower()


def test_a_conversation_goes_on_from_what_came_back(demo: RunningServer) -> None:
    first = demo.client.responses.create(model=demo.model, input="안녕하세요", **ASKED)
    assert first.status == "completed" and first.output_text
    again = {"role": "user", "content": "안녕하세요"}
    second = demo.client.responses.create(
        model=demo.model, input=[again, *first.output, again], **ASKED
    )
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.output_text


def test_a_pydantic_model_is_parsed(demo: RunningServer) -> None:
    parsed = demo.client.responses.parse(
        model=demo.model, input="Describe a shape.", text_format=Shape, **ASKED
    )
    assert isinstance(parsed.output_parsed, Shape)
    assert json.loads(parsed.output_text) == parsed.output_parsed.model_dump()


def test_errors_name_the_place_in_the_request(demo: RunningServer) -> None:
    broken = {"type": "input_image", "image_url": data_url(b"GIF89a-no", "image/png")}
    value = [{"role": "user", "content": "hi"}, *asking(QUESTION, broken)]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            demo.client.responses.create(model=demo.model, input=value, stream=stream)
        error: Any = caught.value
        assert error.param == "input[1].content[1].image_url"
        assert "messages" not in error.message
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        demo.client.responses.create(model=demo.model, input="hi", previous_response_id="resp_1")
    schema = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    with pytest.raises(openai.BadRequestError) as caught:
        demo.client.responses.create(model=demo.model, input="hi", text={"format": schema})  # type: ignore[arg-type]
    assert caught.value.code == "invalid_json_schema"
    assert caught.value.param == "text.format.schema"


def test_who_leaves_a_stream_ends_it(demo: RunningServer) -> None:
    body = {"model": demo.model, "input": "안녕하세요", "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{demo.url}/v1/responses", json=body, timeout=ANSWER_S) as stream:
        assert next(stream.iter_lines()) == "event: response.created"
    aborts = 'hcx_answers_finished_total{reason="abort"}'
    until(lambda: demo.metrics().get(aborts) == 1)
