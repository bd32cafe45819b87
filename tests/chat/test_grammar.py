"""What `response_format` and `structured_outputs` may say, and what becomes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.chat.grammar import (
    MAX_ENUM_VALUES,
    MAX_PROPERTIES,
    MAX_REGEX_CHARS,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    Constraint,
    check_schema,
    json_rule,
    parse_constraint,
)
from server.errors import InvalidRequest

SCHEMA = "response_format.json_schema.schema"


def by_schema(schema: object, **fields: object) -> Constraint | None:
    described = {"name": "a", "schema": schema} | fields
    return parse_constraint({"type": "json_schema", "json_schema": described}, None)


def by(**forms: object) -> Constraint | None:
    return parse_constraint(None, forms)


def refused(response_format: object, structured_outputs: object = None) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_constraint(response_format, structured_outputs)
    assert caught.value.message
    return caught.value.code, caught.value.param


def refused_schema(schema: object) -> str:
    """The same by both ways; its message."""
    with pytest.raises(InvalidRequest) as caught:
        by_schema(schema)
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", SCHEMA)
    assert refused(None, {"json": schema}) == ("invalid_json_schema", "structured_outputs.json")
    return caught.value.message


def test_text_is_no_form() -> None:
    for nothing in (None, {"type": "text"}, {"type": "text", "json_schema": None}):
        assert parse_constraint(nothing, None) is None
    assert parse_constraint({"type": "text"}, {"regex": "a"}) is not None


def test_a_schema_is_made_compact() -> None:
    schema = {"type": "object", "properties": {"이름": {"type": "string"}}}
    found = by_schema(schema, strict=False, description="d")
    assert found is not None and found.param == SCHEMA
    grammar = json.loads(found.grammar)["grammars"][0]["json_schema"]
    options = grammar.pop("x-guidance")
    assert grammar == schema | {"additionalProperties": False}
    assert (options["whitespace_flexible"], options["lenient"]) == (False, False)


WRONG: list[tuple[object, object, str, str]] = [
    (7, None, "invalid_type", "response_format"),
    ({}, None, "missing_required_parameter", "response_format.type"),
    ({"type": "xml"}, None, "invalid_value", "response_format.type"),
    ({"type": ["text"]}, None, "invalid_value", "response_format.type"),
    ({"type": "text", "x": 1}, None, "unknown_parameter", "response_format.x"),
    (
        {"type": "json_object", "json_schema": {}},
        None,
        "invalid_value",
        "response_format.json_schema",
    ),
    (
        {"type": "json_schema"},
        None,
        "missing_required_parameter",
        "response_format.json_schema",
    ),
    ({"type": "json_object"}, {"regex": "a"}, "invalid_value", "structured_outputs"),
    (None, {}, "invalid_value", "structured_outputs"),
    (None, {"regex": None}, "invalid_value", "structured_outputs"),
    (None, {"regex": "a", "choice": ["a"]}, "invalid_value", "structured_outputs"),
    (None, {"regx": "a"}, "unknown_parameter", "structured_outputs.regx"),
    (None, {"regex": 7}, "invalid_type", "structured_outputs.regex"),
    (None, {"regex": ""}, "invalid_value", "structured_outputs.regex"),
    (None, {"choice": "a"}, "invalid_type", "structured_outputs.choice"),
    (None, {"choice": []}, "invalid_value", "structured_outputs.choice"),
    (None, {"choice": ["a", 7]}, "invalid_type", "structured_outputs.choice[1]"),
    (None, {"choice": ["a", ""]}, "invalid_value", "structured_outputs.choice[1]"),
    (None, {"grammar": {}}, "invalid_type", "structured_outputs.grammar"),
    (None, {"json": "{}"}, "invalid_type", "structured_outputs.json"),
    (None, {"json": True}, "invalid_type", "structured_outputs.json"),
]


@pytest.mark.parametrize(("response_format", "structured_outputs", "code", "param"), WRONG)
def test_what_is_wrong_is_named(
    response_format: object, structured_outputs: object, code: str, param: str
) -> None:
    assert refused(response_format, structured_outputs) == (code, param)


@pytest.mark.parametrize(
    ("fields", "code", "key"),
    [
        ({"name": None}, "missing_required_parameter", "name"),
        ({"name": "a b"}, "invalid_value", "name"),
        ({"name": "a" * 65}, "invalid_value", "name"),
        ({"name": 7}, "invalid_type", "name"),
        ({"strict": "yes"}, "invalid_type", "strict"),
        ({"description": 7}, "invalid_type", "description"),
        ({"schema": None}, "missing_required_parameter", "schema"),
        ({"schema": [1]}, "invalid_type", "schema"),
        ({"x": 1}, "unknown_parameter", "x"),
    ],
)
def test_what_is_wrong_around_a_schema_is_named(
    fields: dict[str, object], code: str, key: str
) -> None:
    described = {"name": "a", "schema": {}} | fields
    wanted = {"type": "json_schema", "json_schema": described}
    assert refused(wanted) == (code, f"response_format.json_schema.{key}")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


def objects(num_each: int) -> dict[str, Any]:
    """Two objects with so many properties each."""
    each: dict[str, Any] = {"properties": {f"p{index}": {} for index in range(num_each)}}
    return {"anyOf": [each, each]}


def text_of(num_bytes: int) -> dict[str, Any]:
    return {"title": "가" * ((num_bytes - 12) // 3) + "a" * ((num_bytes - 12) % 3)}


@pytest.mark.parametrize(
    ("most", "more", "words"),
    [
        (text_of(MAX_SCHEMA_BYTES), text_of(MAX_SCHEMA_BYTES + 1), "65536 bytes"),
        (nested(MAX_SCHEMA_DEPTH), nested(MAX_SCHEMA_DEPTH + 1), "32 levels"),
        (objects(MAX_PROPERTIES // 2), objects(MAX_PROPERTIES // 2 + 1), "1000 properties"),
        (
            {"enum": list(range(MAX_ENUM_VALUES))},
            {"enum": list(range(MAX_ENUM_VALUES + 1))},
            "1000 enum values",
        ),
        (
            {"pattern": "a" * MAX_REGEX_CHARS},
            {"items": {"pattern": "a" * (MAX_REGEX_CHARS + 1)}},
            "512 characters",
        ),
        (
            {"patternProperties": {"a" * MAX_REGEX_CHARS: {}}},
            {"patternProperties": {"a" * (MAX_REGEX_CHARS + 1): {}}},
            "512 characters",
        ),
    ],
    ids=["bytes", "depth", "properties", "enum", "pattern", "patternProperties"],
)
def test_limits_of_a_schema(most: dict[str, Any], more: dict[str, Any], words: str) -> None:
    assert by_schema(most) is not None
    assert words in refused_schema(more)


@pytest.mark.parametrize(
    ("form", "most", "more"),
    [
        ("regex", "a" * MAX_REGEX_CHARS, "a" * (MAX_REGEX_CHARS + 1)),
        ("choice", ["a"] * MAX_ENUM_VALUES, ["a"] * (MAX_ENUM_VALUES + 1)),
        ("choice", ["a" * MAX_SCHEMA_BYTES], ["가" * (MAX_SCHEMA_BYTES // 3), "ab"]),
        ("grammar", "a" * MAX_SCHEMA_BYTES, "가" * (MAX_SCHEMA_BYTES // 3 + 1)),
    ],
)
def test_limits_of_the_other_forms(form: str, most: object, more: object) -> None:
    assert by(**{form: most}) is not None
    assert refused(None, {form: more}) == ("invalid_json_schema", f"structured_outputs.{form}")


@pytest.mark.parametrize(
    "reference", ["http://a/b", "file:///etc/passwd", "other.json#/a", "#a", 7]
)
def test_only_local_references(reference: object) -> None:
    assert "references" in refused_schema({"items": [{"$ref": reference}]})
    for local in ("#", "#/$defs/a"):
        assert by_schema({"properties": {"$ref": {"$ref": local}}}) is not None


@pytest.mark.parametrize("name", ["$id", "$anchor", "x-guidance", "divisibleBy"])
def test_what_would_change_the_rules_is_refused(name: str) -> None:
    assert name in refused_schema({"$defs": {"a": {"items": {name: {"lenient": True}}}}})
    # A property may well have that name, and a value may look like a schema.
    assert by_schema({"properties": {name: {}}, "const": {name: 1}, "enum": [{name: 1}]})


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as it is kept to."""
    kept: dict[str, Any] = json.loads(json_rule(schema).removeprefix("%json "))
    del kept["x-guidance"]
    return kept


