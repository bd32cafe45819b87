from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.calls import ARGUMENT_KEYS, ARROW, CallPiece, CallReader, added_up

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), values, max_size=4)


@given(
    calls=st.lists(
        st.tuples(names, st.sampled_from(ARGUMENT_KEYS), arguments), min_size=1, max_size=4
    ),
    is_spaced=st.booleans(),
    is_list=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    head=st.sampled_from(["", ARROW, f"\nassistant{ARROW}"]),
)
def test_calls_are_read_however_they_are_cut(
    calls: list[tuple[str, str, dict[str, Any]]],
    is_spaced: bool,
    is_list: bool,
    cuts: list[int],
    head: str,
) -> None:
    separators = (", ", ": ") if is_spaced else (",", ":")
    written = [
        json.dumps({"name": name, key: given_}, ensure_ascii=False, separators=separators)
        for name, key, given_ in calls
    ]
    if is_list or len(calls) > 1:
        text = f"{head}[{separators[0].join(written)}]"
    else:
        text = head + written[0]

    reader = CallReader()
    pieces: list[CallPiece] = []
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        pieces += reader.push(text[start:end])

    read = added_up(pieces)
    assert [(call.name, json.loads(call.arguments)) for call in read] == [
        (name, given_) for name, _, given_ in calls
    ]
    assert [call.arguments for call in read] == [
        json.dumps(given_, ensure_ascii=False, separators=separators) for _, _, given_ in calls
    ]
    assert len({call.id for call in read}) == len(calls) == reader.num_calls
    for index in range(len(calls)):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert first.id is not None and first.name == calls[index][0] and first.arguments == ""
        assert all(piece.id is None and piece.name is None for piece in rest)


@pytest.mark.parametrize(
    ("text", "name", "rest"),
    [
        ('{"name": "f", "arguments": {"a": "x', "f", '{"a": "x'),
        ('{"name": "f", "arguments": {"a": {}', "f", '{"a": {}'),
        ('{"name":"f","input":{"a":"\\"}', "f", '{"a":"\\"}'),
    ],
)
def test_what_has_come_of_a_cut_call_is_told(text: str, name: str, rest: str) -> None:
    (call,) = added_up(CallReader().push(text))
    assert (call.name, call.arguments) == (name, rest)


@pytest.mark.parametrize("text", ["", ARROW, ARROW + '[{"name": "f"', '{"name": "f", "arguments":'])
def test_a_call_that_has_not_begun_is_none(text: str) -> None:
    reader = CallReader()
    assert reader.push(text) == ()
    assert reader.num_calls == 0
