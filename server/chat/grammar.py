"""What a request says of the form of its answer: `response_format` and `structured_outputs`.

`parse_constraint` and `parse_format` judge shape and size and make of it one grammar as llguidance
takes it. Whether that can be matched is proved elsewhere, before the engine is asked for anything.
JSON comes out compact: where white space is free a weak model may go on with it for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from server.chat.fields import as_name, as_object, refuse_unknown
from server.errors import (
    InvalidRequest,
    InvalidSchema,
    InvalidType,
    MissingParameter,
)

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 32
MAX_PROPERTIES: Final = 1_000
MAX_ENUM_VALUES: Final = 1_000
MAX_REGEX_CHARS: Final = 512

_FORMATS: Final = ("text", "json_object", "json_schema")
_DESCRIPTION: Final = ("name", "schema", "strict", "description")
_JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
_NOT_FOLLOWED: Final = frozenset(
    {
        *("$id", "$anchor", "x-guidance", "disallow", "divisibleBy", "extends"),
        *("formatMinimum", "formatMaximum", "formatExclusiveMinimum", "formatExclusiveMaximum"),
    }
)
"""Keywords that the library takes for notes, though they mean something, and its own. Those that it
knows not to support it refuses itself; others are notes, as JSON Schema wants it."""

_OF_OBJECTS: Final = frozenset(
    {"properties", "required", "minProperties", "additionalProperties", "enum", "const"}
)
_COMBINING: Final = frozenset(
    {
        *("$ref", "anyOf", "if", "not", "dependentSchemas", "patternProperties"),
        "unevaluatedProperties",
    }
)
"""Keywords that say more of an object than what the keywords `_OF_OBJECTS` beside them say."""

_VALUES: Final = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords that hold values: what is in them is no schema."""

_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords that hold schemas by names of the client's own."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that has not been proved yet, and the parameter it was made from.

    `json_rule` is the same as the right side of a Lark rule, where it is a form of JSON.
    """

    grammar: str
    param: str
    json_rule: str | None = None


def parse_constraint(response_format: object, structured_outputs: object) -> Constraint | None:
    """The one form that is asked for, or None; raises the contract's 400 for what is wrong."""
    by_format = _of_response_format(response_format)
    by_extension = _of_structured_outputs(structured_outputs)
    if by_format is not None and by_extension is not None:
        raise InvalidRequest(
            "response_format and structured_outputs must not both be given.",
            param="structured_outputs",
        )
    return by_format or by_extension


def parse_format(wanted: object, path: str) -> Constraint | None:
    """The same of the format of OpenAI's Responses, where the schema lies beside its type."""
    if wanted is None:
        return None
    fields = _object(wanted, path, {"type", *_DESCRIPTION})
    kind = _kind_of_format(fields, f"{path}.type")
    if kind == "json_schema":
        return _of_description(fields, path)
    for name in _DESCRIPTION:
        if fields.get(name) is not None:
            raise InvalidRequest(
                f"{path}.{name} is allowed only with a json_schema.", param=f"{path}.{name}"
            )
    return None if kind == "text" else _any_object(path)


def _of_response_format(wanted: object) -> Constraint | None:
    if wanted is None:
        return None
    fields = _object(wanted, "response_format", {"type", "json_schema"})
    kind = _kind_of_format(fields, "response_format.type")
    path = "response_format.json_schema"
    if kind != "json_schema":
        if fields.get("json_schema") is not None:
            raise InvalidRequest(f"{path} is allowed only with that type.", param=path)
        return None if kind == "text" else _any_object("response_format")
    if fields.get("json_schema") is None:
        raise MissingParameter(f"{path} is required.", param=path)
    described = _object(fields["json_schema"], path, _DESCRIPTION)
    return _of_description(described, path)


def _kind_of_format(fields: Mapping[str, Any], path: str) -> str:
    kind = fields.get("type")
    if kind is None:
        raise MissingParameter(f"{path} is required.", param=path)
    if kind not in _FORMATS:
        raise InvalidRequest(f"{path} must be 'text', 'json_object' or 'json_schema'.", param=path)
    return str(kind)


def _any_object(path: str) -> Constraint:
    return _of_json({"type": "object"}, path)


