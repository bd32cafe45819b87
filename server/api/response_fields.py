"""What a request to /v1/responses may say: each field honoured, or refused by name.

What means the same in a chat request is read as one. `parse_response_request` is the only way from
a JSON object to a `ResponseRequest`. Must not know how an answer is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.api.places import Places
from server.api.response_input import (
    Conversation,
    chat_tool_choice,
    chat_tools,
    parse_input,
)
from server.api.schemas import (
    MAX_TOP_LOGPROBS,
    SHARED_FIELDS,
    UNSUPPORTED,
    ChatCompletionRequest,
    Flag,
    Integer,
    Text,
    check_names,
    check_together,
    is_neutral,
    translated,
)
from server.chat.grammar import Constraint, parse_format
from server.chat.prepare import ChatRequest
from server.errors import (
    InvalidRequest,
    InvalidType,
    UnknownParameter,
    UnsupportedParameter,
    quoted,
)

LOGPROBS: Final = "message.output_text.logprobs"
"""What `include` may ask for."""

_INCLUDABLE: Final = frozenset(
    {
        *("code_interpreter_call.outputs", "computer_call_output.output.image_url"),
        *("file_search_call.results", "message.input_image.image_url"),
        *("reasoning.encrypted_content", "web_search_call.action.sources"),
        "web_search_call.results",
    }
)
MAX_INCLUDED = 64

RESPONSE_SHARED_FIELDS: Final = (
    *(name for name in SHARED_FIELDS if name not in ("n", "stream_options")),
    "structured_outputs",
    "media_options",
)
"""The fields of a chat request that mean the same here."""

TOOL_FIELDS: Final = ("tools", "tool_choice", "parallel_tool_calls")
"""Those of a chat request that are written in another way here, or read with those."""


class ResponseStreamOptions(BaseModel):
    """A hint: nothing is padded, whatever it says."""

    model_config = ConfigDict(frozen=True)

    include_obfuscation: Flag | None = None
    include_usage: Any = None
    continuous_usage_stats: Any = None


class ResponseFields(BaseModel):
    """What a Responses request has to itself. Null means not given."""

    model_config = ConfigDict(frozen=True)

    input: Any = None
    instructions: Text | None = None
    max_output_tokens: Annotated[Integer, Field(ge=1, le=2**63 - 1)] | None = None
    text: Annotated[dict[str, Any], Field(strict=True)] | None = None
    include: Annotated[list[Text], Field(strict=True, max_length=MAX_INCLUDED)] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning: Annotated[dict[str, Any], Field(strict=True)] | None = None
    stream_options: ResponseStreamOptions | None = None


RESPONSE_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    name: UNSUPPORTED.get(name, ())
    for name in (*UNSUPPORTED, *ChatCompletionRequest.model_fields)
    if name not in (*RESPONSE_SHARED_FIELDS, *TOOL_FIELDS, *ResponseFields.model_fields)
} | {
    "access_programs": (),
    "add_generation_prompt": (True,),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "continue_final_message": (False,),
    "conversation": (),
    "echo": (False,),
    "image": (),
    "logprobs": (False,),
    "max_tool_calls": (),
    "n": (1,),
    "personality": (),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "truncation": ("disabled",),
}
"""The same as `UNSUPPORTED` for responses."""


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """The body of POST /v1/responses: `shared` is what it has in common with a chat.

    The `tools` and the `tool_choice` are as they were sent.
    """

    shared: ChatCompletionRequest
    own: ResponseFields
    conversation: Conversation
    constraint: Constraint | None
    text_format: Mapping[str, Any]
    tools: list[Any]
    tool_choice: Any
    parallel_tool_calls: bool

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.own.include or ())

    @property
    def places(self) -> Places:
        return self.conversation.places

    def to_chat_request(self) -> ChatRequest:
        """What the answer depends on. Refuses faulty options."""
        with self.places.named_in_errors():
            asked = self.shared.to_chat_request()
        if self.constraint is not None and asked.constraint is not None:
            raise InvalidRequest(
                "text.format and structured_outputs must not both be given.",
                param="structured_outputs",
            )
        return replace(
            asked,
            messages=self.conversation.messages,
            max_tokens=self.own.max_output_tokens,
            num_logprobs=(self.own.top_logprobs or 0) if self.has_logprobs else None,
            constraint=self.constraint or asked.constraint,
        )


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A valid request, and how many of its fields nobody knows."""

    request: ResponseRequest
    num_unknown: int


