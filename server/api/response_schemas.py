"""What stands in requests to /v1/responses and their answers, as JSON Schema.

The same as `wire_schemas` for the routes of responses. Must not know routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from server.api.response_fields import (
    LOGPROBS,
    MAX_INCLUDED,
    RESPONSE_SHARED_FIELDS,
    RESPONSE_UNSUPPORTED,
    ResponseFields,
    ResponseStreamOptions,
)
from server.api.response_input import MAX_ITEMS, STATUSES
from server.api.response_words import NEVER_SAID
from server.api.wire_schemas import (
    ANYTHING,
    CALL_ID,
    CHOICE_WORDS,
    COUNT,
    FLAG,
    FUNCTION_FIELDS,
    FUNCTION_NAME,
    JSON_SCHEMA_FIELDS,
    NOTES,
    NULL,
    TEXT,
    TEXT_PARTS,
    Schema,
    any_part,
    chat_fields,
    fields_of,
    list_of,
    neutral_only,
    one_of,
    or_null,
    record,
    reference,
)
from server.chat.parts import MAX_NAME_CHARS, MAX_PARTS
from server.chat.tools import MAX_TOOLS

NOTES_OF_RESPONSES: Final[Mapping[str, str]] = {
    "input": "a text, or messages, function calls and their outputs",
    "instructions": "a system message before all others",
    "max_output_tokens": "how long the answer may become; no more than the context leaves",
    "text": "`format`: `text`, `json_object` or `json_schema`, which is always kept to",
    "include": f"`{LOGPROBS}`",
    "top_logprobs": "likeliest tokens at each place; only with what `include` names",
    "reasoning": "nothing reasons: only `effort: none`",
    "stream_options": "`include_obfuscation` changes nothing; only with `stream`",
    "tools": "functions, each held to its schema",
    "tool_choice": NOTES["tool_choice"],
    "parallel_tool_calls": NOTES["parallel_tool_calls"],
}

_ECHOED: Final[Mapping[str, Schema]] = {
    "id": or_null(TEXT),
    "status": or_null(one_of(*STATUSES)),
}


def _closed(properties: Mapping[str, Schema], *required: str) -> Schema:
    return record(properties, required=required, is_closed=True)


def _message(roles: tuple[str, ...], part: str, *, least: int = 0, is_null: bool = False) -> Schema:
    text = {"type": "string", "minLength": least}
    parts = list_of(reference(part), minItems=least, maxItems=MAX_PARTS)
    forms = [text, parts, NULL] if is_null else [text, parts]
    fields: Mapping[str, Schema] = {
        "type": one_of("message", None),
        **_ECHOED,
        "role": one_of(*roles),
        "content": {"anyOf": forms},
        "phase": NULL,
    }
    return _closed(fields, *(("role",) if is_null else ("role", "content")))


_ARGUMENTS: Final[Schema] = {"type": "string", "description": "The JSON of an object."}
_CALL: Final[Mapping[str, Schema]] = {
    "type": one_of("function_call"),
    "call_id": CALL_ID,
    "name": {"type": "string", "maxLength": MAX_NAME_CHARS},
    "arguments": _ARGUMENTS,
}
_NAMED: Final = _closed({"type": one_of("function"), "name": FUNCTION_NAME}, "type", "name")

FORMS: Final[Mapping[str, Schema]] = {
    "OutputTextPart": _closed(
        {
            "type": one_of("output_text"),
            "text": TEXT,
            "annotations": one_of([], None),
            "logprobs": ANYTHING,
        },
        "type",
        "text",
    ),
    "AssistantPart": any_part((*TEXT_PARTS, "output_text"), output_text="OutputTextPart"),
    "InputSystemMessage": _message(("system", "developer"), "TextContentPart"),
    "InputUserMessage": _message(("user",), "ContentPart", least=1),
    "InputAssistantMessage": _message(("assistant",), "AssistantPart", is_null=True),
    "InputFunctionCall": _closed(
        {**_CALL, **_ECHOED, "async": one_of(False, None), "caller": NULL, "namespace": NULL},
        *_CALL,
    ),
    "InputFunctionCallOutput": _closed(
        {
            "type": one_of("function_call_output"),
            **_ECHOED,
            "call_id": TEXT,
            "output": {"anyOf": [TEXT, list_of(reference("TextContentPart"), maxItems=MAX_PARTS)]},
            "name": or_null(TEXT),
            "caller": NULL,
            "namespace": NULL,
        },
        "type",
        "call_id",
        "output",
    ),
    "InputItem": {
        "anyOf": [
            reference(name)
            for name in (
                "InputSystemMessage",
                "InputUserMessage",
                "InputAssistantMessage",
                "InputFunctionCall",
                "InputFunctionCallOutput",
            )
        ]
    },
    "FunctionTool": _closed(
        {
            "type": one_of("function"),
            **FUNCTION_FIELDS,
            "allowed_callers": NULL,
            "async": one_of(False, None),
            "defer_loading": one_of(False, None),
            "output_schema": NULL,
        },
        "type",
        "name",
    ),
    "NamedFunction": _NAMED,
    "AllowedFunctions": _closed(
        {
            "type": one_of("allowed_tools"),
            "mode": one_of("auto", "required"),
            "tools": list_of(reference("NamedFunction"), minItems=1, maxItems=MAX_TOOLS),
        },
        "type",
        "mode",
        "tools",
    ),
    "PlainTextFormat": _closed(
        {"type": one_of("text", "json_object"), **dict.fromkeys(JSON_SCHEMA_FIELDS, NULL)}, "type"
    ),
    "JsonSchemaTextFormat": _closed(
        {"type": one_of("json_schema"), **JSON_SCHEMA_FIELDS}, "type", "name", "schema"
    ),
    "TextOptions": _closed(
        {
            "format": {
                "anyOf": [reference("PlainTextFormat"), reference("JsonSchemaTextFormat"), NULL]
            },
            "verbosity": one_of("medium", None),
        }
    ),
}

BY_HAND: Final[Mapping[str, Schema]] = {
    "input": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            list_of(reference("InputItem"), minItems=1, maxItems=MAX_ITEMS),
        ]
    },
    "text": or_null(reference("TextOptions")),
    "include": or_null(list_of(one_of(LOGPROBS), maxItems=MAX_INCLUDED)),
    "reasoning": or_null(
        {
            "type": "object",
            "properties": {"effort": one_of("none", None)},
            "additionalProperties": NULL,
        }
    ),
    "include_usage": NULL,
    "continuous_usage_stats": NULL,
}

_TOOLS: Final[Mapping[str, Schema]] = {
    "tools": or_null(list_of(reference("FunctionTool"), maxItems=MAX_TOOLS)),
    "tool_choice": {
        "anyOf": [CHOICE_WORDS, reference("NamedFunction"), reference("AllowedFunctions"), NULL]
    },
    "parallel_tool_calls": or_null(FLAG),
}


def response_fields() -> dict[str, Schema]:
    """The fields that a request honours."""
    chat = chat_fields()
    tools = {
        name: schema | {"description": NOTES_OF_RESPONSES[name]} for name, schema in _TOOLS.items()
    }
    own = fields_of(ResponseFields, NOTES_OF_RESPONSES, BY_HAND)
    return {name: chat[name] for name in RESPONSE_SHARED_FIELDS} | tools | own


_OUTPUT_MESSAGE: Final = record(
    {
        "id": TEXT,
        "type": one_of("message"),
        "status": one_of(*STATUSES),
        "role": one_of("assistant"),
        "content": list_of(
            record(
                {
                    "type": one_of("output_text"),
                    "text": TEXT,
                    "annotations": list_of(ANYTHING),
                    "logprobs": list_of({"type": "object"}),
                }
            )
        ),
    }
)
_DETAILS: Final = ("cached_tokens", "cache_write_tokens")
_KINDS: Final = ("text_tokens", "image_tokens", "video_tokens")

ANSWERS: Final[Mapping[str, Schema]] = {
    "Response": record(
        {
            "id": TEXT,
            "object": one_of("response"),
            "created_at": COUNT,
            "completed_at": or_null(COUNT),
            "status": one_of(*STATUSES),
            "error": NULL,
            "incomplete_details": or_null(record({"reason": one_of("max_output_tokens")})),
            "model": TEXT,
            "instructions": or_null(TEXT),
            "output": list_of(reference("OutputItem")),
            "usage": or_null(reference("ResponseUsage")),
            "max_output_tokens": or_null(COUNT),
            "temperature": {"type": "number"},
            "top_p": {"type": "number"},
            "top_logprobs": COUNT,
            "text": {"type": "object"},
            "tools": list_of({"type": "object"}),
            "tool_choice": ANYTHING,
            "parallel_tool_calls": FLAG,
            "reasoning": {"type": "object"},
            "background": one_of(False),
            "store": one_of(False),
            "truncation": one_of("disabled"),
            "service_tier": one_of("default", None),
            "metadata": {"type": "object", "additionalProperties": TEXT},
            "user": or_null(TEXT),
            "safety_identifier": or_null(TEXT),
            "prompt_cache_key": or_null(TEXT),
            **dict.fromkeys(NEVER_SAID, NULL),
        }
    ),
    "OutputItem": {"anyOf": [reference("OutputMessage"), reference("OutputFunctionCall")]},
    "OutputMessage": _OUTPUT_MESSAGE,
    "OutputFunctionCall": record({"id": TEXT, **_CALL, "status": one_of(*STATUSES)}),
    "ResponseUsage": record(
        {
            "input_tokens": COUNT,
            "input_tokens_details": record(dict.fromkeys((*_DETAILS, *_KINDS), COUNT)),
            "output_tokens": COUNT,
            "output_tokens_details": record({"reasoning_tokens": COUNT}),
            "total_tokens": COUNT,
            "media": list_of(reference("MediaItem")),
        },
        required=(
            "input_tokens",
            "input_tokens_details",
            "output_tokens",
            "output_tokens_details",
            "total_tokens",
        ),
    ),
    "ResponseEvent": record({"type": TEXT, "sequence_number": COUNT}),
    "InputTokens": record({"object": one_of("response.input_tokens"), "input_tokens": COUNT}),
}


def response_schemas(*, is_strict: bool) -> dict[str, Schema]:
    """By name, what the routes of responses refer to beside `wire_schemas`."""
    return {
        "ResponseRequest": record(
            {**response_fields(), **neutral_only(RESPONSE_UNSUPPORTED)},
            required=("model", "input"),
            is_closed=is_strict,
        ),
        "ResponseStreamOptions": record(
            fields_of(ResponseStreamOptions, {}, BY_HAND), required=(), is_closed=is_strict
        ),
        **FORMS,
        **ANSWERS,
    }
