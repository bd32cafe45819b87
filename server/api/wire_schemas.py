"""What stands in requests and answers, as JSON Schema for the OpenAPI document.

The fields of chat and completion requests come from the models that parse them; what is parsed by
hand stands in literal tables here, with the limits of the code that parses it. A schema is never
narrower than the server: what breaks one is refused. Must not know routes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeAlias, get_args

from pydantic import BaseModel

from server import errors
from server.api.files import EXPIRY_RANGE_S, PURPOSES
from server.api.limits import (
    CHAT_CONSTANTS,
    ENGINE_SETTINGS,
    HTTP_CONSTANTS,
    HTTP_SETTINGS,
    MEDIA_SETTINGS,
)
from server.api.schemas import (
    COMPLETION_UNSUPPORTED,
    MAX_METADATA,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    MAX_PROMPTS,
    MAX_SALT_BYTES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_USER_BYTES,
    SHARED_FIELDS,
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionFields,
    StreamOptions,
)
from server.api.tokenize import CONVERSATION_FIELDS, TOKENIZE_UNSUPPORTED
from server.chat.grammar import MAX_ENUM_VALUES, MAX_REGEX_CHARS, MAX_SCHEMA_BYTES
from server.chat.options import FIELDS_OF, MAX_FPS, MIN_FPS, Detail
from server.chat.parts import (
    FIELDS_OF_ROLE,
    HINT_FIELDS,
    MAX_CALL_ID_CHARS,
    MAX_CALLS,
    MAX_FILENAME_CHARS,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_PARTS,
    UNSUPPORTED_MESSAGE_FIELDS,
    OnError,
)
from server.chat.tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS, Mode

Schema: TypeAlias = dict[str, Any]

_INT64_MAX = 2**63 - 1
NULL: Final[Schema] = {"type": "null"}
ANYTHING: Final[Schema] = {}
TEXT: Final[Schema] = {"type": "string"}
FLAG: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
CALL_ID: Final[Schema] = {"type": "string", "maxLength": MAX_CALL_ID_CHARS}
_SOURCE: Final[Schema] = {"type": "string", "minLength": 1}
_KEYWORDS: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
"""pydantic's own words, which it leaves where a validator stands before a bound."""


def reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def one_of(*values: object) -> Schema:
    """One of these values, each kind of them in a form of its own, as makers of clients want it."""
    texts = [value for value in values if isinstance(value, str)]
    forms: list[Schema] = [{"type": "string", "enum": texts}] if texts else []
    forms += [_exactly(value) for value in values if not isinstance(value, str)]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _exactly(value: object) -> Schema:
    match value:
        case None:
            return NULL
        case bool():
            return {"type": "boolean", "const": value}
        case []:
            return {"type": "array", "items": {}, "maxItems": 0}
        case [only]:
            return {"type": "array", "items": one_of(only), "minItems": 1, "maxItems": 1}
        case dict() if value:
            return record({name: one_of(each) for name, each in value.items()}, is_closed=True)
        case dict():
            return {"type": "object", "maxProperties": 0}
        case _:
            return {"const": value}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def record(
    properties: Mapping[str, Schema],
    *,
    required: Collection[str] | None = None,
    is_closed: bool = False,
    description: str | None = None,
) -> Schema:
    """An object with these fields, all of them required if nothing is said."""
    schema: Schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties if required is None else required),
    }
    if is_closed:
        schema["additionalProperties"] = False
    if description is not None:
        schema["description"] = description
    return schema