def parse_response_request(body: Mapping[str, Any], *, is_strict: bool) -> ParsedResponse:
    """The request in `body`; raises the contract's 400 for the first thing wrong with it."""
    own_fields = ResponseFields.model_fields
    honoured = (*RESPONSE_SHARED_FIELDS, *TOOL_FIELDS, *own_fields)
    num_unknown = check_names(body, honoured, RESPONSE_UNSUPPORTED, is_strict=is_strict)
    given = {name: body[name] for name in RESPONSE_SHARED_FIELDS if name in body}
    tools, tool_places = _chat_tools(body)
    try:
        shared = ChatCompletionRequest.model_validate(given | tools | {"messages": []})
        own = ResponseFields.model_validate(
            {name: body[name] for name in own_fields if name in body}
        )
    except ValidationError as error:
        raise translated(error, body) from None
    check_together(shared)
    _check_own(own, is_streamed=bool(shared.stream))
    constraint, text_format = _text_format(own.text)
    conversation = parse_input(own.input, own.instructions)
    places = Places({**conversation.places.sent, **tool_places})
    request = ResponseRequest(
        shared,
        own,
        replace(conversation, places=places),
        constraint,
        text_format,
        tools=body.get("tools") or [],
        tool_choice=body.get("tool_choice") or "auto",
        parallel_tool_calls=body.get("parallel_tool_calls") is not False,
    )
    return ParsedResponse(request, num_unknown)


def _chat_tools(body: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The `TOOL_FIELDS` as a chat has them, and where they were said."""
    given = {name: body[name] for name in TOOL_FIELDS if body.get(name) is not None}
    places: dict[str, str] = {}
    if "tools" in given:
        given["tools"], tool_places = chat_tools(given["tools"])
        places |= tool_places
    if "tool_choice" in given:
        given["tool_choice"], choice_places = chat_tool_choice(given["tool_choice"])
        places |= choice_places
    return given, places


def _check_own(own: ResponseFields, *, is_streamed: bool) -> None:
    """What no field shows by itself."""
    for index, name in enumerate(own.include or ()):
        param = f"include[{index}]"
        if name in _INCLUDABLE:
            raise UnsupportedParameter(f"{name} cannot be included by this server.", param=param)
        if name != LOGPROBS:
            raise InvalidRequest(f"{quoted(name)} cannot be included.", param=param)
    if own.top_logprobs and LOGPROBS not in (own.include or ()):
        raise InvalidRequest(
            f"top_logprobs is allowed only when include has {LOGPROBS}.", param="top_logprobs"
        )
    for name, said in (own.reasoning or {}).items():
        neutral = ("none",) if name == "effort" else ()
        if not is_neutral(said, neutral):
            param = f"reasoning.{quoted(name)[1:-1]}"
            raise UnsupportedParameter(f"{param} is not supported: nothing reasons.", param=param)
    if own.stream_options is not None:
        if not is_streamed:
            raise InvalidRequest(
                "stream_options is allowed only when stream is true.", param="stream_options"
            )
        for name, said in (
            ("include_usage", own.stream_options.include_usage),
            ("continuous_usage_stats", own.stream_options.continuous_usage_stats),
        ):
            if said is not None:
                param = f"stream_options.{name}"
                raise UnsupportedParameter(f"{param} is not supported here.", param=param)


def _text_format(text: Mapping[str, Any] | None) -> tuple[Constraint | None, Mapping[str, Any]]:
    """The form of the answer, and how it was said."""
    text = text or {}
    for name in text:
        if name not in ("format", "verbosity"):
            raise UnknownParameter(
                f"text has the unknown key {quoted(name)}.", param=f"text.{quoted(name)[1:-1]}"
            )
    verbosity = text.get("verbosity")
    if not isinstance(verbosity, str | None):
        raise InvalidType("text.verbosity must be a string.", param="text.verbosity")
    if verbosity not in (None, "medium"):
        raise UnsupportedParameter(
            "text.verbosity is not supported by this server.", param="text.verbosity"
        )
    constraint = parse_format(text.get("format"), "text.format")
    return constraint, text.get("format") or {"type": "text"}
