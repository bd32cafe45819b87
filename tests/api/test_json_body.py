from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_body import (
    MAX_DEPTH,
    MAX_ERROR_BYTES,
    MAX_KEYS,
    MAX_VALUES,
    error_json,
    error_response,
    parse_json_object,
    to_json,
)
from server.errors import (
    InvalidApiKey,
    InvalidJson,
    InvalidRequest,
    InvalidType,
    ModelLoading,
    RateLimited,
    ServerError,
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"{",
        b'{"a": 1} x',
        b'{"a": 1}{"a": 1}',
        b'{"a": 1}\x00',
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": 01}',
        b'{"a": +1}',
        b'{"a": .5}',
        b'{"a": 0x10}',
        b'{"a": "\t"}',
        b'{"a": "\\x"}',
        b'{"a": "open}',
        b'{"a": "open\\',
        b'{"a": True}',
        b'{"a": 1} // note',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-16-le"),
        b"nonsense",
    ],
    ids=repr,
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse_json_object(body)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"1", b"true", b"[{}]"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidType):
        parse_json_object(body)


@pytest.mark.parametrize(
    ("number", "param"),
    [
        ("NaN", "a.b[1]"),
        ("Infinity", "a.b[1]"),
        ("-Infinity", "a.b[1]"),
        ("1e400", "a.b[1]"),
        ("-1e400", "a.b[1]"),
        (str(2**64), "a.b[1]"),
        (str(-(2**63) - 1), "a.b[1]"),
        ("9" * 5000, "a.b[1]"),
        ("0." + "3" * 5000, "a.b[1]"),
    ],
    ids=lambda value: value[:12],
)
def test_numbers_nobody_can_hold_are_refused_where_they_stand(number: str, param: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        parse_json_object(f'{{"x": 1, "a": {{"b": [0, {number}]}}}}'.encode())
    assert caught.value.param == param


@pytest.mark.parametrize(
    "number", [2**64 - 1, -(2**63), 0, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1], ids=repr
)
def test_numbers_at_the_limits_arrive_exactly(number: float) -> None:
    value = parse_json_object(json.dumps({"a": number}).encode())["a"]
    assert type(value) is type(number)
    assert value == number
    assert math.copysign(1, value) == math.copysign(1, number)


def test_a_key_that_stands_twice_is_refused_at_any_depth() -> None:
    for body in (b'{"a": 1, "a": 1}', b'{"x": [{"a": 1, "\\u0061": 2}]}'):
        with pytest.raises(InvalidJson, match="'a'"):
            parse_json_object(body)
    assert parse_json_object(b'{"a": {"a": {"a": 1}}}') == {"a": {"a": {"a": 1}}}


@pytest.mark.parametrize("escape", ["\\ud800", "\\uDFFF", "\\udc00\\ud800", "x\\ud83d"])
def test_lone_surrogates_are_refused_where_they_stand(escape: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json_object(f'{{"a": [{{"b": "{escape}"}}]}}'.encode())
    assert (caught.value.code, caught.value.param) == ("invalid_value", "a[0].b")
    with pytest.raises(InvalidRequest):
        parse_json_object(f'{{"a{escape}": 1}}'.encode())


def test_pairs_of_surrogates_and_nul_are_text() -> None:
    assert parse_json_object(b'{"a": "\\ud83d\\ude00\\u0000"}') == {"a": "😀\x00"}


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_nesting_ends_at_its_limit() -> None:
    parse_json_object(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 1_000_000):
        with pytest.raises(InvalidJson, match="nested"):
            parse_json_object(nested(depth))


def test_brackets_inside_strings_are_not_nesting() -> None:
    text = "[{" * 100 + '\\"[{":,' * 100 + "\\"
    assert parse_json_object(json.dumps({"a": text, "b": "\\" * 101}).encode())["a"] == text


def test_the_number_of_keys_is_limited() -> None:
    keys = {f"k{index}": 0 for index in range(MAX_KEYS)}
    assert len(parse_json_object(json.dumps(keys).encode())) == MAX_KEYS
    with pytest.raises(InvalidJson, match="keys"):
        parse_json_object(json.dumps(keys | {"one": 1}).encode())
    many = json.dumps({"a": [{"k": 0}] * MAX_KEYS}).encode()
    with pytest.raises(InvalidJson, match="keys"):
        parse_json_object(many)


@pytest.mark.parametrize("item", [b"[]", b"0", b'""'])
def test_the_number_of_values_is_limited(item: bytes) -> None:
    with pytest.raises(InvalidJson, match="values"):
        parse_json_object(b'{"a":[' + b",".join([item] * (MAX_VALUES + 1)) + b"]}")


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "' + b"x" * 8_000_000 + b'"}',
        b'{"a": "' + b"\\" * 8_000_000 + b'"}',
        b'{"a": "' + b'\\"' * 300_000 + b'"}',
        b'{"a": "' + b'\\"' * 300_000,
        b" " * 8_000_000 + b"{}",
        b'{"a":' * 8_000_000,
    ],
    ids=["long string", "backslashes", "quotes", "open string", "spaces", "open objects"],
)
def test_the_time_to_parse_grows_with_the_length_only(body: bytes) -> None:
    started_s = time.process_time()
    with contextlib.suppress(InvalidJson):
        parse_json_object(body)
    assert time.process_time() - started_s < 5