def list_of(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


# Content parts and messages -----------------------------------------------------------------------

_OPTIONS: Final[Mapping[str, Schema]] = {
    "detail": one_of(*get_args(Detail)),
    "max_grids": {"type": "integer", "minimum": 1, "maximum": _INT64_MAX},
    "fps": {"type": "number", "minimum": MIN_FPS, "maximum": MAX_FPS},
    "num_frames": {"type": "integer", "minimum": 1, "maximum": _INT64_MAX},
    "max_frames": {"type": "integer", "minimum": 1, "maximum": _INT64_MAX},
    "start_s": {"type": "number", "minimum": 0},
    "end_s": {"type": "number", "minimum": 0},
}
"""`chat/options.MediaOptions`, field by field."""


def _options(*names: str, **more: Schema) -> Schema:
    fields = {name: _OPTIONS[name] for name in names} | more
    options = record(
        {name: or_null(schema) for name, schema in fields.items()}, required=(), is_closed=True
    )
    if "fps" in fields:  # with num_frames two answers to one question
        options["anyOf"] = [{"properties": {name: NULL}} for name in ("fps", "num_frames")]
    return options


_BUDGET: Final[Schema] = {
    "type": "integer",
    "minimum": 1,
    "maximum": _INT64_MAX,
    "description": "The most tokens that all pictures and videos together may be worth.",
}
_ANY_OPTION: Final = (*FIELDS_OF["image"], *FIELDS_OF["video"])


def _media_part(kind: str, own: Mapping[str, Schema], options: str) -> Schema:
    """A closed part with a medium: its source, and what every such part may say beside it."""
    hints = {
        name: or_null({"type": "string", "maxLength": max_chars})
        for name, max_chars in HINT_FIELDS.items()
    }
    beside: Mapping[str, Schema] = {
        **hints,
        "media_options": or_null(reference(options)),
        "on_error": or_null(one_of(*get_args(OnError))),
    }
    return record({"type": one_of(kind), **own, **beside}, required=("type",), is_closed=True)


def _with_source(part: Schema, *names: str) -> Schema:
    """The same with exactly one of these sources."""
    if len(names) == 1:
        return part | {"required": [*part["required"], *names]}
    sources = [{"properties": {name: _SOURCE}, "required": [name]} for name in names]
    return part | {"oneOf": sources}


def _address(name: str, *, has_detail: bool) -> Schema:
    fields: dict[str, Schema] = {"url": _SOURCE}
    if has_detail:
        fields["detail"] = or_null(_OPTIONS["detail"])
    return {"anyOf": [_SOURCE, record(fields, required=("url",), is_closed=True)]}


_OPTIONAL_SOURCE: Final = or_null(_SOURCE)
_FILE: Final = _with_source(
    record(
        {
            "file_id": _OPTIONAL_SOURCE,
            "file_data": _OPTIONAL_SOURCE,
            "filename": or_null({"type": "string", "maxLength": MAX_FILENAME_CHARS}),
        },
        required=(),
        is_closed=True,
    ),
    "file_id",
    "file_data",
)


def _text_part(kind: str) -> Schema:
    return record({"type": one_of(kind), "text": TEXT}, is_closed=True)


PART_SCHEMAS: Final[Mapping[str, Schema]] = {
    "text": _text_part("text"),
    "image_url": _with_source(
        _media_part(
            "image_url", {"image_url": _address("image_url", has_detail=True)}, "ImageOptions"
        ),
        "image_url",
    ),
    "video_url": _with_source(
        _media_part(
            "video_url", {"video_url": _address("video_url", has_detail=False)}, "VideoOptions"
        ),
        "video_url",
    ),
    "file": _with_source(_media_part("file", {"file": _FILE}, "MediaOptions"), "file"),
    "image": _with_source(_media_part("image", {"image": _SOURCE}, "ImageOptions"), "image"),
    "video": _with_source(
        _media_part(
            "video", {"video": {"anyOf": [_SOURCE, list_of(_SOURCE, minItems=1)]}}, "VideoOptions"
        ),
        "video",
    ),
    "input_text": _text_part("input_text"),
    "input_image": _with_source(
        _media_part(
            "input_image",
            {
                "image_url": _OPTIONAL_SOURCE,
                "file_id": _OPTIONAL_SOURCE,
                "detail": or_null(_OPTIONS["detail"]),
            },
            "ImageOptions",
        ),
        "image_url",
        "file_id",
    ),
    "input_file": _with_source(
        _media_part(
            "input_file",
            {
                "file_id": _OPTIONAL_SOURCE,
                "file_data": _OPTIONAL_SOURCE,
                "file_url": _OPTIONAL_SOURCE,
            },
            "MediaOptions",
        ),
        "file_id",
        "file_data",
        "file_url",
    ),
}
"""A row for each of `chat/parts.PART_TYPES`."""

TEXT_PARTS: Final = ("text", "input_text")


def _part_name(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_")) + "Part"


def any_part(kinds: Collection[str], **named: str) -> Schema:
    """Any of these kinds of parts; some schemas have names of their own."""
    names = {kind: named.get(kind) or _part_name(kind) for kind in kinds}
    return {
        "oneOf": [reference(name) for name in names.values()],
        "discriminator": {
            "propertyName": "type",
            "mapping": {kind: f"#/components/schemas/{name}" for kind, name in names.items()},
        },
    }


def _message(
    roles: Collection[str],
    content: Schema,
    *,
    needed: Collection[str] = ("content",),
    **own: Schema,
) -> Schema:
    """A closed message of these roles; `own` fields are of its role alone."""
    neutral = {name: one_of(*values) for name, values in UNSUPPORTED_MESSAGE_FIELDS.items()}
    of_others = {name: one_of(*values) for name, (_, values) in FIELDS_OF_ROLE.items()}
    return record(
        {"role": one_of(*roles), "content": content, **neutral, **of_others, **own},
        required=("role", *needed),
        is_closed=True,
    )


def _content(part: str, *more: Schema, least: int = 0) -> Schema:
    """A text, parts, or one part; at least so long."""
    text: Schema = {"type": "string", "minLength": least} if least else TEXT
    parts = list_of(reference(part), minItems=least, maxItems=MAX_PARTS)
    return {"anyOf": [text, parts, reference(part), *more]}


_MESSAGES: Final = list_of(reference("Message"), minItems=1, maxItems=MAX_MESSAGES)

_OF_MESSAGES: Final[Mapping[str, Schema]] = {
    "ImageOptions": _options(*FIELDS_OF["image"]),
    "VideoOptions": _options(*FIELDS_OF["video"]),
    "MediaOptions": _options(*_ANY_OPTION),
    "RequestMediaOptions": _options(*_ANY_OPTION, visual_token_budget=_BUDGET),
    **{_part_name(kind): schema for kind, schema in PART_SCHEMAS.items()},
    "ContentPart": any_part(PART_SCHEMAS),
    "TextContentPart": any_part(TEXT_PARTS),
    "SystemMessage": _message(("system", "developer"), _content("TextContentPart")),
    "UserMessage": _message(("user",), _content("ContentPart", least=1)),
    "AssistantMessage": _message(
        ("assistant",),
        _content("TextContentPart", NULL),
        needed=(),
        tool_calls=or_null(list_of(reference("MessageCall"), maxItems=MAX_CALLS)),
    ),
    "ToolMessage": _message(
        ("tool",),
        _content("TextContentPart"),
        needed=("content", "tool_call_id"),
        tool_call_id=TEXT,
        name=or_null(TEXT),
    ),
    "MessageCall": record(
        {
            "id": CALL_ID,
            "type": one_of("function", None),
            "function": record(
                {
                    "name": {"type": "string", "maxLength": MAX_NAME_CHARS},
                    "arguments": or_null(TEXT),
                },
                required=("name",),
                is_closed=True,
            ),
            "index": ANYTHING,
        },
        required=("id", "function"),
        is_closed=True,
    ),
    "Message": {
        "anyOf": [
            reference(name)
            for name in ("SystemMessage", "UserMessage", "AssistantMessage", "ToolMessage")
        ]
    },
}

# Requests -----------------------------------------------------------------------------------------

JSON_SCHEMA_FIELDS: Final[Mapping[str, Schema]] = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    "schema": reference("JsonSchema"),
    "strict": or_null(FLAG),
    "description": or_null(TEXT),
}
_JSON_SCHEMA: Final = record(JSON_SCHEMA_FIELDS, required=("name", "schema"), is_closed=True)
_FORM_SCHEMAS: Final[Mapping[str, Schema]] = {
    "json": reference("JsonSchema"),
    "regex": {"type": "string", "minLength": 1, "maxLength": MAX_REGEX_CHARS},
    "choice": list_of(_SOURCE, minItems=1, maxItems=MAX_ENUM_VALUES),
    "grammar": {"type": "string", "minLength": 1, "maxLength": MAX_SCHEMA_BYTES},
}
_FORMS: Final[Mapping[str, Schema]] = {
    "JsonSchema": {"type": "object", "description": "A JSON Schema, with references `#/...` only"},
    "PlainResponseFormat": record(
        {"type": one_of("text", "json_object"), "json_schema": NULL},
        required=("type",),
        is_closed=True,
    ),
    "NamedJsonSchema": _JSON_SCHEMA,
    "JsonSchemaResponseFormat": record(
        {"type": one_of("json_schema"), "json_schema": reference("NamedJsonSchema")},
        is_closed=True,
    ),
    "ResponseFormat": {
        "anyOf": [reference("PlainResponseFormat"), reference("JsonSchemaResponseFormat")]
    },
    "StructuredOutputs": {
        **record(
            {name: or_null(schema) for name, schema in _FORM_SCHEMAS.items()},
            required=(),
            is_closed=True,
        ),
        "oneOf": [
            {"properties": {name: schema}, "required": [name]}
            for name, schema in _FORM_SCHEMAS.items()
        ],
    },
}

FUNCTION_NAME: Final[Schema] = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
FUNCTION_FIELDS: Final[Mapping[str, Schema]] = {
    "name": FUNCTION_NAME,
    "description": or_null({"type": "string", "maxLength": MAX_DESCRIPTION_CHARS}),
    "parameters": or_null(reference("JsonSchema")),
    "strict": or_null(FLAG),
}
CHOICE_WORDS: Final = one_of(*get_args(Mode))
_TOOLS: Final[Mapping[str, Schema]] = {
    "Tool": record(
        {"type": one_of("function"), "function": reference("FunctionDefinition")}, is_closed=True
    ),
    "FunctionDefinition": record(FUNCTION_FIELDS, required=("name",), is_closed=True),
    "NamedTool": record(
        {"type": one_of("function"), "function": record({"name": FUNCTION_NAME}, is_closed=True)},
        is_closed=True,
    ),
    "AllowedTools": record(
        {
            "type": one_of("allowed_tools"),
            "allowed_tools": record(
                {
                    "mode": one_of("auto", "required"),
                    "tools": list_of(reference("NamedTool"), minItems=1, maxItems=MAX_TOOLS),
                },
                is_closed=True,
            ),
        },
        is_closed=True,
    ),
}

_HINT: Final[Schema] = {"type": "string", "maxLength": MAX_USER_BYTES}
_STOP: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_TOKEN_IDS: Final = list_of(COUNT)

BY_HAND: Final[Mapping[str, Schema]] = {
    "messages": _MESSAGES,
    "response_format": or_null(reference("ResponseFormat")),
    "structured_outputs": or_null(reference("StructuredOutputs")),
    "media_options": or_null(reference("RequestMediaOptions")),
    "tools": or_null(list_of(reference("Tool"), maxItems=MAX_TOOLS)),
    "tool_choice": {
        "anyOf": [CHOICE_WORDS, reference("NamedTool"), reference("AllowedTools"), NULL]
    },
    "cache_salt": or_null({"type": "string", "minLength": 1, "maxLength": MAX_SALT_BYTES}),
    "user": or_null(_HINT),
    "safety_identifier": or_null(_HINT),
    "prompt_cache_key": or_null(_HINT),
    "service_tier": one_of("auto", "default", None),
    "continuous_usage_stats": one_of(False, None),
    "prompt": {
        "anyOf": [
            TEXT,
            list_of(TEXT, minItems=1, maxItems=MAX_PROMPTS),
            _TOKEN_IDS | {"minItems": 1},
            list_of(_TOKEN_IDS, minItems=1, maxItems=MAX_PROMPTS),
        ]
    },
}
"""Fields that their models leave to other code, or say too little of."""

# What these models cannot say of a field, added to what they say: field -> more of its first form.
_MORE: Final[Mapping[str, Schema]] = {
    "logit_bias": {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,18})$"}},
    "metadata": {
        "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
        "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARS},
    },
}

