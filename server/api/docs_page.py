"""GET /openapi.json and GET /docs: the OpenAPI document, and the same as one page for people.

The page is made here from the document alone, and loads and runs nothing: no script, its one style
sheet inside it and named by its digest in the content security policy. Must not know any route.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.json_body import MEDIA_TYPE, to_json

router = APIRouter()

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color-scheme: light dark; }
h2 { margin-top: 3rem; }
h3 { margin-top: 2rem; }
code { font: 0.9em ui-monospace, monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid #8886; padding: 0.3rem 0.8rem 0.3rem 0; text-align: left;
  vertical-align: top; }
th { white-space: nowrap; }
summary { cursor: pointer; }
.method { text-transform: uppercase; font-weight: bold; }
.required::after { content: " *"; color: #c33; }
"""

# As a browser computes it: over the text between the tags, as it stands.
_STYLE_DIGEST: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

PAGE_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

PATHS: Final = frozenset({"/openapi.json", "/docs"})
"""Where they are answered at all, they are answered without a key: a browser has none to send."""


@dataclass(frozen=True, slots=True)
class Description:
    """The document and its page, as they are sent."""

    document: bytes
    page: bytes


def described(document: Mapping[str, Any]) -> Description:
    return Description(to_json(document), render_page(document).encode())


@router.get("/openapi.json")
async def openapi_json(request: Request) -> Response:
    description: Description = request.app.state.description
    return Response(description.document, media_type=MEDIA_TYPE)


@router.get("/docs")
async def docs(request: Request) -> Response:
    description: Description = request.app.state.description
    return Response(
        description.page, media_type="text/html; charset=utf-8", headers=dict(PAGE_HEADERS)
    )


def render_page(document: Mapping[str, Any]) -> str:
    """The document as HTML. Whatever stands in it is text here."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    sections = "".join(_group(document, tag["name"]) for tag in document["tags"])
    schemas = "".join(
        _schema_section(name, schema) for name, schema in document["components"]["schemas"].items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<p>{_prose(info['description'])}</p>\n"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>\n'
        f"{sections}<h2>Schemas</h2>\n{schemas}</body>\n</html>\n"
    )


def _group(document: Mapping[str, Any], name: str) -> str:
    operations = [
        _operation(document, method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if name in operation["tags"]
    ]
    return f"<h2>{escape(name)}</h2>\n{''.join(operations)}"


def _operation(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> str:
    name = escape(operation["operationId"])
    parts = [
        f'<h3 id="{name}"><span class="method">{escape(method)}</span> '
        f"<code>{escape(path)}</code></h3>\n<p>{_prose(operation['summary'])}.</p>\n"
    ]
    if "description" in operation:
        parts.append(f"<p>{_prose(operation['description'])}</p>\n")
    if operation.get("security"):
        parts.append("<p>Needs an API key: <code>Authorization: Bearer KEY</code>.</p>\n")
    parameters = [_resolved(document, each) for each in operation["parameters"]]
    parts.append(
        _table(
            (
                _named(each["name"], is_required=each.get("required", False)),
                f"{escape(each['in'])}, {_type_of(each['schema'])}",
                _prose(each["description"]),
            )
            for each in parameters
        )
    )
    if "requestBody" in operation:
        parts.append(f"<p>Takes {_bodies(operation['requestBody']['content'])}.</p>\n")
    parts.append(_responses(document, operation["responses"]))
    return "".join(parts)


def _responses(document: Mapping[str, Any], responses: Mapping[str, Any]) -> str:
    rows = []
    for status, given in responses.items():
        response = _resolved(document, given)
        words = f"{_prose(response['description'])} {_bodies(response['content'])}"
        rows.append((escape(status), words, ", ".join(map(_code, response["headers"]))))
    heading = "<summary>Answers, errors and their headers</summary>\n"
    return f"<details>{heading}{_table(rows)}</details>\n"


def _bodies(content: Mapping[str, Any]) -> str:
    return " or ".join(
        f"{_code(kind)} {_type_of(media_type['schema'])}" for kind, media_type in content.items()
    )


def _schema_section(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            _named(field, is_required=field in required),
            _type_of(each),
            _prose(each.get("description", "")),
        )
        for field, each in schema.get("properties", {}).items()
    ]
    whole = _prose(schema["description"]) if "description" in schema else _type_of(schema)
    closed = " No other fields." if schema.get("additionalProperties") is False else ""
    stop = "" if whole.endswith(".") else "."
    return (
        f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>\n<p>{whole}{stop}{closed}</p>\n'
        + _table(rows)
    )


def _type_of(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, with links to those it refers to."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    for word in ("anyOf", "oneOf"):
        if word in schema and "properties" not in schema:
            return " or ".join(dict.fromkeys(_type_of(each) for each in schema[word]))
    if "const" in schema:
        return _code(_shown(schema["const"]))
    if "enum" in schema:
        return " or ".join(_code(_shown(value)) for value in schema["enum"])
    if "contentSchema" in schema:
        return f"JSON of {_type_of(schema['contentSchema'])}"
    if schema.get("properties", {}).keys() >= {"data"}:  # an event of a stream
        return f"events whose data is {_type_of(schema['properties']['data'])}"
    kind = schema.get("type", "any value")
    kinds = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if kinds == "array":
        kinds = f"array of ({_type_of(schema['items'])})"
    if kinds == "object" and "properties" in schema and "description" not in schema:
        fields = ", ".join(map(_code, schema["properties"]))
        kinds = f"object with {fields}" if fields else kinds
    return ", ".join([kinds, *_bounds(schema)])


_BOUNDS: Final[Mapping[str, str]] = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "maxProperties": "at most {} entries",
    "pattern": "matching {}",
}


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    for word, text in _BOUNDS.items():
        if word in schema:
            yield text.format(_code(str(schema[word])))


def _shown(value: object) -> str:
    """As JSON has it."""
    return to_json(value).decode()


def _named(name: str, *, is_required: bool) -> str:
    kind = ' class="required"' if is_required else ""
    return f"<code{kind}>{escape(name)}</code>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _prose(text: str) -> str:
    """Words between backticks are code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [
        f"<tr><th>{first}</th><td>{second}</td><td>{third}</td></tr>\n"
        for first, second, third in rows
    ]
    return f"<table>\n{''.join(lines)}</table>\n" if lines else ""


def _resolved(document: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference into the document stands for."""
    if "$ref" not in given:
        return given
    found: Any = document
    for step in given["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    resolved: Mapping[str, Any] = found
    return resolved
