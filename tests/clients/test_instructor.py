"""instructor: a pydantic model is the answer, in each of its modes."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import instructor
import openai
import pytest
from conftest import Server
from instructor import Mode
from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """A coloured shape. Closed: in a schema that is open the demo model goes on without end."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


def asked(server: Server, content: Any = "Describe a shape.") -> dict[str, Any]:
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "response_model": Shape,
        "max_tokens": 200,
        "temperature": 0,
        "max_retries": 0,
    }


def options(server: Server) -> dict[str, Any]:
    return {
        "base_url": server.base_url,
        "api_key": server.api_key,
        "timeout": 60,
        "max_retries": 0,
    }


MODES = pytest.mark.parametrize(
    "mode",
    [
        Mode.JSON_SCHEMA,
        pytest.param(
            Mode.TOOLS,
        ),
    ],
)


@MODES
def test_a_model_is_the_answer(server: Server, mode: Mode) -> None:
    with openai.OpenAI(**options(server)) as client:
        patched = instructor.from_openai(client, mode=mode)
        shape, completion = patched.chat.completions.create_with_completion(**asked(server))
    assert isinstance(shape, Shape)
    assert completion.usage.completion_tokens > 0


@MODES
def test_the_answer_is_streamed_in_parts(server: Server, mode: Mode) -> None:
    with openai.OpenAI(**options(server)) as client:
        patched = instructor.from_openai(client, mode=mode)
        parts = list(patched.chat.completions.create_partial(**asked(server)))
    assert len(parts) > 1 and Shape.model_validate(parts[-1].model_dump())


@MODES
def test_the_asynchronous_way(server: Server, mode: Mode) -> None:
    async def answer() -> Shape:
        async with openai.AsyncOpenAI(**options(server)) as client:
            patched = instructor.from_openai(client, mode=mode)
            return await patched.chat.completions.create(**asked(server))

    assert isinstance(asyncio.run(answer()), Shape)


def test_a_picture_is_described(server: Server) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": server.picture_data_url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    with openai.OpenAI(**options(server)) as client:
        patched = instructor.from_openai(client, mode=Mode.JSON_SCHEMA)
        assert isinstance(patched.chat.completions.create(**asked(server, content)), Shape)
