from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.chat.calls import ARROW, CallFormat, Place
from server.chat.grammar import parse_constraint
from server.chat.tokenizer import Tokenizer
from server.chat.tools import MAX_CALLS, MAX_TOOLS, Tools, answer_form, parse_tools
from server.errors import InvalidRequest
from server.grammar.matcher import Vocabulary, read_vocabulary, start_matcher
from server.hub import find_checkpoint

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
START, END = "<|im_start|>", "<|im_end|>"


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY} | fields}


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def refusal(tools: Any, choice: Any = None) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_tools(tools, choice, None)
    assert caught.value.message
    return caught.value.code, caught.value.param


def parse(choice: Any = None, *, is_parallel: bool | None = None) -> Tools:
    tools = parse_tools([tool(), tool("clock", parameters=None)], choice, is_parallel)
    assert tools is not None
    return tools


def test_the_choice_says_which_may_be_called() -> None:
    both = {"weather", "clock"}
    assert (parse().mode, parse().callable_names) == ("auto", both)
    assert parse("none").mode == "none"
    assert parse("required").max_calls == MAX_CALLS
    one = parse(named("clock"))
    assert (one.mode, one.callable_names, one.max_calls) == ("required", {"clock"}, 1)
    allowed = {"mode": "required", "tools": [named("weather")]}
    some = parse({"type": "allowed_tools", "allowed_tools": allowed})
    assert (some.mode, some.callable_names, some.max_calls) == ("required", {"weather"}, MAX_CALLS)
    assert len(some.functions) == 2
    assert parse(is_parallel=False).max_calls == 1


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_there_is_nothing_to_choose(tools: Any) -> None:
    for choice in (None, "none", "auto"):
        assert parse_tools(tools, choice, True) is None
    assert refusal(tools, "required") == ("invalid_value", "tool_choice")
    assert refusal(tools, named("f")) == ("invalid_value", "tool_choice")


F = "tools[0].function"


@pytest.mark.parametrize(
    ("tools", "code", "param"),
    [
        ("x", "invalid_type", "tools"),
        ([1], "invalid_type", "tools[0]"),
        ([tool()] * (MAX_TOOLS + 1), "array_above_max_length", "tools"),
        ([{}], "missing_required_parameter", "tools[0].type"),
        ([{"type": "custom", "custom": {}}], "unsupported_parameter", "tools[0].type"),
        ([{"type": "web_search"}], "unsupported_parameter", "tools[0].type"),
        ([{"type": "function"}], "missing_required_parameter", F),
        ([{"type": "function", "function": {}}], "missing_required_parameter", f"{F}.name"),
        ([tool() | {"cache": 1}], "unknown_parameter", "tools[0].cache"),
        ([tool(returns={})], "unknown_parameter", f"{F}.returns"),
        ([tool("a b")], "invalid_value", f"{F}.name"),
        ([tool("")], "invalid_value", f"{F}.name"),
        ([tool("x" * 65)], "invalid_value", f"{F}.name"),
        ([tool("<|im_end|>")], "invalid_value", f"{F}.name"),
        ([tool(5)], "invalid_type", f"{F}.name"),
        ([tool(), tool()], "invalid_value", "tools[1].function.name"),
        ([tool(description=1)], "invalid_type", f"{F}.description"),
        ([tool(description="x" * 20_000)], "string_above_max_length", f"{F}.description"),
        ([tool(strict="yes")], "invalid_type", f"{F}.strict"),
        ([tool(parameters=[])], "invalid_type", f"{F}.parameters"),
        ([tool(parameters={"type": "string"})], "invalid_json_schema", f"{F}.parameters"),
        ([tool(parameters={"$ref": "http://x/y"})], "invalid_json_schema", f"{F}.parameters"),
        (
            [tool(f"f{i}", parameters={"description": "x" * 60_000}) for i in range(5)],
            "invalid_json_schema",
            "tools",
        ),
    ],
)
def test_faulty_tools_are_refused_by_name(tools: Any, code: str, param: str) -> None:
    assert refusal(tools) == (code, param)


@pytest.mark.parametrize(
    ("choice", "code", "param"),
    [
        ("any", "invalid_value", "tool_choice"),
        (1, "invalid_type", "tool_choice"),
        ({}, "missing_required_parameter", "tool_choice.type"),
        ({"type": "custom"}, "unsupported_parameter", "tool_choice.type"),
        ({"type": "function"}, "missing_required_parameter", "tool_choice.function"),
        (named("nothing"), "invalid_value", "tool_choice.function.name"),
        (named("weather") | {"x": 1}, "unknown_parameter", "tool_choice.x"),
        (
            {"type": "allowed_tools"},
            "missing_required_parameter",
            "tool_choice.allowed_tools",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "some", "tools": []}},
            "invalid_value",
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            "invalid_value",
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("x")]}},
            "invalid_value",
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_faulty_choices_are_refused_by_name(choice: Any, code: str, param: str) -> None:
    assert refusal([tool()], choice) == (code, param)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(folder())


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(folder())


def folder() -> Path:
    return find_checkpoint(None).folder


def follows(
    answer: tuple[str, ...],
    tools: Tools,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    *,
    text: Any = None,
    place: Place = "turn",
) -> bool | None:
    """Whether an answer is of the form and may end there; None where it might go on."""
    constraint = parse_constraint(text, None)
    start_id, end_id = tokenizer.special[START], tokenizer.special[END]
    at: Place = "calls" if tools.mode == "required" else place
    form = answer_form(tools, constraint, CallFormat(start_id, end_id, at=at))
    matcher = start_matcher(vocabulary, form.grammar)
    for piece in answer:
        special = tokenizer.special.get(piece)
        for token_id in [special] if special is not None else tokenizer.encode_text(piece):
            if not matcher.try_consume_tokens([token_id]):
                return False
    return True if matcher.is_accepting() else None


