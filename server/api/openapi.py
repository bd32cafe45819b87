"""GET /openapi.json: every public route, what it takes and what it answers, as OpenAPI 3.1.

The routes read their bodies by hand, so that no framework knows them: `ROUTES` is the one list, and
a test holds it against the application's. A route is added with a row here and its schemas in
`wire_schemas`. The document is made once, at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from server.api.dry_run import PARAMETER as DRY_RUN
from server.api.files import MAX_LISTED, PURPOSES
from server.api.response_schemas import response_schemas
from server.api.wire_schemas import (
    Schema,
    all_schemas,
    error_codes,
    error_name,
    one_of,
    record,
    reference,
)
from server.config import HttpConfig

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"
BYTES: Final = "application/octet-stream"
HTML: Final = "text/html"

KEY_STATUSES: Final = (401, 429)
"""Answered where keys are configured, on all routes that need one."""

BUSY_STATUSES: Final = (503,)
"""Answered while the server drains or has too many connections, on all routes but the two of
`middleware.OPEN_PATHS`."""

COMMON_STATUSES: Final = (408, 413, 415, 431, 500)
"""Answered on every route: the request itself cannot be taken, or the fault is ours."""

LATE_STATUSES: Final = (400, 429, 500, 503, 504, 507)
"""Of the errors that may come after a stream has begun: its headers wait ten seconds at most."""

_BEARER: Final = "key"


@dataclass(frozen=True, slots=True)
class Described:
    """One method of one path. `answers` and `body` are schemas by media type.

    `statuses` are the errors that no common layer answers. `is_open` needs no key; `is_always` is
    answered whatever the server's state.
    """

    method: str
    path: str
    name: str
    group: str
    summary: str
    answers: Mapping[str, Schema]
    statuses: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    body: Mapping[str, Schema] | None = None
    headers: tuple[str, ...] = ()
    links: Mapping[str, Schema] = field(default_factory=dict)
    notes: str = ""
    is_open: bool = False
    is_always: bool = False
    needs_files: bool = False


def _piece(*names: str) -> Schema:
    piece = {"anyOf": [reference(each) for each in names]}
    return {"type": "string", "contentMediaType": JSON, "contentSchema": piece}


def _chunks(chunk: str) -> Schema:
    """One event of a stream."""
    data = _piece(chunk, *map(error_name, LATE_STATUSES))
    return record(
        {"data": {"anyOf": [data, one_of("[DONE]")]}},
        description=(
            f"Server-sent events: each `data` is a {chunk} as JSON, the last one `[DONE]`. An "
            "error after the first event is one `data` with the error object."
        ),
    )


def _typed_events(event: str) -> Schema:
    """The same where each has a name; an error is one of them."""
    return record(
        {"event": {"type": "string"}, "data": {"anyOf": [_piece(event), one_of("[DONE]")]}},
        required=("data",),
        description=(
            f"Server-sent events: each `data` is a {event} as JSON, its type the `event`. The last "
            "one is response.completed or response.incomplete; or error, and then `[DONE]`."
        ),
    )


def _file_link(name: str) -> Schema:
    return {"operationId": name, "parameters": {"file_id": "$response.body#/id"}}


_FILE_LINKS: Final = {
    name: _file_link(name) for name in ("retrieveFile", "fileContent", "deleteFile")
}

ROUTES: Final = (
    Described(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "Answers",
        "A conversation's next turn, whole or streamed",
        {
            JSON: {"anyOf": [reference("ChatCompletion"), reference("ChatDryRun")]},
            EVENTS: _chunks("ChatCompletionChunk"),
        },
        (400, 404, 504, 507),
        parameters=(DRY_RUN,),
        body={
            JSON: reference("ChatCompletionRequest"),
            FORM: reference("ChatCompletionForm"),
        },
        headers=("server-timing",),
        notes=(
            "As JSON, or as a form whose first part, `request`, is that JSON and whose other parts "
            f"are the files it names. With `{DRY_RUN}` nothing is generated: the answer tells what "
            "the request would take."
        ),
    ),
    Described(
        "post",
        "/v1/completions",
        "createCompletion",
        "Answers",
        "What follows a prompt as it stands",
        {JSON: reference("Completion"), EVENTS: _chunks("CompletionChunk")},
        (400, 404, 504),
        body={JSON: reference("CompletionRequest")},
    ),
    Described(
        "post",
        "/v1/responses",
        "createResponse",
        "Answers",
        "OpenAI's Responses, of which nothing is kept",
        {JSON: reference("Response"), EVENTS: _typed_events("ResponseEvent")},
        (400, 404, 504, 507),
        body={JSON: reference("ResponseRequest")},
        headers=("server-timing",),
    ),
    Described(
        "post",
        "/v1/responses/input_tokens",
        "countInputTokens",
        "Answers",
        "How many tokens the input of a response has",
        {JSON: reference("InputTokens")},
        (400, 404, 504, 507),
        body={JSON: reference("ResponseRequest")},
        headers=("server-timing",),
    ),
    Described(
        "post",
        "/tokenize",
        "tokenize",
        "Tokens",
        "The token ids of a text or of a conversation's prompt",
        {JSON: reference("Tokens")},
        (400, 404, 504, 507),
        body={JSON: reference("TokenizeRequest")},
    ),
    Described(
        "post",
        "/detokenize",
        "detokenize",
        "Tokens",
        "The text of token ids",
        {JSON: reference("DetokenizedText")},
        (400, 404, 504),
        body={JSON: reference("DetokenizeRequest")},
    ),
    Described(
        "get",
        "/tokenizer_info",
        "tokenizerInfo",
        "Tokens",
        "The vocabulary's size and its special tokens",
        {JSON: reference("TokenizerInfo")},
    ),
    Described(
        "get",
        "/v1/models",
        "listModels",
        "Server",
        "The model that is served, under each of its names",
        {JSON: reference("ModelList")},
    ),
    Described(
        "get",
        "/v1/models/{name}",
        "retrieveModel",
        "Server",
        "The model, by one of its names",
        {JSON: reference("Model")},
        (404,),
        parameters=("name",),
        notes="A name may hold slashes, which stand in the path as they are.",
    ),
    Described(
        "get",
        "/v1/limits",
        "limits",
        "Server",
        "The limits in force; null is none",
        {JSON: reference("Limits")},
    ),
    Described(
        "get",
        "/health",
        "health",
        "Server",
        "Whether the process answers",
        {JSON: reference("Health")},
        is_open=True,
        is_always=True,
    ),
    Described(
        "get",
        "/ready",
        "ready",
        "Server",
        "Whether a request would be answered now",
        {JSON: reference("Readiness")},
        (503,),
        is_open=True,
        is_always=True,
    ),
    Described(
        "post",
        "/v1/files",
        "createFile",
        "Files",
        "Upload a picture or video to be named in later requests",
        {JSON: reference("File")},
        (400, 507),
        body={FORM: reference("FileForm")},
        links=_FILE_LINKS,
        needs_files=True,
    ),
    Described(
        "get",
        "/v1/files",
        "listFiles",
        "Files",
        "The caller's files",
        {JSON: reference("FileList")},
        (400, 404),
        parameters=("limit", "after", "order", "purpose"),
        needs_files=True,
    ),
    Described(
        "get",
        "/v1/files/{file_id}",
        "retrieveFile",
        "Files",
        "One file",
        {JSON: reference("File")},
        (400, 404),
        parameters=("file_id",),
        needs_files=True,
    ),
    Described(
        "delete",
        "/v1/files/{file_id}",
        "deleteFile",
        "Files",
        "Remove a file",
        {JSON: reference("FileDeleted")},
        (400, 404),
        parameters=("file_id",),
        needs_files=True,
    ),
    Described(
        "get",
        "/v1/files/{file_id}/content",
        "fileContent",
        "Files",
        "A file's bytes, as they were sent",
        {BYTES: {"type": "string", "contentMediaType": BYTES}},
        (400, 404),
        parameters=("file_id",),
        headers=("content-disposition", "x-content-type-options"),
        needs_files=True,
    ),
    Described(
        "get",
        "/openapi.json",
        "openapi",
        "Description",
        "This document",
        {JSON: {"type": "object"}},
        is_open=True,
    ),
    Described(
        "get",
        "/docs",
        "docs",
        "Description",
        "This document, to be read in a browser",
        {HTML: {"type": "string"}},
        headers=("content-security-policy", "x-content-type-options"),
        is_open=True,
    ),
)


def _query(name: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _in_path(name: str, description: str) -> Schema:
    schema = {"type": "string", "minLength": 1}
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": schema,
        "description": description,
    }


_REQUEST_ID: Final = "x-request-id"
PARAMETERS: Final[Mapping[str, Schema]] = {
    DRY_RUN: _query(DRY_RUN, {"type": "boolean"}, "Answer with what the request would take."),
    "limit": _query(
        "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED}, "How many at most."
    ),
    "after": _query("after", {"type": "string"}, "The id after which to go on."),
    "order": _query("order", one_of("asc", "desc"), "By the time of their upload."),
    "purpose": _query("purpose", one_of(*PURPOSES), "Only files of this purpose."),
    "name": _in_path("name", "The served name, or an alias."),
    "file_id": _in_path("file_id", "As the upload was answered."),
    _REQUEST_ID: {
        "name": _REQUEST_ID,
        "in": "header",
        "schema": {"type": "string"},
        "description": (
            "The id that the answer and the log carry, if it is 1 to 128 of A-Z a-z 0-9 . _ -; "
            "another is replaced."
        ),
    },
}


def _header(schema: Schema, description: str, *, is_required: bool = False) -> Schema:
    return {"schema": schema, "description": description, "required": is_required}


_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
HEADERS: Final[Mapping[str, Schema]] = {
    _REQUEST_ID: _header(
        {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
        "The request's id.",
        is_required=True,
    ),
    "openai-processing-ms": _header(
        _COUNT, "Milliseconds from the request's headers to the answer's.", is_required=True
    ),
    "retry-after": _header(
        {"type": "integer", "minimum": 1, "maximum": 60}, "Seconds to wait.", is_required=True
    ),
    "x-should-retry": _header(
        one_of("true", "false"), "Whether sending it again may help, where that is known."
    ),
    "www-authenticate": _header(one_of("Bearer"), "How to authenticate.", is_required=True),
    "allow": _header({"type": "string"}, "The methods that the URL takes.", is_required=True),
    "server-timing": _header(
        {"type": "string"}, "What pictures and videos took, where there were any."
    ),
    "content-disposition": _header({"type": "string"}, "The file's name.", is_required=True),
    "x-content-type-options": _header(
        one_of("nosniff"), "Bytes are bytes, whatever they look like.", is_required=True
    ),
    "content-security-policy": _header(
        {"type": "string"}, "The page loads and runs nothing.", is_required=True
    ),
    **{
        f"x-ratelimit-{what}-{unit}": _header(schema, words)
        for unit in ("requests", "tokens")
        for what, schema, words in (
            ("limit", _COUNT, f"The {unit} that a minute allows, where the key has such a limit."),
            ("remaining", _COUNT, f"The {unit} that are left now."),
            ("reset", {"type": "string"}, "How long until all of them are there again."),
        )
    },
}
_EVERYWHERE: Final = (_REQUEST_ID, "openai-processing-ms")
_RATE_LIMITS: Final = tuple(name for name in HEADERS if name.startswith("x-ratelimit-"))

ERROR_HEADERS: Final[Mapping[int, tuple[str, ...]]] = {
    401: ("www-authenticate",),
    405: ("allow",),
    429: ("retry-after", "x-should-retry"),
    500: ("x-should-retry",),
    503: ("retry-after", "x-should-retry"),
    507: ("x-should-retry",),
}

_INTRODUCTION: Final = (
    "An OpenAI-compatible server for HyperCLOVAX-SEED-Vision-Instruct-3B and its family. "
    "Of top-level fields those that nobody knows are {unknown}; within messages, content parts, "
    "tools and media options they are refused. Null is the same as nothing. Every error has the "
    "same body; an "
    "unknown URL is answered 404 `unknown_url`, a method that a URL does not take 405 "
    "`method_not_allowed` with `Allow`, and HEAD as GET, without the body."
)


def openapi_document(
    http: HttpConfig, *, version: str, model_name: str, has_files: bool
) -> dict[str, Any]:
    """The description of a server with these settings, ready to be written as JSON."""
    routes = [route for route in ROUTES if has_files or not route.needs_files]
    has_keys = bool(http.api_keys)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = _operation(route, has_keys=has_keys)
        paths.setdefault(route.path, {})[route.method] = operation
    schemas = all_schemas(is_strict=http.strict) | response_schemas(is_strict=http.strict)
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponseRequest"):
        schemas[name]["properties"]["model"]["examples"] = [model_name]
    components: dict[str, Any] = {
        "schemas": schemas,
        "parameters": {**PARAMETERS, "name": {**PARAMETERS["name"], "example": model_name}},
        "headers": dict(HEADERS),
        "responses": {
            error_name(status): _error_response(status, has_keys=has_keys)
            for status in sorted(error_codes())
        },
    }
    if has_keys:
        components["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
    unknown = "refused" if http.strict else "ignored"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hcx-server",
            "version": version,
            "description": _INTRODUCTION.format(unknown=unknown),
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(route.group for route in routes)],
        "paths": paths,
        "components": components,
    }


def statuses_of(route: Described, *, has_keys: bool) -> list[int]:
    """The errors that a request for the route may be answered with."""
    statuses = {*route.statuses, *COMMON_STATUSES}
    if has_keys and not route.is_open:
        statuses.update(KEY_STATUSES)
    if not route.is_always:
        statuses.update(BUSY_STATUSES)
    return sorted(statuses)


def _operation(route: Described, *, has_keys: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": "The answer.",
        "headers": _named_headers(
            *_EVERYWHERE,
            *route.headers,
            *(_RATE_LIMITS if has_keys and not route.is_open else ()),
        ),
        "content": _content(route.answers),
    }
    if route.links:
        answer["links"] = dict(route.links)
    operation: dict[str, Any] = {
        "operationId": route.name,
        "tags": [route.group],
        "summary": route.summary,
        "parameters": [
            {"$ref": f"#/components/parameters/{name}"} for name in (*route.parameters, _REQUEST_ID)
        ],
        "responses": {
            "200": answer,
            **{
                str(status): {"$ref": f"#/components/responses/{error_name(status)}"}
                for status in statuses_of(route, has_keys=has_keys)
            },
        },
    }
    if route.notes:
        operation["description"] = route.notes
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(route.body)}
    if has_keys:
        operation["security"] = [] if route.is_open else [{_BEARER: []}]
    return operation


def _content(schemas: Mapping[str, Schema]) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": schema} for kind, schema in schemas.items()}
    if schemas.get(FORM) == reference("ChatCompletionForm"):
        content[FORM]["encoding"] = {"request": {"contentType": JSON}}
    return content


def _error_response(status: int, *, has_keys: bool) -> dict[str, Any]:
    codes = ", ".join(f"`{code}`" for code in error_codes()[status])
    limits = _RATE_LIMITS if has_keys and status not in (401, 431) else ()
    return {
        "description": f"{codes}.",
        "headers": _named_headers(*_EVERYWHERE, *ERROR_HEADERS.get(status, ()), *limits),
        "content": _content({JSON: reference(error_name(status))}),
    }


def _named_headers(*names: str) -> dict[str, Schema]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