def _of_description(described: Mapping[str, Any], path: str) -> Constraint:
    """A schema with its name, which is required though nothing depends on it."""
    name = described.get("name")
    if name is None:
        raise MissingParameter(f"{path}.name is required.", param=f"{path}.name")
    as_name(name, f"{path}.name")
    # A schema is kept to whether it is called strict or not.
    for key, kind_of, words in (
        ("strict", bool, "true or false"),
        ("description", str, "a string"),
    ):
        if not isinstance(described.get(key), kind_of | None):
            raise InvalidType(f"{path}.{key} must be {words}.", param=f"{path}.{key}")
    if described.get("schema") is None:
        raise MissingParameter(f"{path}.schema is required.", param=f"{path}.schema")
    return _of_schema(described["schema"], f"{path}.schema")


def _of_structured_outputs(wanted: object) -> Constraint | None:
    if wanted is None:
        return None
    path = "structured_outputs"
    fields = _object(wanted, path, set(_FORMS))
    given = [name for name in _FORMS if fields.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest(f"{path} must have exactly one of {', '.join(_FORMS)}.", param=path)
    return _FORMS[given[0]](fields[given[0]], f"{path}.{given[0]}")


def _of_schema(schema: object, path: str) -> Constraint:
    return _of_json(check_schema(schema, path), path)


def check_schema(schema: object, path: str) -> dict[str, Any]:
    """The same; raises what is wrong with its shape or size."""
    if not isinstance(schema, dict):
        raise InvalidType(f"{path} must be an object.", param=path)
    _limit(schema_bytes(schema), MAX_SCHEMA_BYTES, "bytes", path)
    num_properties = num_values = 0
    for each, depth in _schemas_in(schema):
        _limit(depth, MAX_SCHEMA_DEPTH, "levels", path)
        num_properties += len(_mapping(each.get("properties")))
        values = each.get("enum")
        num_values += len(values) if isinstance(values, list) else 0
        _check_strings(each, path)
    _limit(num_properties, MAX_PROPERTIES, "properties", path)
    _limit(num_values, MAX_ENUM_VALUES, "enum values", path)
    return schema


def schema_bytes(schema: Mapping[str, Any]) -> int:
    """Its size as the limits count it: as compact JSON."""
    return len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode())