JSON_BYTES = st.lists(
    st.sampled_from(
        [*b'{}[]:,"\\ \n019.-+eEu/', *b"aD8", 0x00, 0x7F, 0xC3, 0xA9, 0xED, 0xA0, 0x80, 0xFF]
    ),
    max_size=40,
).map(bytes)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.characters(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def accepted(body: bytes) -> Any:
    """What a strict reading of the JSON standard gives, or None."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@given(st.binary(max_size=60) | JSON_BYTES | JSON_BYTES.map(lambda tail: b'{"a":' + tail + b"}"))
def test_any_bytes_are_parsed_as_the_standard_says_or_refused(body: bytes) -> None:
    try:
        ours = parse_json_object(body)
    except (InvalidJson, InvalidType, InvalidRequest) as refusal:
        assert refusal.status == 400
        return
    assert ours == accepted(body)


def is_refused_by_rule(value: Any) -> bool:
    """Whether a value is JSON that the contract refuses all the same."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, int):
        return not -(2**63) <= value < 2**64
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(is_refused_by_rule(each) for pair in value.items() for each in pair)
    return isinstance(value, list) and any(map(is_refused_by_rule, value))


@given(JSON_VALUES, st.booleans())
def test_every_value_arrives_or_is_refused_by_a_rule(value: Any, ascii_only: bool) -> None:
    body = json.dumps({"a": value}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if is_refused_by_rule(value):
        with pytest.raises(InvalidRequest):
            parse_json_object(body)
    else:
        assert parse_json_object(body) == {"a": value}


@given(st.text(), st.text() | st.none())
def test_every_error_is_small_strict_json(message: str, param: str | None) -> None:
    class Shown(ServerError):
        default_message = "x"

    error = Shown(message, param=param)
    encoded = error_json(error)
    assert len(encoded) <= MAX_ERROR_BYTES
    parsed = json.loads(encoded.decode("utf-8"))["error"]
    assert parsed["code"] == "internal_error"


def test_an_error_of_long_foreign_text_still_fits() -> None:
    encoded = error_json(InvalidRequest("한" * 100_000, param="국" * 100_000))
    assert len(encoded) <= MAX_ERROR_BYTES
    assert json.loads(encoded)["error"]["message"].startswith("한한")


def test_errors_say_when_to_come_back() -> None:
    for error, seconds in ((RateLimited(), "1"), (ModelLoading(), "5")):
        headers = error_response(error).headers
        assert (headers["retry-after"], headers["x-should-retry"]) == (seconds, "true")
    error = RateLimited()
    error.retry_after_s = 1000
    assert error_response(error).headers["retry-after"] == "60"
    assert "retry-after" not in error_response(InvalidApiKey()).headers


def test_answers_are_utf8_without_escapes() -> None:
    assert to_json({"a": "원", "b": [1, None]}) == '{"a":"원","b":[1,null]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": math.nan})


@pytest.mark.parametrize(
    "body",
    [
        b"]" * (8 << 20),
        b'{"a": "' + b'\\"' * (4 << 20) + b'"}',
        b'"' + b"\\" * (8 << 20),
        b'{"a": ' + b'"' * (1 << 20),
    ],
    ids=["closed", "escaped", "backslashes", "quotes"],
)
def test_no_shape_of_text_costs_more_than_its_length(body: bytes) -> None:
    """Each of these once took a hundred times as long as reading it; the limit is ten times more
    than it takes now."""
    started_s = time.process_time()
    with contextlib.suppress(InvalidRequest):
        parse_json_object(body)
    assert time.process_time() - started_s < 5


def test_a_bracket_that_was_never_opened() -> None:
    with pytest.raises(InvalidJson, match="never opened"):
        parse_json_object(b'{"a": 1}}{')