NOTES: Final[Mapping[str, str]] = {
    "model": "the served name, or one of its aliases",
    "messages": "system, developer, user, assistant and tool, of text, pictures and videos",
    "max_tokens": "how long the answer may become; no more than the context leaves",
    "max_completion_tokens": "the same as `max_tokens`",
    "temperature": "0 is greedy",
    "top_p": "the likeliest tokens that together have this probability",
    "top_k": "0 and -1 are off",
    "min_p": "at least this share of the likeliest token as likely; 0 is off",
    "repetition_penalty": "counts prompt and answer; 1 is off",
    "presence_penalty": "counts the answer only",
    "frequency_penalty": "counts the answer only",
    "logit_bias": "token ids, each with -100 to 100",
    "stop": f"a string, or up to {MAX_STOP_STRINGS} of them; {MAX_STOP_CHARS} characters each",
    "stop_token_ids": "token ids that end the answer",
    "min_tokens": "no end before so many tokens",
    "seed": "the same seed gives the same answer",
    "ignore_eos": "`true` ignores the model's own ends",
    "priority": "of one caller's waiting requests a lower one starts first",
    "n": "answers to the same prompt",
    "logprobs": "how likely each token was",
    "top_logprobs": "likeliest tokens at each place; only with `logprobs`",
    "stream": "`true` sends server-sent events",
    "stream_options": "`include_usage`, only with `stream`; `include_obfuscation` changes nothing",
    "user": f"up to {MAX_USER_BYTES} bytes; not used",
    "safety_identifier": f"up to {MAX_USER_BYTES} bytes; not used",
    "prompt_cache_key": f"up to {MAX_USER_BYTES} bytes; not used: what is alike is found without",
    "metadata": (
        f"up to {MAX_METADATA} pairs of {MAX_METADATA_KEY_CHARS} and {MAX_METADATA_VALUE_CHARS} "
        "characters; not used"
    ),
    "service_tier": "`auto` or `default`; there is one tier",
    "response_format": "`text`, `json_object` or `json_schema`, which is always kept to",
    "structured_outputs": "exactly one of `json`, `regex`, `choice`, `grammar`",
    "media_options": "how pictures and videos are looked at",
    "tools": "functions, each held to its schema",
    "tool_choice": "`none`, `auto`, `required`, a function, or `allowed_tools`",
    "parallel_tool_calls": "`false` allows one call at a time",
    "add_generation_prompt": "`false` begins no turn of the assistant's",
    "continue_final_message": "`true` goes on with the last message",
    "echo": "`true` puts the last message before the answer",
    "cache_salt": f"up to {MAX_SALT_BYTES} bytes; shares caches only with the same",
}
"""A few words on each field that is honoured, for the document and the compatibility list."""