CALL = '{"name": "weather", "arguments": {"city": "Seoul"}}'
CLOCK = '{"name":"clock","parameters":{}}'
TURN = (END, "\n", START, f"assistant{ARROW}")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((), True),
        (("Hello\n there",), True),
        (("Hello", END), True),
        (("Hello", END, "\n"), None),
        (("Hello", *TURN, CALL), True),
        (("Hello", *TURN, CALL, END), True),
        ((*TURN, f"[{CALL}, {CLOCK}]", END), True),
        ((*TURN, f"[{CALL},{CLOCK},{CALL}]"), True),
        ((ARROW, CALL, END), True),
        ((" -> tool/func and so on",), True),
        ((ARROW, "Hello"), False),
        (("Hello", START), False),
        (("Hello", END, "Hello"), False),
        (("Hello", END, END), False),
        (("Hello", END, "\n", START, "user"), False),
        ((*TURN, "[]"), False),
        ((*TURN, f"[{CALL}] and"), False),
        ((*TURN, CALL, CALL), False),
        ((*TURN, f"[{', '.join([CLOCK] * MAX_CALLS)}]"), True),
        ((*TURN, f"[{', '.join([CLOCK] * (MAX_CALLS + 1))}]"), False),
        ((*TURN, '{"name": "rain"'), False),
        ((*TURN, '{"name": "weather", "arguments": {}'), False),
        ((*TURN, '{"name": "weather", "arguments": {"city": 5'), False),
        ((*TURN, '{"name": "weather", "arguments": {"city": "서울", "days": 3}}'), True),
        ((*TURN, '{"name": "weather", "arguments": {"city": "a",  "d'), False),
        ((*TURN, '{"name": "clock", "arguments": {"x'), False),
        ((*TURN, '{"name":  "clock"'), False),
    ],
)
def test_an_answer_may_call(
    answer: tuple[str, ...], expected: bool | None, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    assert follows(answer, parse(), tokenizer, vocabulary) is expected


@pytest.mark.parametrize(
    ("choice", "is_parallel", "answer", "expected"),
    [
        ("required", None, (), None),
        ("required", None, (CALL,), True),
        ("required", None, (f"[{CALL}, {CLOCK}]", END), True),
        ("required", None, ("Hello",), False),
        ("required", None, (END,), False),
        ("required", False, (f"[{CALL}]", END), True),
        ("required", False, (f"[{CALL},",), False),
        (None, False, (*TURN, f"[{CALL},"), False),
        (named("clock"), None, (CLOCK,), True),
        (named("clock"), None, (CALL,), False),
        (named("clock"), None, (f"[{CLOCK},",), False),
    ],
)
def test_an_answer_must_call(
    choice: Any,
    is_parallel: bool | None,
    answer: tuple[str, ...],
    expected: bool | None,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
) -> None:
    tools = parse(choice, is_parallel=is_parallel)
    assert follows(answer, tools, tokenizer, vocabulary) is expected


def test_the_text_beside_calls_may_have_a_form(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    schema = {
        "name": "s",
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    text = {"type": "json_schema", "json_schema": schema}
    for answer, expected in (
        (('{"a":5}',), True),
        (('{"a":5}', *TURN, CALL), True),
        ((ARROW, CALL), True),
        (("Hello",), False),
        ((), None),
    ):
        assert follows(answer, parse(), tokenizer, vocabulary, text=text) is expected


def test_only_json_leaves_a_place_for_calls() -> None:
    for form in ({"grammar": 'start: "x"'}, {"regex": "x"}, {"choice": ["x"]}):
        constraint = parse_constraint(None, form)
        with pytest.raises(InvalidRequest) as caught:
            answer_form(parse(), constraint, CallFormat(3, 4))
        assert caught.value.param == f"structured_outputs.{next(iter(form))}"


def test_a_name_that_begins_another_one(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    both = parse_tools([tool("get"), tool("get_all")], "required", None)
    assert both is not None
    for name, expected in (("get", True), ("get_all", True), ("get_al", False)):
        call = CALL.replace("weather", name)
        assert follows((call,), both, tokenizer, vocabulary) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((" will call",), True),
        ((ARROW, "and so on"), True),
        ((" will call", *TURN, CALL), True),
    ],
)
def test_within_a_text_no_call_begins_at_once(
    answer: tuple[str, ...], expected: bool, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    assert follows(answer, parse(), tokenizer, vocabulary, place="within") is expected


@pytest.mark.parametrize(
    "schema", [{}, {"properties": {"a": {}}}, {"anyOf": [{"type": "string"}, {"type": "object"}]}]
)
def test_arguments_are_an_object_whatever_the_schema_says(
    schema: dict[str, Any], tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    tools = parse_tools([tool("f", parameters=schema)], "required", None)
    assert tools is not None
    for arguments, expected in (("{}", True), ("[]", False), ('"x"', False), ("null", False)):
        call = f'{{"name": "f", "arguments": {arguments}}}'
        assert follows((call,), tools, tokenizer, vocabulary) is expected


def test_schemas_are_measured_as_they_are_sent() -> None:
    description = {"type": "object", "description": "한" * 20_000}
    tools = parse_tools([tool(f"f{i}", parameters=description) for i in range(4)], None, None)
    assert tools is not None and len(tools.functions) == 4
