"""The cache of started grammars against the plainest one that could be written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.grammars import MAX_GRAMMAR_BYTES, MAX_GRAMMARS, GrammarCache
from server.grammar.matcher import matcher_bytes

keys = st.integers(0, 9)
actions = st.lists(st.tuples(keys, st.none() | st.integers(0, 60)), max_size=60)


@given(actions=actions, max_entries=st.integers(1, 6), max_bytes=st.integers(1, 100))
def test_it_is_bounded_and_keeps_what_was_used_last(
    actions: list[tuple[int, int | None]], max_entries: int, max_bytes: int
) -> None:
    cache: GrammarCache[int] = GrammarCache(max_entries=max_entries, max_bytes=max_bytes)
    expected: list[tuple[int, int, int]] = []  # key, value, bytes; the last used one comes last
    for value, (key, num_bytes) in enumerate(actions):
        known = [each for each in expected if each[0] == key]
        others = [each for each in expected if each[0] != key]
        if num_bytes is None:
            assert cache.get(key) == (known[0][1] if known else None)
            expected = others + known
        else:
            cache.put(key, value, num_bytes=num_bytes)
            expected = others + [(key, value, num_bytes)] * (num_bytes <= max_bytes)
            while len(expected) > max_entries or sum(each[2] for each in expected) > max_bytes:
                del expected[0]
        assert len(cache) == len(expected) <= max_entries
        assert cache.num_bytes == sum(each[2] for each in expected) <= max_bytes
    for key, value, _ in expected:
        assert cache.get(key) == value


def test_so_many_ordinary_grammars_fit() -> None:
    assert MAX_GRAMMARS * matcher_bytes("x" * 400) <= MAX_GRAMMAR_BYTES
