"""openai-python: the client that this server's API is OpenAI's for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from conftest import Server
from pydantic import BaseModel

TIMEOUT_S = 60.0
QUESTION = "What is in the picture?"

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Seoul", "Busan"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Shape(BaseModel):
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.base_url, api_key=server.api_key, timeout=TIMEOUT_S, max_retries=0
    ) as client:
        yield client


def asked(server: Server, content: Any, **fields: Any) -> dict[str, Any]:
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_completion_tokens": 60,
        **fields,
    }


def with_picture(url: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]


def test_the_model_is_listed_and_found(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).object == "model"


def test_chat_answers_whole(client: openai.OpenAI, server: Server) -> None:
    completion = client.chat.completions.create(**asked(server, "안녕하세요", n=2, logprobs=True))
    assert completion.object == "chat.completion" and completion.model == server.model
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.message.role == "assistant" and choice.message.content
        assert choice.finish_reason == "stop"
        assert choice.logprobs and choice.logprobs.content
        told = b"".join(bytes(each.bytes or []) for each in choice.logprobs.content)
        assert told.decode() == choice.message.content
    usage = completion.usage
    assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI, server: Server) -> None:
    request = asked(server, "Who are you?")
    whole = client.chat.completions.create(**request)
    with client.chat.completions.stream(
        **request, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage and whole.usage
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_that_is_closed_early_ends(client: openai.OpenAI, server: Server) -> None:
    with client.chat.completions.create(**asked(server, "Who are you?", stream=True)) as stream:
        first = next(iter(stream))
    assert first.choices[0].delta.role == "assistant"


def test_a_pydantic_model_is_parsed_whole_and_streamed(
    client: openai.OpenAI, server: Server
) -> None:
    request = asked(server, "Describe a shape.", response_format=Shape)
    parsed = client.chat.completions.parse(**request).choices[0].message.parsed
    assert isinstance(parsed, Shape)
    with client.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed


def test_pictures_by_data_url_and_by_http(client: openai.OpenAI, server: Server) -> None:
    answers = [
        client.chat.completions.create(**asked(server, with_picture(url))).choices[0].message
        for url in (server.picture_data_url, server.picture_url)
    ]
    assert answers[0].content == answers[1].content == "A red circle and a blue square."


def test_a_file_is_uploaded_asked_about_and_deleted(client: openai.OpenAI, server: Server) -> None:
    stored = client.files.create(file=("그림.png", server.picture), purpose="vision")
    assert (stored.filename, stored.bytes) == ("그림.png", len(server.picture))
    assert stored.id in [file.id for file in client.files.list()]
    assert client.files.retrieve(stored.id) == stored
    assert client.files.content(stored.id).read() == server.picture
    content = [{"type": "file", "file": {"file_id": stored.id}}, {"type": "text", "text": QUESTION}]
    completion = client.chat.completions.create(**asked(server, content))
    assert "red circle" in (completion.choices[0].message.content or "")
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(stored.id)
    assert caught.value.code == "file_not_found"


def test_a_prompt_is_completed(client: openai.OpenAI, server: Server) -> None:
    completion = client.completions.create(
        model=server.model, prompt=["What is", "무엇"], max_tokens=4, temperature=0, logprobs=1
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert all(choice.logprobs and choice.logprobs.tokens for choice in completion.choices)


def test_a_bad_request_names_what_is_wrong(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked(server, "hi", top_p=7))
    error = caught.value
    assert (error.status_code, error.param) == (400, "top_p")
    assert (error.type, error.code) == ("invalid_request_error", "invalid_value")
    assert error.request_id == error.response.headers["x-request-id"]


def test_a_prompt_that_is_too_long_is_told_apart(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked(server, "circle " * 3000))
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key_and_a_wrong_model(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**asked(server, "hi") | {"model": "gpt-4o"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_raw_responses_have_their_headers(client: openai.OpenAI, server: Server) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **asked(server, "hi"), extra_headers={"X-Request-Id": "my-own.1"}
    )
    assert raw.headers["x-request-id"] == "my-own.1" == raw.request_id
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().choices[0].message.content


def test_the_asynchronous_client(server: Server) -> None:
    async def answers() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key=server.api_key, timeout=TIMEOUT_S, max_retries=0
        ) as client:
            request = asked(server, "Who are you?")
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**request),
                client.chat.completions.create(**request, stream=True),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(answers())
    assert whole and streamed == whole


def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI, server: Server) -> None:
    request = asked(
        server,
        "How is the weather?",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,  # else the demo model calls without end
    )
    choice = client.chat.completions.create(**request).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather") and call.id
    assert json.loads(call.function.arguments)["city"] in ("Seoul", "Busan")
    turns = [
        *request["messages"],
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    answer = client.chat.completions.create(
        **request | {"messages": turns, "tool_choice": "none"}
    ).choices[0]
    assert answer.finish_reason in ("stop", "length") and not answer.message.tool_calls


def test_a_tool_call_streams_in_pieces(client: openai.OpenAI, server: Server) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    request = asked(server, "How is the weather?", tools=[WEATHER], tool_choice=named)
    whole = client.chat.completions.create(**request).choices[0].message.tool_calls
    with client.chat.completions.stream(**request) as stream:
        pieces = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert whole and final.message.tool_calls
    arguments = final.message.tool_calls[0].function.arguments
    assert "".join(pieces) == arguments == whole[0].function.arguments


def test_a_tool_from_a_pydantic_model_is_parsed(client: openai.OpenAI, server: Server) -> None:
    tool = openai.pydantic_function_tool(Shape, name="draw")
    request = asked(
        server, "Draw.", tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    calls = client.chat.completions.parse(**request).choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Shape)


def test_a_response_is_given_whole_and_streamed(client: openai.OpenAI, server: Server) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "instructions": "Be brief.",
        "input": "Who are you?",
        "max_output_tokens": 60,
        "temperature": 0,
        "store": False,
    }
    whole = client.responses.create(**request)
    assert whole.status == "completed" and whole.output_text
    assert whole.usage and whole.usage.total_tokens > whole.usage.output_tokens > 0
    with client.responses.stream(**request) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds


def test_a_response_about_a_picture(client: openai.OpenAI, server: Server) -> None:
    content = [
        {"type": "input_image", "image_url": server.picture_data_url, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    response = client.responses.create(
        model=server.model,
        input=[{"role": "user", "content": content}],
        temperature=0,
        store=False,
    )
    assert response.output_text == "A red circle and a blue square."


def test_a_response_is_parsed(client: openai.OpenAI, server: Server) -> None:
    response = client.responses.parse(
        model=server.model, input="Describe a shape.", text_format=Shape, store=False
    )
    assert isinstance(response.output_parsed, Shape)


def test_a_response_calls_a_tool(client: openai.OpenAI, server: Server) -> None:
    response = client.responses.create(
        model=server.model,
        input="How is the weather?",
        tools=[{"type": "function", **WEATHER["function"]}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        store=False,
    )
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls and calls[0].name == "get_weather" and calls[0].call_id
    assert json.loads(calls[0].arguments)["city"] in ("Seoul", "Busan")


def test_stored_responses_are_refused_by_name(client: openai.OpenAI, server: Server) -> None:
    for field in ({"store": True}, {"previous_response_id": "resp_1", "store": False}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=server.model, input="hi", **field)
        assert caught.value.param == next(iter(field))
