"""litellm: the `openai/` provider with another base URL, and what it makes of our errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from conftest import Server
from pydantic import BaseModel


class Shape(BaseModel):
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


def asked(server: Server, content: Any, **fields: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{server.model}",
        "api_base": server.base_url,
        "api_key": server.api_key,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 100,
        "timeout": 60,
        "num_retries": 0,
        **fields,
    }


def test_a_completion_whole_streamed_and_asynchronous(server: Server) -> None:
    request = asked(server, "Who are you?")
    whole = litellm.completion(**request)
    said = whole.choices[0].message.content
    assert said and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(litellm.completion(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert asyncio.run(litellm.acompletion(**request)).choices[0].message.content == said


def test_a_stream_tells_its_usage(server: Server) -> None:
    request = asked(server, "Who are you?", stream=True, stream_options={"include_usage": True})
    chunks = list(litellm.completion(**request))
    rebuilt = litellm.stream_chunk_builder(chunks)
    whole = litellm.completion(**asked(server, "Who are you?"))
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
    assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_picture_is_seen(server: Server) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": server.picture_data_url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    answer = litellm.completion(**asked(server, content)).choices[0].message.content
    assert answer == "A red circle and a blue square."


def test_structured_output_by_schema(server: Server) -> None:
    answer = litellm.completion(**asked(server, "Describe a shape.", response_format=Shape))
    assert Shape.model_validate_json(answer.choices[0].message.content)


def test_a_prompt_that_is_too_long_is_a_context_window_error(server: Server) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked(server, "circle " * 3000))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked(server, "hi", max_tokens=1_000_000))


def test_other_errors_are_told_apart(server: Server) -> None:
    with pytest.raises(litellm.BadRequestError) as bad:
        litellm.completion(**asked(server, "hi", top_p=7))
    assert not isinstance(bad.value, litellm.ContextWindowExceededError)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**asked(server, "hi") | {"api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(server, "hi") | {"model": "openai/gpt-nothing"})


def test_a_tool_is_called_whole_and_streamed(server: Server) -> None:
    tool = {
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
        },
    }
    request = asked(
        server,
        "How is the weather?",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,  # else the demo model calls without end
    )
    whole = litellm.completion(**request).choices[0]
    assert whole.finish_reason == "tool_calls"
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(**request, stream=True)))
    for message in (whole.message, rebuilt.choices[0].message):
        call = message.tool_calls[0]
        assert call.function.name == "get_weather" and call.id
        assert json.loads(call.function.arguments)["city"] in ("Seoul", "Busan")