HINTS: Final = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Fields that are checked and change nothing."""

COMPLETION_NOTES: Final[Mapping[str, str]] = {
    "prompt": f"a string, token ids, or up to {MAX_PROMPTS} of either",
    "max_tokens": "how long the answer may become, 16 if nothing is said; 0 only with `echo`",
    "logprobs": "likeliest tokens at each place, and the token itself",
    "echo": "`true` puts the prompt before the answer",
}


def chat_fields() -> dict[str, Schema]:
    """The fields that a chat request honours."""
    return fields_of(ChatCompletionRequest, NOTES)


def fields_of(
    model: type[BaseModel], notes: Mapping[str, str], by_hand: Mapping[str, Schema] = BY_HAND
) -> dict[str, Schema]:
    """The fields of a request's model with their bounds, each as the wire has it."""
    own = model.model_json_schema()["properties"]
    fields = {name: by_hand.get(name) or _adapted(schema) for name, schema in own.items()}
    for name in fields.keys() & _MORE:
        first, *others = fields[name]["anyOf"]
        fields[name] = {"anyOf": [first | _MORE[name], *others]}
    if "stop" in fields:
        fields["stop"] = {"anyOf": [_STOP, *fields["stop"]["anyOf"]]}
    return {
        name: schema | ({"description": notes[name]} if name in notes else {})
        for name, schema in fields.items()
    }