def test_objects_have_the_members_that_are_named() -> None:
    inner = {"properties": {"b": {"type": "string"}}, "required": ["b"]}
    values = {"enum": [{"properties": {"b": 1}}]}
    schema = {
        "type": "object",
        "properties": {
            "a": {"anyOf": [inner, {"type": "null"}]},
            "properties": {"items": inner},
            "enum": values,
        },
        "$defs": {"x": inner},
    }
    shut = inner | {"additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {
            "a": {"anyOf": [shut, {"type": "null"}]},
            "properties": {"items": shut},
            "enum": values,
        },
        "$defs": {"x": shut},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": 5},
        {"properties": {"a": {}}, "enum": [{"a": 1, "z": 2}]},
        {"$ref": "#/$defs/b", "required": ["z"], "$defs": {"b": {"properties": {"b": {}}}}},
        {"anyOf": [{"properties": {"a": {}}}], "required": ["z"]},
        {"anyOf": [{"properties": {"a": {}}}], "const": {"z": 1}},
        {"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "required": 5},
        {"properties": {"a": {}}, "minProperties": 2},
        {"properties": {"a": {}}, "patternProperties": {"x": {}}},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"required": ["a"]}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"items": {"allOf": [{"properties": {"a": {}}}]}},
    ],
)
def test_objects_stay_open_where_the_schema_says_so_or_puts_them_together(
    schema: dict[str, Any],
) -> None:
    assert closed(schema) == schema


def test_an_object_of_no_members_has_none() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    assert closed(schema) == schema | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("reference", "is_allowed"),
    [
        ("#", True),
        ("#/$defs/default", True),
        ("#/properties/enum/items", True),
        ("#/properties/properties/default", False),
        ("#/default", False),
        ("#/defaul%74", False),
        ("#/$defs/x/const", False),
        ("#/anyOf/0/examples/1", False),
    ],
)
def test_references_lead_to_schemas_not_into_values(reference: str, is_allowed: bool) -> None:
    if is_allowed:
        check_schema({"$ref": reference}, "x")
    else:
        with pytest.raises(InvalidRequest, match="leads into a value"):
            check_schema({"$ref": reference}, "x")
