"""JSON over HTTP: request bodies read strictly, answers and errors written exactly.

What a JSON text may mean in two ways is refused here, not resolved: repeated keys, NaN, numbers
that no receiver holds, broken Unicode. Shape and size of the text are judged before anything is
built from it. Must not know any endpoint.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn

from starlette.requests import Request
from starlette.responses import Response

from server.api.content_type import require_json
from server.errors import (
    InvalidJson,
    InvalidRequest,
    InvalidType,
    ServerError,
    quoted,
)

MAX_DEPTH = 64
MAX_KEYS = 10_000
MAX_VALUES = 2_000_000
MAX_NUMBER_CHARS = 4_300
MAX_ERROR_BYTES = 4_096
# Above this a body is parsed in a thread: reading it would hold up everyone else's tokens.
INLINE_BYTES = 64 * 1024

MEDIA_TYPE = "application/json; charset=utf-8"
_STRUCTURE = re.compile(rb'[\[\]{},:"]')
# Nothing in it is tried twice, however long the string and however many its escapes.
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


class _Unusable:
    """Stands where a number stood that cannot be held, until its place is known."""


_UNUSABLE: Final = _Unusable()


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body of `request` as an object; raises the contract's 400s and 415."""
    require_json(request.headers)
    return await parse_body(await request.body())


async def parse_body(body: bytes) -> dict[str, Any]:
    """`parse_json_object`, in a thread where it would take long."""
    if len(body) <= INLINE_BYTES:
        return parse_json_object(body)
    return await asyncio.to_thread(parse_json_object, body)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8 and nothing else."""
    if not body.strip():
        raise InvalidJson("The request body is empty; a JSON object is required.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidJson("The request body is not valid UTF-8.") from None
    check_structure(body)
    seen_unusable = False

    def unusable(_: str) -> _Unusable:
        nonlocal seen_unusable
        seen_unusable = True
        return _UNUSABLE

    def integer(digits: str) -> int | _Unusable:
        # 20 characters hold every 64-bit integer, and JSON allows no leading zeros.
        value = int(digits) if len(digits) <= 20 else _INT_MAX + 1
        return value if _INT_MIN <= value <= _INT_MAX else unusable(digits)

    def floating(digits: str) -> float | _Unusable:
        value = float(digits) if len(digits) <= MAX_NUMBER_CHARS else float("inf")
        return value if abs(value) != float("inf") else unusable(digits)

    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_object_without_repeats,
            parse_int=integer,
            parse_float=floating,
            parse_constant=unusable,
        )
    except json.JSONDecodeError as error:
        raise InvalidJson(
            f"The request body is not valid JSON (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(parsed, dict):
        raise InvalidType("The request body must be a JSON object.")
    if seen_unusable:
        _refuse_unusable_number(parsed)
    # A surrogate can only come from an escape: the bytes were valid UTF-8.
    if b"\\" in body and (b"\\ud" in body or b"\\uD" in body):
        _refuse_lone_surrogates(parsed)
    return parsed


def check_structure(body: bytes) -> None:
    """Depth, keys and values within their limits, counted without building anything."""
    depth = keys = values = 0
    position = 0
    while found := _STRUCTURE.search(body, position):
        position = found.end()
        mark = body[position - 1]
        if mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidJson(f"The JSON is nested deeper than {MAX_DEPTH} levels.")
        elif mark in b"]}":
            depth -= 1
            if depth < 0:
                raise InvalidJson("The JSON closes a bracket that it never opened.")
            continue
        elif mark in b":":
            keys += 1
            if keys > MAX_KEYS:
                raise InvalidJson(f"The JSON has more than {MAX_KEYS} keys.")
            continue
        elif mark in b'"':
            position = _end_of_string(body, position)
        values += 1
        if values > MAX_VALUES:
            raise InvalidJson(f"The JSON has more than {MAX_VALUES} values.")


def _end_of_string(body: bytes, start: int) -> int:
    """Behind its last quote. Most hold no escape, and a long picture must be passed quickly."""
    end = body.find(b'"', start)
    if body.find(b"\\", start, end) >= 0:
        rest = _REST_OF_STRING.match(body, start)
        end = rest.end() - 1 if rest else -1
    return end + 1 if end >= 0 else len(body)


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(f"The key {quoted(key)} stands twice in one object.")
            seen.add(key)
    return value


def _refuse_unusable_number(parsed: dict[str, Any]) -> NoReturn:
    param = _first_path(parsed, lambda value: value is _UNUSABLE)
    raise InvalidJson(
        "NaN, Infinity, integers beyond 64 bits and numbers too large to hold are not accepted.",
        param=param,
    )


def _refuse_lone_surrogates(parsed: dict[str, Any]) -> None:
    param = _first_path(parsed, _has_lone_surrogate)
    if param is not None:
        raise InvalidRequest("A string has a lone surrogate escape (\\ud800-\\udfff).", param=param)


def _has_lone_surrogate(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _first_path(parsed: dict[str, Any], is_wanted: Callable[[object], bool]) -> str | None:
    """Where in the object the first wanted key or value stands, in reading order."""
    for path, value in _walk(parsed, ""):
        if is_wanted(value):
            return path
    return None


def _walk(value: object, path: str) -> Iterator[tuple[str, object]]:
    # The depth was limited before, so recursion is too.
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            shown = key[:64].encode("ascii", "replace").decode("ascii")
            inner = f"{path}.{shown}" if path else shown
            yield inner, key
            yield from _walk(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]")


def to_json(content: object) -> bytes:
    """Compact UTF-8 JSON, characters as themselves."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_response(content: object, *, headers: Mapping[str, str] | None = None) -> Response:
    """A 200 with `content`."""
    return Response(to_json(content), headers=headers, media_type=MEDIA_TYPE)


def error_response(error: ServerError, *, headers: Mapping[str, str] | None = None) -> Response:
    """The contract's answer to `error`, body and headers; `headers` are added."""
    named = dict(headers or {})
    if error.status in (429, 503):
        named["retry-after"] = str(min(60, max(1, error.retry_after_s or 1)))
    if error.should_retry is not None:
        named["x-should-retry"] = str(error.should_retry).lower()
    if error.status == 401:
        named["www-authenticate"] = "Bearer"
    return Response(
        error_json(error), status_code=error.status, headers=named, media_type=MEDIA_TYPE
    )


def error_json(error: ServerError) -> bytes:
    """The error object as JSON of at most 4 KiB."""
    body = error.body()
    encoded = to_json(body)
    if len(encoded) > MAX_ERROR_BYTES:
        inner = body["error"]
        inner["message"] = (inner["message"] or "")[:500]
        inner["param"] = inner["param"] and inner["param"][:128]
        encoded = to_json(body)
    return encoded