def _adapted(schema: Any) -> Any:
    """pydantic's schema in the document's words: without titles, defaults and local references."""
    if isinstance(schema, list):
        return [_adapted(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return reference(schema["$ref"].rpartition("/")[2])
    return {
        _KEYWORDS.get(name, name): _adapted(value)
        for name, value in schema.items()
        if name not in ("title", "default")
    }


def neutral_only(unsupported: Mapping[str, tuple[object, ...]]) -> dict[str, Schema]:
    return {
        name: one_of(*values, None) | {"description": "Not supported: only what asks for nothing."}
        for name, values in unsupported.items()
    }


def _requests(*, is_strict: bool) -> dict[str, Schema]:
    """The bodies of the POST routes. `is_strict` refuses fields that nobody knows."""
    chat = chat_fields()
    own = fields_of(CompletionFields, COMPLETION_NOTES)
    shared = {name: chat[name] for name in SHARED_FIELDS}
    of_both = {"model": or_null(TEXT)}
    return {
        "ChatCompletionRequest": record(
            {**chat, **neutral_only(UNSUPPORTED)},
            required=("model", "messages"),
            is_closed=is_strict,
        ),
        "CompletionRequest": record(
            {**shared, **own, **neutral_only(COMPLETION_UNSUPPORTED)},
            required=("model", "prompt"),
            is_closed=is_strict,
        ),
        "StreamOptions": record(fields_of(StreamOptions, {}), required=(), is_closed=is_strict),
        "TokenizeRequest": {
            "anyOf": [
                record(
                    {
                        **of_both,
                        "prompt": TEXT,
                        "messages": NULL,
                        "add_special_tokens": or_null(FLAG),
                        **dict.fromkeys(CONVERSATION_FIELDS, NULL),
                        **neutral_only(TOKENIZE_UNSUPPORTED),
                    },
                    required=("prompt",),
                    is_closed=is_strict,
                ),
                record(
                    {
                        **of_both,
                        "messages": _MESSAGES,
                        "prompt": NULL,
                        "add_special_tokens": one_of(False, None),
                        **{name: chat[name] for name in CONVERSATION_FIELDS},
                        **neutral_only(TOKENIZE_UNSUPPORTED),
                    },
                    required=("messages",),
                    is_closed=is_strict,
                ),
            ]
        },
        "DetokenizeRequest": record(
            {**of_both, "tokens": _TOKEN_IDS}, required=("tokens",), is_closed=is_strict
        ),
        "ChatCompletionForm": record(
            {"request": reference("ChatCompletionRequest")},
            description="The request first, then one part for each file that it names.",
        ),
        "FileForm": record(
            {
                "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                "purpose": one_of(*PURPOSES),
                "expires_after[anchor]": one_of("created_at"),
                "expires_after[seconds]": {
                    "type": "integer",
                    "minimum": EXPIRY_RANGE_S[0],
                    "maximum": EXPIRY_RANGE_S[1],
                },
            },
            required=("file", "purpose"),
            is_closed=True,
        )
        | {
            "dependentRequired": {
                "expires_after[anchor]": ["expires_after[seconds]"],
                "expires_after[seconds]": ["expires_after[anchor]"],
            }
        },
    }


# Answers ------------------------------------------------------------------------------------------

_MILLISECONDS: Final[Schema] = {"type": "number", "minimum": 0}
_NULL_OR_NUMBER: Final = or_null({"type": "number"})
_FINISH: Final = one_of("stop", "length")
_CHAT_FINISH: Final = one_of("stop", "length", "tool_calls")
_LISTED: Final[Schema] = one_of("list")


def _of_answer(kind: str, choice: str, *more: str) -> Schema:
    """An answer or a piece of one; `more` fields are always there."""
    return record(
        {
            "id": TEXT,
            "object": one_of(kind),
            "created": COUNT,
            "model": TEXT,
            "choices": list_of(reference(choice)),
            "usage": or_null(reference("Usage")) if "usage" not in more else reference("Usage"),
            "service_tier": one_of("default"),
        },
        required=("id", "object", "created", "model", "choices", *more),
    )


_TOKEN: Final[Mapping[str, Schema]] = {
    "token": TEXT,
    "logprob": {"type": "number", "maximum": 0},
    "bytes": list_of({"type": "integer", "minimum": 0, "maximum": 255}),
}

_ANSWERS: Final[Mapping[str, Schema]] = {
    "ChatCompletion": _of_answer("chat.completion", "ChatChoice", "usage"),
    "ChatCompletionChunk": _of_answer("chat.completion.chunk", "ChatChunkChoice"),
    "ChatChoice": record(
        {
            "index": COUNT,
            "message": record(
                {
                    "role": one_of("assistant"),
                    "content": or_null(TEXT),
                    "refusal": NULL,
                    "tool_calls": list_of(reference("ToolCall"), minItems=1),
                },
                required=("role", "content", "refusal"),
            ),
            "logprobs": or_null(reference("ChatLogprobs")),
            "finish_reason": _CHAT_FINISH,
        }
    ),
    "ChatChunkChoice": record(
        {
            "index": COUNT,
            "delta": record(
                {
                    "role": one_of("assistant"),
                    "content": TEXT,
                    "tool_calls": list_of(reference("ToolCallPiece"), minItems=1),
                },
                required=(),
            ),
            "logprobs": or_null(reference("ChatLogprobs")),
            "finish_reason": or_null(_CHAT_FINISH),
        }
    ),
    "ToolCall": record(
        {
            "id": TEXT,
            "type": one_of("function"),
            "function": record({"name": TEXT, "arguments": TEXT}),
        }
    ),
    "ToolCallPiece": record(
        {
            "index": COUNT,
            "id": TEXT,
            "type": one_of("function"),
            "function": record({"name": TEXT, "arguments": TEXT}, required=("arguments",)),
        },
        required=("index", "function"),
        description="The first piece of a call has its id and name, later ones more arguments.",
    ),
    "ChatLogprobs": record(
        {
            "content": list_of(record({**_TOKEN, "top_logprobs": list_of(record(_TOKEN))})),
            "refusal": NULL,
        }
    ),
    "Usage": record(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": record(
                {
                    "cached_tokens": COUNT,
                    "text_tokens": COUNT,
                    "image_tokens": COUNT,
                    "video_tokens": COUNT,
                }
            ),
            "media": list_of(reference("MediaItem")),
        },
        required=(
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "prompt_tokens_details",
        ),
    ),
    "MediaItem": record(
        {
            "path": TEXT,
            "type": one_of("image", "video"),
            "width": or_null(COUNT),
            "height": or_null(COUNT),
            "duration_s": _NULL_OR_NUMBER,
            "frames": or_null(COUNT),
            "grids": or_null(COUNT),
            "tokens": COUNT,
            "options": {"type": "object"},
            "cache": TEXT,
            "error": or_null(TEXT),
            "fetch_ms": _MILLISECONDS,
            "decode_ms": _MILLISECONDS,
            "preprocess_ms": _MILLISECONDS,
            "encode_ms": _MILLISECONDS,
        }
    ),
    "ChatDryRun": record(
        {
            "object": one_of("chat.completion.dry_run"),
            "model": TEXT,
            "prompt": TEXT,
            "usage": record(
                {
                    "prompt_tokens": COUNT,
                    "prompt_tokens_details": record(
                        {"text_tokens": COUNT, "image_tokens": COUNT, "video_tokens": COUNT}
                    ),
                    "media": list_of(reference("MediaItem")),
                }
            ),
            "context": record({"max_model_len": COUNT, "left_tokens": COUNT}),
            "n": COUNT,
            "priority": {"type": "integer"},
            "stop": list_of(TEXT),
            "sampling": {"type": "object"},
            "has_grammar": FLAG,
        }
    ),
    "Completion": _of_answer("text_completion", "CompletionChoice", "usage"),
    "CompletionChunk": _of_answer("text_completion", "CompletionChunkChoice"),
    "CompletionChoice": record(
        {
            "index": COUNT,
            "text": TEXT,
            "logprobs": or_null(reference("CompletionLogprobs")),
            "finish_reason": _FINISH,
        }
    ),
    "CompletionChunkChoice": record(
        {
            "index": COUNT,
            "text": TEXT,
            "logprobs": or_null(reference("CompletionLogprobs")),
            "finish_reason": or_null(_FINISH),
        }
    ),
    "CompletionLogprobs": record(
        {
            "tokens": list_of(TEXT),
            "token_logprobs": list_of(_NULL_OR_NUMBER),
            "top_logprobs": list_of(
                or_null({"type": "object", "additionalProperties": {"type": "number"}})
            ),
            "text_offset": list_of(COUNT),
        }
    ),
    "Tokens": record({"count": COUNT, "max_model_len": COUNT, "tokens": _TOKEN_IDS}),
    "DetokenizedText": record({"prompt": TEXT}),
    "TokenizerInfo": record(
        {
            "tokenizer_class": TEXT,
            "vocab_size": COUNT,
            "max_model_len": COUNT,
            "special_tokens": {"type": "object", "additionalProperties": COUNT},
        },
    )
    | {"additionalProperties": True},
    "Model": record(
        {
            "id": TEXT,
            "object": one_of("model"),
            "created": COUNT,
            "owned_by": TEXT,
            "max_model_len": COUNT,
            "modalities": list_of(one_of("text", "image", "video")),
            "media_tokens": {
                "type": "object",
                "additionalProperties": record({"least": COUNT, "most": COUNT}),
            },
        }
    ),
    "ModelList": record({"object": _LISTED, "data": list_of(reference("Model"))}),
    "Limits": record(
        {
            "http": record(dict.fromkeys((*HTTP_SETTINGS, *HTTP_CONSTANTS), ANYTHING)),
            "media": record(dict.fromkeys(MEDIA_SETTINGS, ANYTHING)),
            "engine": record(dict.fromkeys((*ENGINE_SETTINGS, "kv_cache_tokens"), ANYTHING)),
            "chat": record(dict.fromkeys(CHAT_CONSTANTS, COUNT)),
        }
    ),
    "File": record(
        {
            "id": TEXT,
            "object": one_of("file"),
            "bytes": COUNT,
            "created_at": COUNT,
            "expires_at": COUNT,
            "filename": TEXT,
            "purpose": one_of(*PURPOSES),
            "status": one_of("processed"),
        }
    ),
    "FileList": record(
        {
            "object": _LISTED,
            "data": list_of(reference("File")),
            "first_id": or_null(TEXT),
            "last_id": or_null(TEXT),
            "has_more": FLAG,
        }
    ),
    "FileDeleted": record({"id": TEXT, "object": one_of("file"), "deleted": one_of(True)}),
    "Health": record({"status": one_of("ok")}),
    "Readiness": record({"status": one_of("ready")}),
}

