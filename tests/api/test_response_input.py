"""Items to messages and flat tools to a chat's, with the way back to the caller's places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import (
    response_create_params,
    response_input_item_param,
    tool_param,
)

from server.api.places import Places
from server.api.response_input import (
    MAX_ITEMS,
    UNSUPPORTED_CHOICE_TYPES,
    UNSUPPORTED_ITEM_TYPES,
    UNSUPPORTED_TOOL_TYPES,
    chat_tool_choice,
    chat_tools,
    parse_input,
)
from server.chat.parts import parse_messages
from server.config import MediaConfig
from server.errors import InvalidRequest, ServerError

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
USER = {"role": "user", "content": "hi"}
SAID = {
    "type": "message",
    "id": "msg_1",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}],
}


def messages_of(value: object, instructions: str | None = None) -> list[Any]:
    return list(parse_input(value, instructions).messages)


def refusal(value: object) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_input(value, None)
    return caught.value.code, caught.value.param


def test_a_text_is_what_a_user_says() -> None:
    assert messages_of("hi") == [USER]
    assert messages_of("hi", "Be brief.") == [{"role": "system", "content": "Be brief."}, USER]


def test_messages_with_and_without_their_type() -> None:
    parts = [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "u"}]
    developer = {"type": "message", "role": "developer", "content": "Be brief."}
    assert messages_of([developer, {"role": "user", "content": parts}]) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]


def test_what_an_answer_said_may_come_back_as_it_was() -> None:
    assert messages_of([USER, SAID, USER]) == [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        USER,
    ]


def test_calls_are_made_in_one_turn_of_the_assistants() -> None:
    other = CALL | {"call_id": "c2", "name": "g", "id": "fc_2", "status": "completed"}
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    answers = [
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "input_text", "text": "x"}]},
    ]
    outputs = [OUTPUT, OUTPUT | {"call_id": "c2", "output": answers[1]["content"]}]
    assert messages_of([USER, CALL, other, *outputs]) == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *answers,
    ]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}
    assert messages_of([USER, SAID, CALL, other]) == [USER, said | {"tool_calls": calls}]
    # A call after a result is another turn's.
    assert [message["role"] for message in messages_of([CALL, OUTPUT, other])] == [
        "assistant",
        "tool",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        (None, "missing_required_parameter", "input"),
        (5, "invalid_type", "input"),
        ({}, "invalid_type", "input"),
        ([], "invalid_value", "input"),
        ([USER] * (MAX_ITEMS + 1), "array_above_max_length", "input"),
        ([USER, "x"], "invalid_type", "input[1]"),
        ([{"type": 1}], "invalid_type", "input[0].type"),
        ([{"type": "poem"}], "invalid_value", "input[0].type"),
        ([USER, {"type": "reasoning", "summary": []}], "unsupported_parameter", "input[1].type"),
        ([{"type": "item_reference", "id": "x"}], "unsupported_parameter", "input[0].type"),
        ([USER | {"role": "tool"}], "invalid_value", "input[0].role"),
        ([USER | {"name": "x"}], "unknown_parameter", "input[0].name"),
        ([USER | {"phase": "commentary"}], "unsupported_parameter", "input[0].phase"),
        ([USER | {"id": 1}], "invalid_type", "input[0].id"),
        ([USER | {"status": "done"}], "invalid_value", "input[0].status"),
        ([USER | {"status": []}], "invalid_value", "input[0].status"),
        ([USER | {"content": {}}], "invalid_type", "input[0].content"),
        (
            [SAID | {"role": "user"}],
            "invalid_value",
            "input[0].content[0].type",
        ),
        (
            [SAID | {"content": [{"type": "output_text", "text": "x", "annotations": [{}]}]}],
            "unsupported_parameter",
            "input[0].content[0].annotations",
        ),
        ([CALL | {"call_id": None}], "missing_required_parameter", "input[0].call_id"),
        ([CALL | {"arguments": {}}], "invalid_type", "input[0].arguments"),
        ([CALL | {"namespace": "x"}], "unsupported_parameter", "input[0].namespace"),
        ([CALL | {"output": "x"}], "unknown_parameter", "input[0].output"),
        ([OUTPUT | {"output": None}], "missing_required_parameter", "input[0].output"),
        ([OUTPUT | {"output": {}}], "invalid_type", "input[0].output"),
        ([{"type": "function_call_output"}], "missing_required_parameter", "input[0].call_id"),
    ],
)
def test_what_is_no_item_is_refused_at_its_place(value: object, code: str, param: str) -> None:
    assert refusal(value) == (code, param)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions"),
        ("messages[1]", "input[0]"),
        ("messages[1].content[3].image_url.url", "input[0].content[3].image_url.url"),
        ("messages[2].content", "input[1].content"),
        ("messages[2].tool_calls", "input[2]"),
        ("messages[2].tool_calls[0].function.name", "input[2].name"),
        ("messages[2].tool_calls[1].function.arguments", "input[3].arguments"),
        ("messages[2].tool_calls[1].id", "input[3].call_id"),
        ("messages[3].role", "input[4].type"),
        ("messages[3].tool_call_id", "input[4].call_id"),
        ("messages[3].content[0].text", "input[4].output[0].text"),
        ("messages[10]", "input[10]"),
        ("max_tokens", "max_tokens"),
        ("messages_of", "messages_of"),
        ("", ""),
    ],
)
def test_every_place_leads_back_to_the_callers(path: str, sent: str) -> None:
    value = [USER, SAID, CALL, CALL, OUTPUT]
    assert parse_input(value, "Be brief.").places.of(path) == sent


def test_the_place_of_a_text_is_the_text() -> None:
    assert parse_input("hi", None).places.of("messages[0].content") == "input"


def test_an_error_names_the_callers_place_wherever_it_names_one() -> None:
    places = Places({"messages[3]": "input[5]", "tools[0].function": "tools[0]"})
    message = "messages[3].content[0], decode: no. See messages[3] and tools[0].function.name."
    with pytest.raises(InvalidRequest) as caught, places.named_in_errors():
        raise InvalidRequest(message, param="tools[0].function.name")
    assert caught.value.param == "tools[0].name"
    assert caught.value.message == (
        "input[5].content[0], decode: no. See input[5] and tools[0].name."
    )
    with pytest.raises(ServerError) as without, places.named_in_errors():
        raise ServerError()
    assert without.value.param is None


ITEMS = st.sampled_from([USER, SAID, CALL, OUTPUT, {"role": "system", "content": "Be brief."}])
FAULTS = st.sampled_from(
    [
        ({"role": "user", "content": [{"type": "poem"}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "content[0].image_url"),
        ({"role": "user", "content": " "}, "content"),
        ({"content": "hi"}, "role"),
        ({"role": "assistant", "content": [{"type": "input_text"}]}, "content[0].text"),
        ({"role": "assistant", "content": [{"type": "output_text"}]}, "content[0].text"),
    ]
)


@given(
    before=st.lists(ITEMS, max_size=6),
    fault=FAULTS,
    after=st.lists(ITEMS, max_size=3),
    instructions=st.sampled_from([None, "Be brief."]),
)
def test_what_a_chat_refuses_is_told_at_the_items_place(
    before: list[Any], fault: tuple[Any, str], after: list[Any], instructions: str | None
) -> None:
    """Whatever stands before it, calls that share a message included."""
    item, where = fault
    conversation = parse_input([*before, item, *after], instructions)
    index = next(
        place
        for place, message in enumerate(conversation.messages)
        if conversation.places.of(f"messages[{place}]") == f"input[{len(before)}]"
    )
    alone = [{"role": "user", "content": "x"}] * index + [conversation.messages[index]]
    with pytest.raises(InvalidRequest) as caught, conversation.places.named_in_errors():
        parse_messages([{**each, "tool_calls": None} for each in alone], MediaConfig())
    assert caught.value.param == f"input[{len(before)}].{where}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "call_id", "output", "text", "id"]),
            inner | st.sampled_from(["message", "user", "function_call", "output_text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_input_is_a_conversation_or_refused_at_a_place_in_it(value: Any) -> None:
    try:
        conversation = parse_input(value, None)
    except InvalidRequest as error:
        assert error.param is not None and error.param.startswith("input")
        assert error.code != "internal_error"
    else:
        assert conversation.messages
        for index in range(len(conversation.messages)):
            assert conversation.places.of(f"messages[{index}]").startswith("input")


def test_flat_tools_become_a_chats() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    full = {
        "type": "function",
        "name": "weather",
        "description": "What it is like.",
        "parameters": parameters,
        "strict": True,
        "defer_loading": False,
    }
    tools, sent = chat_tools([full, {"type": "function", "name": "f", "parameters": None}])
    assert tools == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "What it is like.",
                "parameters": parameters,
                "strict": True,
            },
        },
        {"type": "function", "function": {"name": "f"}},
    ]
    assert Places(sent).of("tools[1].function.parameters.type") == "tools[1].parameters.type"
    assert Places(sent).of("tools[1].function") == "tools[1]"


def test_tool_choices_become_a_chats() -> None:
    for word in ("none", "auto", "required"):
        assert chat_tool_choice(word)[0] == word
    named = {"type": "function", "name": "f"}
    assert chat_tool_choice(named)[0] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("tools", "code", "param"),
    [
        ({}, "invalid_type", "tools"),
        (["f"], "invalid_type", "tools[0]"),
        ([{"name": "f"}], "missing_required_parameter", "tools[0].type"),
        ([{"type": "web_search"}], "unsupported_parameter", "tools[0].type"),
        ([{"type": "poem"}], "invalid_value", "tools[0].type"),
        ([{"type": "function", "function": {}}], "unknown_parameter", "tools[0].function"),
        (
            [{"type": "function", "name": "f", "defer_loading": True}],
            "unsupported_parameter",
            "tools[0].defer_loading",
        ),
    ],
)
def test_what_is_no_function_is_refused(tools: object, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_tools(tools)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("choice", "code", "param"),
    [
        ({}, "missing_required_parameter", "tool_choice.type"),
        ({"type": "allowed_tools", "x": 1}, "unknown_parameter", "tool_choice.x"),
        (
            {"type": "allowed_tools", "tools": [{"type": "mcp"}]},
            "unsupported_parameter",
            "tool_choice.tools[0].type",
        ),
        ({"type": "function"}, "missing_required_parameter", "tool_choice.name"),
        ({"type": "function", "name": "f", "x": 1}, "unknown_parameter", "tool_choice.x"),
    ],
)
def test_what_is_no_choice_of_a_function_is_refused(choice: Any, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_tool_choice(choice)
    assert (caught.value.code, caught.value.param) == (code, param)


def types_in(*forms: Any) -> set[str]:
    """What the `type` of the SDK's own forms may be."""
    hints = [get_type_hints(form).get("type") for form in forms]
    return {value for hint in hints for value in literals_in(hint)}


def literals_in(hint: Any) -> Iterator[str]:
    for each in get_args(hint):
        if isinstance(each, str):
            yield each
        else:
            yield from literals_in(each)


def test_every_type_that_openai_knows_is_honoured_or_refused_by_name() -> None:
    items = types_in(*get_args(response_input_item_param.ResponseInputItemParam))
    assert {"message", "function_call", "reasoning", "mcp_call"} < items
    honoured = {"message", "function_call", "function_call_output"}
    assert items - honoured - UNSUPPORTED_ITEM_TYPES == set()
    tools = types_in(*get_args(tool_param.ToolParam))
    assert {"function", "mcp"} < tools
    assert tools - {"function"} - UNSUPPORTED_TOOL_TYPES == set()
    choices = types_in(*get_args(response_create_params.ToolChoice)[1:])
    assert {"function", "allowed_tools", "file_search"} < choices
    assert choices - {"function", "allowed_tools"} - UNSUPPORTED_CHOICE_TYPES == set()
