"""Function calls by the demo model, through the real server and the real client.

It was never taught to call, so that only the forms are certain: they are, whatever it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from server.chat.tokenizer import Tokenizer
from server.hub import find_checkpoint
from tests.e2e.conftest import RunningServer, serving


class Paint(BaseModel):
    """Paint a shape."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    sides: Annotated[list[Literal[3, 4]], Field(max_length=3)]


class Stop(BaseModel):
    model_config = ConfigDict(extra="forbid")


MODELS: dict[str, type[BaseModel]] = {"Paint": Paint, "Stop": Stop}
TOOLS = [openai.pydantic_function_tool(model) for model in MODELS.values()]
PAINT: Any = {"type": "function", "function": {"name": "Paint"}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("tools")) as server:
        yield server


def asked(demo: RunningServer, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Paint a red square."}]
    defaults = {"temperature": 1, "seed": 3, "max_tokens": 1200}
    return {"model": demo.model, "messages": messages, "tools": TOOLS} | defaults | fields


def check(calls: Any, *, names: set[str]) -> None:
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function" and call.function.name in names
        MODELS[call.function.name].model_validate_json(call.function.arguments)


@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize("choice", ["required", PAINT])
def test_a_call_that_must_come_is_valid(
    demo: RunningServer, choice: Any, temperature: float
) -> None:
    fields = asked(demo, tool_choice=choice, temperature=temperature)
    names = {"Paint"} if choice is PAINT else set(MODELS)
    whole = demo.client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    check(whole.message.tool_calls, names=names)

    with demo.client.chat.completions.stream(**fields) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in events
    assert "tool_calls.function.arguments.done" in events
    assert streamed.finish_reason == "tool_calls"
    assert [call.function.arguments for call in streamed.message.tool_calls or []] == [
        call.function.arguments for call in whole.message.tool_calls
    ]


def test_calls_are_parsed_and_counted(demo: RunningServer) -> None:
    fields = asked(demo, tool_choice="required", n=3, parallel_tool_calls=False)
    completion = demo.client.chat.completions.parse(**fields)
    assert completion.usage is not None and completion.usage.completion_tokens > 3
    for choice in completion.choices:
        (call,) = choice.message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, MODELS[call.function.name])


def test_the_model_may_begin_a_call_by_itself(demo: RunningServer) -> None:
    """Led to it by biases: it ends its text, and then does not end its answer."""
    special = Tokenizer.from_folder(find_checkpoint(None).folder).special
    bias = {special["<|im_end|>"]: 100}
    bias |= {special[end]: -100 for end in ("<|endofturn|>", "<|stop|>", "<|endoftext|>")}
    fields = asked(demo, logit_bias={str(key): value for key, value in bias.items()})
    choice = demo.client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    check(choice.message.tool_calls, names=set(MODELS))


def test_the_model_may_do_without(demo: RunningServer) -> None:
    messages = [{"role": "user", "content": "안녕?"}]
    answers = [
        demo.client.chat.completions.create(
            **asked(demo, messages=messages, temperature=0, tool_choice=choice)
        ).choices[0]
        for choice in ("auto", "none")
    ]
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert answer.message.content and answer.message.tool_calls is None
    assert answers[0].message.content == answers[1].message.content


def test_a_result_is_answered(demo: RunningServer) -> None:
    """The whole loop that agents go through."""
    messages: list[Any] = [{"role": "user", "content": "Paint a red square."}]
    first = demo.client.chat.completions.create(**asked(demo, messages=messages, tool_choice=PAINT))
    made = first.choices[0].message
    messages.append(made)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"painted": True})}
        for call in made.tool_calls or []
    ]
    second = demo.client.chat.completions.create(**asked(demo, messages=messages))
    assert second.choices[0].finish_reason in ("stop", "tool_calls", "length")
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_call_cut_by_its_length_says_so(demo: RunningServer) -> None:
    fields = asked(demo, tool_choice=PAINT, max_tokens=6)
    assert demo.client.chat.completions.create(**fields).choices[0].finish_reason == "length"
