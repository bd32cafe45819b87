"""What a Responses request says in items and flat tools, as the messages and tools of a chat.

Only the form of items is judged here; what a message may hold is judged where chats are. `places`
lead from a chat's paths back to the caller's. Must not know how an answer is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from server.api.places import Places
from server.api.schemas import is_neutral
from server.chat.fields import as_object, as_string, required
from server.errors import (
    ArrayTooLong,
    InvalidRequest,
    InvalidType,
    MissingParameter,
    UnknownParameter,
    UnsupportedParameter,
    quoted,
)

MAX_ITEMS = 1_024
ROLES: Final = ("user", "assistant", "system", "developer")
STATUSES: Final = ("in_progress", "completed", "incomplete")

UNSUPPORTED_ITEM_TYPES: Final = frozenset(
    {
        *("additional_tools", "apply_patch_call", "apply_patch_call_output"),
        *("code_interpreter_call", "compaction", "compaction_trigger", "computer_call"),
        "configuration_update",
        *("computer_call_output", "custom_tool_call", "custom_tool_call_output"),
        *("file_search_call", "image_generation_call", "item_reference", "local_shell_call"),
        *("local_shell_call_output", "mcp_approval_request", "mcp_approval_response", "mcp_call"),
        *("mcp_list_tools", "program", "program_output", "reasoning", "shell_call"),
        *("shell_call_output", "tool_search_call", "tool_search_output", "web_search_call"),
    }
)
UNSUPPORTED_TOOL_TYPES: Final = frozenset(
    {
        *("apply_patch", "code_interpreter", "computer", "computer_use_preview", "custom"),
        *("file_search", "image_generation", "local_shell", "mcp", "namespace", "shell"),
        *("programmatic_tool_calling", "tool_search", "web_search", "web_search_2025_08_26"),
        *("web_search_preview", "web_search_preview_2025_03_11"),
    }
)
UNSUPPORTED_CHOICE_TYPES: Final = UNSUPPORTED_TOOL_TYPES | {"computer_use"}

_ECHOED: Final = frozenset({"type", "id", "status"})
"""What an item says that was sent as output before: the answer does not depend on it."""

_NOT_HONOURED: Final[Mapping[str, tuple[object, ...]]] = {
    "allowed_callers": (),
    "annotations": ([],),
    "async": (False,),
    "caller": (),
    "defer_loading": (False,),
    "namespace": (),
    "output_schema": (),
    "phase": (),
}
"""Known fields of items, parts and tools -> the values, besides null, that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a chat request, and where the caller said them."""

    messages: tuple[Mapping[str, Any], ...]
    places: Places


@dataclass(frozen=True, slots=True)
class _Draft:
    messages: list[dict[str, Any]] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=lambda: {"messages": "input"})

    def add(self, message: dict[str, Any], path: str) -> str:
        """Its path among the messages, from which `path` is now known."""
        own_path = f"messages[{len(self.messages)}]"
        self.messages.append(message)
        self.sent[own_path] = path
        return own_path


def parse_input(value: object, instructions: str | None) -> Conversation:
    """The conversation, `instructions` first; raises a 400 for the first item that is none."""
    draft = _Draft()
    if instructions is not None:
        path = draft.add({"role": "system", "content": instructions}, "instructions")
        draft.sent[f"{path}.content"] = "instructions"
    if isinstance(value, str):
        path = draft.add({"role": "user", "content": value}, "input")
        draft.sent[f"{path}.content"] = "input"
        return Conversation(tuple(draft.messages), Places(draft.sent))
    if value is None:
        raise MissingParameter("input is required.", param="input")
    if not isinstance(value, list):
        raise InvalidType("input must be a string or an array of items.", param="input")
    if not value:
        raise InvalidRequest("input must not be empty.", param="input")
    num_left = MAX_ITEMS - len(draft.messages)
    if len(value) > num_left:
        beside = " beside instructions" if draft.messages else ""
        raise ArrayTooLong(f"input must have at most {num_left} items{beside}.", param="input")
    for index, each in enumerate(value):
        path = f"input[{index}]"
        item = as_object(each, path)
        _ITEM_TYPES[_item_type(item, path)](draft, item, path)
    return Conversation(tuple(draft.messages), Places(draft.sent))


def _item_type(item: Mapping[str, Any], path: str) -> str:
    """A message may leave it out."""
    name = item.get("type")
    path = f"{path}.type"
    if name is None:
        return "message"
    if not isinstance(name, str):
        raise InvalidType(f"{path} must be a string.", param=path)
    if name in UNSUPPORTED_ITEM_TYPES:
        raise UnsupportedParameter(f"Items of the type {name} are not supported.", param=path)
    if name not in _ITEM_TYPES:
        raise InvalidRequest(
            f"{quoted(name)} is not an item type: use {', '.join(_ITEM_TYPES)}.", param=path
        )
    return name


def _add_message(draft: _Draft, item: Mapping[str, Any], path: str) -> None:
    _check_fields(item, path, {*_ECHOED, "role", "content", "phase"})
    role, content = item.get("role"), item.get("content")
    if isinstance(role, str) and role not in ROLES:
        raise InvalidRequest(
            f"{quoted(role)} is not a role: use {', '.join(ROLES)}.", param=f"{path}.role"
        )
    if isinstance(content, list):
        content = [
            _part(each, f"{path}.content[{index}]", role) for index, each in enumerate(content)
        ]
    elif not isinstance(content, str | None):
        raise InvalidType(
            f"{path}.content must be a string or an array of parts.", param=f"{path}.content"
        )
    draft.add({"role": role, "content": content}, path)


def _part(part: object, path: str, role: object) -> object:
    """The same as a chat has it; it is judged there."""
    if not isinstance(part, dict) or part.get("type") != "output_text":
        return part
    _check_fields(part, path, {"type", "text", "annotations", "logprobs"})
    if role != "assistant":
        raise InvalidRequest(
            "Only assistant messages have parts of the type output_text.", param=f"{path}.type"
        )
    return {"type": "text", "text": part.get("text")}


def _add_call(draft: _Draft, item: Mapping[str, Any], path: str) -> None:
    """A call belongs to the turn that it was made in: the assistant's, where that is the last."""
    _check_fields(item, path, {*_ECHOED, *_CALL_FIELDS, "async", "caller", "namespace"})
    call_id, name, arguments = (_string(item, each, path) for each in _CALL_FIELDS)
    call = {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    if not draft.messages or draft.messages[-1]["role"] != "assistant":
        draft.add({"role": "assistant", "content": None}, path)
    calls: list[object] = draft.messages[-1].setdefault("tool_calls", [])
    own_path = f"messages[{len(draft.messages) - 1}].tool_calls"
    draft.sent.setdefault(own_path, path)
    draft.sent[f"{own_path}[{len(calls)}]"] = path
    draft.sent[f"{own_path}[{len(calls)}].function"] = path
    draft.sent[f"{own_path}[{len(calls)}].id"] = f"{path}.call_id"
    calls.append(call)


def _add_output(draft: _Draft, item: Mapping[str, Any], path: str) -> None:
    _check_fields(item, path, {*_ECHOED, "call_id", "output", "name", "caller", "namespace"})
    call_id, output = _string(item, "call_id", path), item.get("output")
    if output is None:
        raise MissingParameter(f"{path}.output is required.", param=f"{path}.output")
    if not isinstance(output, str | list):
        raise InvalidType(
            f"{path}.output must be a string or an array of parts.", param=f"{path}.output"
        )
    message = {"role": "tool", "tool_call_id": call_id, "content": output}
    if item.get("name") is not None:
        message["name"] = item["name"]
    own_path = draft.add(message, path)
    draft.sent[f"{own_path}.role"] = f"{path}.type"
    draft.sent[f"{own_path}.content"] = f"{path}.output"
    draft.sent[f"{own_path}.tool_call_id"] = f"{path}.call_id"


_CALL_FIELDS: Final = ("call_id", "name", "arguments")
_ITEM_TYPES: Final[Mapping[str, Callable[[_Draft, Mapping[str, Any], str], None]]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_output,
}


def chat_tools(tools: object) -> tuple[list[dict[str, Any]], Mapping[str, str]]:
    """Flat tools as a chat has them, and where in the request what is in them was said."""
    if not isinstance(tools, list):
        raise InvalidType("tools must be an array.", param="tools")
    chat: list[dict[str, Any]] = []
    for index, each in enumerate(tools):
        path = f"tools[{index}]"
        tool = as_object(each, path)
        _check_function(tool, path, UNSUPPORTED_TOOL_TYPES)
        not_honoured = {"allowed_callers", "async", "defer_loading", "output_schema"}
        _check_fields(tool, path, {"type", *_TOOL_FIELDS, *not_honoured})
        function = {name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None}
        chat.append({"type": "function", "function": function})
    return chat, {f"tools[{index}].function": f"tools[{index}]" for index in range(len(chat))}


_TOOL_FIELDS: Final = ("name", "description", "parameters", "strict")


def chat_tool_choice(choice: object) -> tuple[object, Mapping[str, str]]:
    """A chat's form of it, and where what is in it was said; words are the same in both."""
    if not isinstance(choice, dict):
        return choice, {}
    if choice.get("type") == "allowed_tools":
        _check_fields(choice, "tool_choice", {"type", "mode", "tools"})
        tools = choice.get("tools")
        places = {"tool_choice.allowed_tools": "tool_choice"}
        if isinstance(tools, list):
            paths = [f"tool_choice.tools[{index}]" for index in range(len(tools))]
            tools = [_chat_function(*each) for each in zip(tools, paths, strict=True)]
            places |= {
                f"tool_choice.allowed_tools.tools[{index}].function": path
                for index, path in enumerate(paths)
            }
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}, places
    return _chat_function(choice, "tool_choice"), {"tool_choice.function": "tool_choice"}