# Errors -------------------------------------------------------------------------------------------


def error_codes() -> dict[int, dict[str, str]]:
    """By status, each code with its type, of every error that a caller can be told about."""
    found: dict[int, dict[str, str]] = {}
    for each in vars(errors).values():
        if not (isinstance(each, type) and issubclass(each, errors.ServerError)):
            continue
        codes = [each.code]
        if issubclass(each, errors.MediaError):
            codes = [each.code_pattern.format(kind=kind) for kind in FIELDS_OF]
        found.setdefault(each.status, {}).update(dict.fromkeys(codes, each.type))
    return found


def _error(status: int) -> Schema:
    codes = error_codes()[status]
    return record(
        {
            "error": record(
                {
                    "message": {"type": "string", "maxLength": errors.MAX_MESSAGE_CHARS},
                    "type": one_of(*sorted(set(codes.values()))),
                    "param": {"type": ["string", "null"], "description": "where, as a path"},
                    "code": one_of(*codes),
                },
                is_closed=True,
            )
        },
        is_closed=True,
    )


def error_name(status: int) -> str:
    return f"Error{status}"


def all_schemas(*, is_strict: bool) -> dict[str, Schema]:
    """By name, everything that the document's routes refer to."""
    return {
        **_requests(is_strict=is_strict),
        **_OF_MESSAGES,
        **_FORMS,
        **_TOOLS,
        **_ANSWERS,
        **{error_name(status): _error(status) for status in sorted(error_codes())},
    }
