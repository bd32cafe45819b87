"""pydantic-ai: agents on the chat endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, TypeVar

import openai
import pytest
from conftest import Server
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

Result = TypeVar("Result")
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "timeout": 60}
QUESTION = "What is in the picture?"


class Shape(BaseModel):
    """A coloured shape."""

    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


def run(server: Server, work: Callable[[OpenAIChatModel], Awaitable[Result]]) -> Result:
    """What `work` makes of the model; a client of its own, as each has its own event loop."""

    async def with_model() -> Result:
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key=server.api_key, timeout=60, max_retries=0
        ) as client:
            return await work(
                OpenAIChatModel(server.model, provider=OpenAIProvider(openai_client=client))
            )

    return asyncio.run(with_model())


def test_an_agent_answers_in_text(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> tuple[str, int, list[str]]:
        agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS)
        first = await agent.run("Who are you?")
        second = await agent.run("안녕하세요", message_history=first.all_messages())
        return first.output, first.usage.output_tokens, [second.output]

    text, num_tokens, later = run(server, ask)
    assert text and num_tokens > 0 and later[0]


def test_a_stream_says_the_same(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> tuple[str, str]:
        agent = Agent(model, model_settings=SETTINGS)
        whole = await agent.run("Who are you?")
        async with agent.run_stream("Who are you?") as stream:
            pieces: AsyncIterator[str] = stream.stream_text(delta=True, debounce_by=None)
            return whole.output, "".join([piece async for piece in pieces])

    whole, streamed = run(server, ask)
    assert whole and streamed == whole


def test_pictures_are_seen(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> list[str]:
        agent = Agent(model, model_settings=SETTINGS)
        pictures = [
            ImageUrl(server.picture_url),
            BinaryContent(server.picture, media_type="image/png"),
        ]
        return [(await agent.run([picture, QUESTION])).output for picture in pictures]

    assert run(server, ask) == ["A red circle and a blue square."] * 2


def test_structured_output_by_schema(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> Shape:
        agent = Agent(model, output_type=NativeOutput(Shape), model_settings=SETTINGS)
        return (await agent.run("Describe a shape.")).output

    assert isinstance(run(server, ask), Shape)


def test_a_refusal_keeps_its_body(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> None:
        await Agent(model, model_settings=SETTINGS).run("circle " * 3000)

    with pytest.raises(ModelHTTPError) as caught:
        run(server, ask)
    assert caught.value.status_code == 400
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "context_length_exceeded"


def test_structured_output_by_a_tool(server: Server) -> None:
    async def ask(model: OpenAIChatModel) -> Shape:
        agent = Agent(model, output_type=ToolOutput(Shape), model_settings=SETTINGS)
        return (await agent.run("Describe a shape.")).output

    assert isinstance(run(server, ask), Shape)


def test_an_agent_calls_a_tool_and_then_ends(server: Server) -> None:
    """The tool is all there is in the first step, the end in the second: none is left to chance."""
    called: list[str] = []

    async def the_tool_first(
        context: RunContext[None], tools: list[ToolDefinition]
    ) -> list[ToolDefinition]:
        return tools if context.run_step == 1 else []

    async def the_end_later(
        context: RunContext[None], tools: list[ToolDefinition]
    ) -> list[ToolDefinition]:
        return tools if context.run_step > 1 else []

    async def ask(model: OpenAIChatModel) -> Shape:
        agent = Agent(
            model,
            output_type=ToolOutput(Shape),
            model_settings=SETTINGS,
            capabilities=[PrepareTools(the_tool_first), PrepareOutputTools(the_end_later)],
        )

        @agent.tool_plain
        def get_weather(city: Literal["Seoul", "Busan"]) -> str:
            """Tells the weather of a city."""
            called.append(city)
            return "Sunny."

        return (await agent.run("How is the weather?")).output

    assert isinstance(run(server, ask), Shape)
    assert called and set(called) <= {"Seoul", "Busan"}
