"""The functions a request offers: `tools`, `tool_choice` and `parallel_tool_calls`.

`parse_tools` judges them; `answer_form` makes of them the form of an answer that may, or must,
call one. Calls have the family's form (`chat.calls`), with the arguments held to the function's own
schema. Must not know how the template shows a function, nor how a grammar is proved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from server.chat.calls import ARGUMENT_KEYS, ARROW, CallFormat, Place
from server.chat.fields import as_name, as_object, as_string, refuse_unknown, required
from server.chat.grammar import Constraint, check_schema, json_rule, lark_grammar, schema_bytes
from server.errors import (
    ArrayTooLong,
    InvalidRequest,
    InvalidSchema,
    InvalidType,
    UnsupportedParameter,
)

MAX_TOOLS: Final = 128
MAX_DESCRIPTION_CHARS: Final = 16_384
MAX_SCHEMAS_BYTES: Final = 256 * 1024
"""Of all functions of a request together; each is held to the limits of a schema besides."""
MAX_CALLS: Final = 16
"""In one answer: a weak model would go on with a list for ever."""

NO_PARAMETERS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
"""OpenAI: a function without `parameters` takes none."""

_UNLIKE_CALLS: Final = (
    'FREE | ""\n'
    r"FREE: /(.|\n)+/ & ~/" + ARROW.replace("/", r"\/").replace("\n", r"\n") + r"(.|\n)*/"
)
_TEXTS: Final[Mapping[Place, str]] = {
    "turn": _UNLIKE_CALLS,
    "within": 'FREE | ""\nFREE: /(.|\n)+/',
    "calls": "",
}
"""What is free as text, by where the answer begins."""

_STARTS: Final[Mapping[Place, str]] = {
    "turn": "text ({end} turn?)? | {arrow} calls",
    "within": "text ({end} turn?)?",
    "calls": "calls",
}

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Function:
    """What can be called. `parameters` is a JSON schema of an object, None as it was not given."""

    name: str
    description: str
    parameters: dict[str, Any] | None
    path: str

    @property
    def schema(self) -> dict[str, Any]:
        return NO_PARAMETERS if self.parameters is None else self.parameters


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that the model is told of, and which of them it may or must call."""

    functions: tuple[Function, ...]
    mode: Mode = "auto"
    callable_names: frozenset[str] = frozenset()
    max_calls: int = MAX_CALLS

    @property
    def callables(self) -> tuple[Function, ...]:
        return tuple(each for each in self.functions if each.name in self.callable_names)


def parse_tools(tools: object, choice: object, is_parallel: bool | None) -> Tools | None:
    """None where none are offered; raises the contract's 400 for what is wrong."""
    functions = _functions(tools)
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice is allowed only with tools.", param="tool_choice")
        return None
    names = frozenset(function.name for function in functions)
    mode, allowed, is_one = _choice(choice, names)
    max_calls = 1 if is_one or is_parallel is False else MAX_CALLS
    return Tools(functions, mode, allowed, max_calls)