def _check_strings(schema: Mapping[str, Any], path: str) -> None:
    """Patterns and references of one schema, those of the schemas in it aside."""
    patterns = [schema.get("pattern"), *_mapping(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str):
            _limit(len(pattern), MAX_REGEX_CHARS, "characters in a pattern", path)
    reference = schema.get("$ref")
    if reference is not None and not (
        isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
    ):
        raise InvalidSchema(f"In {path} only references '#/...' are allowed.", param=path)
    if isinstance(reference, str) and _leads_into_value(reference):
        # What is in a value was not held to the limits of schemas.
        raise InvalidSchema(f"In {path} a reference leads into a value.", param=path)
    for name in schema:
        if name in _NOT_FOLLOWED:
            raise InvalidSchema(f"{path} uses '{name}', which is not supported.", param=path)


def _leads_into_value(reference: str) -> bool:
    """Whether a keyword on the way holds a value. Behind some a name of the client's stands."""
    steps = iter(unquote(reference).split("/")[1:])
    for step in steps:
        keyword = step.replace("~1", "/").replace("~0", "~")
        if keyword in _VALUES:
            return True
        if keyword in _NAMED:
            next(steps, None)
    return False


def _schemas_in(schema: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Every schema within, and how deep it lies; the whole one is at 1."""
    waiting: list[tuple[object, int]] = [(schema, 1)]
    while waiting:
        each, depth = waiting.pop()
        if isinstance(each, list):
            waiting += [(one, depth) for one in each]
        elif isinstance(each, dict):
            yield each, depth
            for name, value in each.items():
                if name in _NAMED:
                    waiting += [(one, depth + 1) for one in _mapping(value).values()]
                elif name not in _VALUES:
                    waiting.append((value, depth + 1))


def _of_regex(regex: object, path: str) -> Constraint:
    text = _text(regex, path, MAX_REGEX_CHARS, "characters")
    # A slash would end it, and so would the end of the line.
    escaped = re.sub(r"\\.|/|\n", _escaped, text, flags=re.DOTALL)
    return _of_rule(f"/{escaped}/", path)


def _escaped(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0])


def _of_choice(choices: object, path: str) -> Constraint:
    if not isinstance(choices, list):
        raise InvalidType(f"{path} must be an array.", param=path)
    if not choices:
        raise InvalidRequest(f"{path} must not be empty.", param=path)
    _limit(len(choices), MAX_ENUM_VALUES, "items", path)
    texts = [_text(each, f"{path}[{index}]") for index, each in enumerate(choices)]
    _limit(sum(len(text.encode()) for text in texts), MAX_SCHEMA_BYTES, "bytes", path)
    return _of_rule(" | ".join(map(json.dumps, texts)), path)


def _of_grammar(grammar: object, path: str) -> Constraint:
    text = _text(grammar, path)
    _limit(len(text.encode()), MAX_SCHEMA_BYTES, "bytes", path)
    return Constraint(lark_grammar(text), path)


_FORMS: Final[Mapping[str, Callable[[object, str], Constraint]]] = {
    "regex": _of_regex,
    "choice": _of_choice,
    "grammar": _of_grammar,
    "json": _of_schema,
}


def _of_json(schema: dict[str, Any], path: str) -> Constraint:
    grammar = {"json_schema": {**_closed(schema), "x-guidance": _JSON_OPTIONS}}
    return Constraint(json.dumps({"grammars": [grammar]}), path, json_rule(schema))


def _of_rule(rule: str, path: str) -> Constraint:
    return Constraint(lark_grammar(f"start: {rule}"), path)


def json_rule(schema: dict[str, Any], *, separators: tuple[str, str] = (",", ":")) -> str:
    """The right side of a Lark rule for JSON of this schema; `separators` are expressions."""
    item, key = separators
    options = _JSON_OPTIONS | {"item_separator": item, "key_separator": key}
    return "%json " + json.dumps({**_closed(schema), "x-guidance": options})


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, but objects have only the members that it names, where it does not say.

    What is valid by that is valid by the schema; and a weak model, which might invent members for
    ever, comes to an end. A schema that puts objects together of several is left as it is.
    """
    if any(_puts_together(each) for each, _ in _schemas_in(schema)):
        return schema
    return _with_closed_objects(schema)


def _puts_together(schema: Mapping[str, Any]) -> bool:
    """Whether what an object may be is said in several places, or an answer could fit twice."""
    keywords = schema.keys()
    return (
        "allOf" in keywords
        or "oneOf" in keywords
        or not (_COMBINING.isdisjoint(keywords) or _OF_OBJECTS.isdisjoint(keywords))
        or ("properties" in keywords and not keywords.isdisjoint(("enum", "const")))
    )


def _with_closed_objects(schema: dict[str, Any]) -> dict[str, Any]:
    closed: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            closed[name] = {key: _closed_value(each) for key, each in value.items()}
        else:
            closed[name] = value if name in _VALUES else _closed_value(value)
    members, wanted = schema.get("properties"), schema.get("required", [])
    names_all = (
        isinstance(members, dict)
        and isinstance(wanted, list)
        and members.keys() >= {str(each) for each in wanted}
        and "minProperties" not in schema
    )
    if names_all:
        closed.setdefault("additionalProperties", False)
    return closed


def _closed_value(value: object) -> object:
    if isinstance(value, list):
        return [_closed_value(each) for each in value]
    return _with_closed_objects(value) if isinstance(value, dict) else value


def lark_grammar(text: str) -> str:
    """A grammar in Lark's form as llguidance takes it."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _object(value: object, path: str, known: Collection[str]) -> Mapping[str, Any]:
    fields = as_object(value, path)
    refuse_unknown(fields, path, known)
    return fields


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object, path: str, most: int = MAX_SCHEMA_BYTES, unit: str = "characters") -> str:
    if not isinstance(value, str):
        raise InvalidType(f"{path} must be a string.", param=path)
    if not value:
        raise InvalidRequest(f"{path} must not be empty.", param=path)
    _limit(len(value), most, unit, path)
    return value


def _limit(number: int, most: int, unit: str, path: str) -> None:
    if number > most:
        raise InvalidSchema(f"{path} must have at most {most} {unit}.", param=path)
