"""llama-index: its client for servers that are like OpenAI's."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
import pytest
from conftest import Server
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Shape(BaseModel):
    """A coloured shape."""

    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


class Place(BaseModel):
    city: Literal["Seoul", "Busan"]


def get_weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"Sunny in {city}."


def model(server: Server, **options: object) -> OpenAILike:
    return OpenAILike(
        model=server.model,
        api_base=server.base_url,
        api_key=server.api_key,
        context_window=2048,
        temperature=0,
        max_tokens=100,
        timeout=60,
        max_retries=0,
        **options,
    )


def test_chat_whole_and_streamed(server: Server) -> None:
    chat = model(server, is_chat_model=True)
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Who are you?"),
    ]
    whole = chat.chat(messages)
    assert whole.message.role == "assistant" and whole.message.content
    chunks = list(chat.stream_chat(messages))
    assert "".join(chunk.delta or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].message.content == whole.message.content
    assert asyncio.run(chat.achat(messages)).message.content == whole.message.content


def test_complete_by_way_of_chat(server: Server) -> None:
    chat = model(server, is_chat_model=True)
    whole = chat.complete("Who are you?")
    assert whole.text
    assert list(chat.stream_complete("Who are you?"))[-1].text == whole.text


def test_complete_by_way_of_completions(server: Server) -> None:
    plain = model(server, is_chat_model=False)
    whole = plain.complete("What is in")
    assert list(plain.stream_complete("What is in"))[-1].text == whole.text


def test_a_picture_is_seen(server: Server) -> None:
    picture = ImageBlock(image=server.picture, image_mimetype="image/png")
    message = ChatMessage(role="user", blocks=[picture, TextBlock(text="What is in the picture?")])
    answer = model(server, is_chat_model=True).chat([message])
    assert answer.message.content == "A red circle and a blue square."


def test_structured_output_by_schema(server: Server) -> None:
    shaped = model(
        server, is_chat_model=True, should_use_structured_outputs=True
    ).as_structured_llm(Shape)
    assert isinstance(shaped.complete("Describe a shape.").raw, Shape)


def test_a_refusal_is_the_clients_own_error(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        model(server, is_chat_model=True).complete("circle " * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_tool_is_called(server: Server) -> None:
    chat = model(server, is_chat_model=True, is_function_calling_model=True, strict=True)
    tool = FunctionTool.from_defaults(get_weather, fn_schema=Place)
    answer = chat.chat_with_tools(
        [tool], "How is the weather?", tool_required=True, allow_parallel_tool_calls=False
    )
    (call,) = chat.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather" and call.tool_kwargs["city"] in ("Seoul", "Busan")