def _functions(tools: object) -> tuple[Function, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidType("tools must be an array.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise ArrayTooLong(f"At most {MAX_TOOLS} tools are accepted.", param="tools")
    functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            raise InvalidRequest(
                f"The function {function.name} is given twice.", param=f"{function.path}.name"
            )
        seen.add(function.name)
    num_bytes = sum(schema_bytes(each.schema) for each in functions)
    if num_bytes > MAX_SCHEMAS_BYTES:
        raise InvalidSchema(
            f"The parameters of all tools must have at most {MAX_SCHEMAS_BYTES} bytes.",
            param="tools",
        )
    return functions


def _function(value: object, path: str) -> Function:
    fields, path = _function_of(value, path)
    refuse_unknown(fields, path, ("name", "description", "parameters", "strict"))
    name = as_name(required(fields, "name", f"{path}.name"), f"{path}.name")
    description = fields.get("description")
    if description is not None:
        as_string(description, f"{path}.description", max_chars=MAX_DESCRIPTION_CHARS)
    # A schema is kept to whether it is called strict or not.
    if not isinstance(fields.get("strict"), bool | None):
        raise InvalidType("This must be true or false.", param=f"{path}.strict")
    parameters = fields.get("parameters")
    if parameters is not None:
        parameters = check_schema(parameters, f"{path}.parameters")
        if parameters.get("type", "object") != "object":
            raise InvalidSchema(
                f"{path}.parameters must be the schema of an object.", param=f"{path}.parameters"
            )
    return Function(name, description or "", parameters, path)


def _function_of(value: object, path: str) -> tuple[Mapping[str, Any], str]:
    """What a tool says of its function, and where."""
    tool = as_object(value, path)
    kind = required(tool, "type", f"{path}.type")
    if kind != "function":
        raise UnsupportedParameter(
            "Only tools of the type function are supported.", param=f"{path}.type"
        )
    refuse_unknown(tool, path, ("type", "function"))
    path = f"{path}.function"
    return as_object(required(tool, "function", path), path), path


def _choice(choice: object, names: frozenset[str]) -> tuple[Mode, frozenset[str], bool]:
    """The mode, the functions that may be called, and whether it is one call that is asked for."""
    path = "tool_choice"
    if choice is None:
        return "auto", names, False
    if isinstance(choice, str):
        for mode in get_args(Mode):
            if choice == mode:
                return mode, names, False
        raise InvalidRequest(
            f"tool_choice must be {', '.join(get_args(Mode))}, or an object.", param=path
        )
    fields = as_object(choice, path)
    if fields.get("type") == "allowed_tools":
        refuse_unknown(fields, path, ("type", "allowed_tools"))
        return _allowed(fields, names)
    return "required", frozenset({_named(fields, path, names)}), True


def _allowed(choice: Mapping[str, Any], names: frozenset[str]) -> tuple[Mode, frozenset[str], bool]:
    path = "tool_choice.allowed_tools"
    fields = as_object(required(choice, "allowed_tools", path), path)
    refuse_unknown(fields, path, ("mode", "tools"))
    mode = required(fields, "mode", f"{path}.mode")
    if mode not in ("auto", "required"):
        raise InvalidRequest("This must be auto or required.", param=f"{path}.mode")
    tools = required(fields, "tools", f"{path}.tools")
    if not isinstance(tools, list):
        raise InvalidType("This must be an array.", param=f"{path}.tools")
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise InvalidRequest(f"These must be 1 to {MAX_TOOLS} tools.", param=f"{path}.tools")
    allowed = {_named(each, f"{path}.tools[{i}]", names) for i, each in enumerate(tools)}
    return "auto" if mode == "auto" else "required", frozenset(allowed), False


def _named(value: object, path: str, names: frozenset[str]) -> str:
    """One of the functions, by a tool that says only its name."""
    fields, path = _function_of(value, path)
    refuse_unknown(fields, path, ("name",))
    name = as_name(required(fields, "name", f"{path}.name"), f"{path}.name")
    if name not in names:
        raise InvalidRequest(f"{name} is not among the tools.", param=f"{path}.name")
    return name


def answer_form(tools: Tools, text: Constraint | None, calls: CallFormat) -> Constraint:
    """That of an answer that may call `tools`, or must; not of the mode "none".

    `text` is the form of what is not a call; None where that is free. Of forms only JSON's cannot
    begin like a call.
    """
    if text is not None and text.json_rule is None:
        raise InvalidRequest(f"{text.param} cannot be combined with tools.", param=text.param)
    start, end = f"<[{calls.turn_start_id}]>", f"<[{calls.turn_end_id}]>"
    arrow = json.dumps(ARROW)
    told = _TEXTS[calls.at] if text is None else text.json_rule
    rules = [
        f"start: {_STARTS[calls.at].format(end=end, arrow=arrow)}",
        f"calls: {_list_rule(tools.max_calls)} {end}?",
    ]
    if calls.at != "calls":
        rules += [f'turn: "\\n" {start} "assistant" {arrow} calls', f"text: {told}"]
    names = [f"call_{index}" for index in range(len(tools.callables))]
    rules.append(f"call: {' | '.join(names)}")
    for name, function in zip(names, tools.callables, strict=True):
        head = json.dumps(f'"{function.name}"')
        rules += [
            f'{name}: "{{\\"name\\":" SPACE? {head} "," SPACE? KEY SPACE? {name}_arguments "}}"',
            f"{name}_arguments: {arguments_form(function).json_rule}",
        ]
    keys = (json.dumps(f'"{key}":') for key in ARGUMENT_KEYS)
    rules += [f"KEY: {' | '.join(keys)}", 'SPACE: " "']
    return Constraint(lark_grammar("\n".join(rules)), "tools")


NO_CALLS: Final = Constraint(lark_grammar(f"start: text\ntext: {_UNLIKE_CALLS}"), "tool_choice")
"""The form of an answer whose turn begins there and that calls nothing, though it knows tools."""


def arguments_form(function: Function) -> Constraint:
    """That of the arguments of one function; spaces as the family writes them, or none."""
    # An object, also where the schema does not say so: it was refused if it says something else.
    schema = {"type": "object"} | function.schema
    rule = json_rule(schema, separators=(", ?", ": ?"))
    return Constraint(lark_grammar(f"start: {rule}"), f"{function.path}.parameters", rule)


def _list_rule(max_calls: int) -> str:
    more = "" if max_calls == 1 else f'("," SPACE? call){{0,{max_calls - 1}}}'
    return f'(call | "[" call {more} "]")'
