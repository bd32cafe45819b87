"""langchain-openai: `ChatOpenAI` with another base URL."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import pytest
from conftest import Server
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

# Asks for one call of a closed schema: else the demo model calls, and names members, without end.
ONE_CALL: dict[str, Any] = {"strict": True, "parallel_tool_calls": False}


class Shape(BaseModel):
    """A coloured shape."""

    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


@tool
def get_weather(city: Literal["Seoul", "Busan"]) -> str:
    """Tells the weather of a city."""
    return f"Sunny in {city}."


@pytest.fixture(scope="module")
def chat(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        model=server.model,
        base_url=server.base_url,
        api_key=server.api_key,
        temperature=0,
        max_tokens=200,
        timeout=60,
        max_retries=0,
    )


def test_invoke_answers_with_its_usage(chat: ChatOpenAI) -> None:
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("Who are you?")])
    assert answer.content and answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_stream_says_the_same_and_ends_with_its_usage(chat: ChatOpenAI) -> None:
    whole = chat.invoke("Who are you?")
    chunks = list(chat.stream("Who are you?", stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert len(chunks) > 2 and total.content == whole.content
    assert total.response_metadata["finish_reason"] == "stop"
    assert total.usage_metadata and whole.usage_metadata
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


def test_a_batch_and_the_asynchronous_way(chat: ChatOpenAI) -> None:
    batch = chat.batch(["Who are you?", "안녕하세요"])
    alone = asyncio.run(chat.ainvoke("안녕하세요"))
    assert batch[0].content and batch[1].content == alone.content


def test_a_picture_is_seen(chat: ChatOpenAI, server: Server) -> None:
    for url in (server.picture_data_url, server.picture_url):
        message = HumanMessage(
            [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is in the picture?"},
            ]
        )
        assert chat.invoke([message]).content == "A red circle and a blue square."


def test_a_picture_in_langchains_own_form_is_seen(chat: ChatOpenAI, server: Server) -> None:
    encoded = server.picture_data_url.partition(",")[2]
    message = HumanMessage(
        content_blocks=[
            {"type": "image", "base64": encoded, "mime_type": "image/png"},
            {"type": "text", "text": "What is in the picture?"},
        ]
    )
    assert chat.invoke([message]).content == "A red circle and a blue square."


def test_structured_output_by_schema(chat: ChatOpenAI) -> None:
    shaped = chat.with_structured_output(Shape, method="json_schema")
    assert isinstance(shaped.invoke("Describe a shape."), Shape)
    raw = chat.with_structured_output(Shape, method="json_schema", include_raw=True)
    answer: Any = raw.invoke("Describe a shape.")
    assert isinstance(answer["parsed"], Shape) and answer["parsing_error"] is None
    assert isinstance(list(shaped.stream("Describe a shape."))[-1], Shape)


def test_a_refusal_is_the_clients_own_error(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat.invoke("circle " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_bound_tool_is_called_and_answered(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="any", **ONE_CALL)
    question = HumanMessage("How is the weather?")
    answer = bound.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Seoul", "Busan")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answered = chat.bind_tools([get_weather], tool_choice="none").invoke([question, answer, result])
    assert not answered.tool_calls


def test_a_bound_tool_is_called_in_a_stream(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="get_weather", **ONE_CALL)
    chunks = list(bound.stream("How is the weather?"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.tool_calls[0]["args"]["city"] in ("Seoul", "Busan")
    assert total.response_metadata["finish_reason"] == "tool_calls"


def test_structured_output_by_function_calling(chat: ChatOpenAI) -> None:
    shaped = chat.with_structured_output(Shape, method="function_calling", strict=True)
    assert isinstance(shaped.invoke("Describe a shape."), Shape)


def test_the_responses_api(chat: ChatOpenAI) -> None:
    answer = chat.model_copy(update={"use_responses_api": True, "store": False}).invoke("Who?")
    assert answer.text