def _chat_function(value: object, path: str) -> dict[str, Any]:
    """A flat tool of which only the name is said."""
    tool = as_object(value, path)
    _check_function(tool, path, UNSUPPORTED_CHOICE_TYPES)
    _check_fields(tool, path, {"type", "name"})
    return {"type": "function", "function": {"name": _string(tool, "name", path)}}


def _check_function(value: Mapping[str, Any], path: str, unsupported: Collection[str]) -> None:
    name, path = _string(value, "type", path), f"{path}.type"
    if name in unsupported:
        raise UnsupportedParameter(f"Tools of the type {name} are not supported.", param=path)
    if name != "function":
        raise InvalidRequest(f"{path} must be function, not {quoted(name)}.", param=path)


def _check_fields(value: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    for name, said in value.items():
        # The name is the client's, so that the path shows no more of it than a message may.
        place = f"{path}.{quoted(name)[1:-1]}"
        if name not in known:
            raise UnknownParameter(f"{quoted(name)} is not known here.", param=place)
        if name in _NOT_HONOURED and not is_neutral(said, _NOT_HONOURED[name]):
            raise UnsupportedParameter(f"{place} is not supported by this server.", param=place)
        if name == "id" and not isinstance(said, str | None):
            raise InvalidType(f"{place} must be a string.", param=place)
        if name == "status" and said is not None and said not in STATUSES:
            raise InvalidRequest(f"{place} must be one of {', '.join(STATUSES)}.", param=place)


def _string(value: Mapping[str, Any], name: str, path: str) -> str:
    return as_string(required(value, name, f"{path}.{name}"), f"{path}.{name}")
