from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.decoding.line import Line

ENTRIES = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30)


def filled(entries: list[tuple[str, bool]]) -> Line[int]:
    line: Line[int] = Line()
    for number, (tenant, is_video) in enumerate(entries):
        line.add(number, tenant=tenant, is_video=is_video)
    return line


def drained(line: Line[int], *, with_videos: bool) -> list[int]:
    taken: list[int] = []
    while (entry := line.take(with_videos=with_videos)) is not None:
        taken.append(entry)
    return taken


@given(ENTRIES)
def test_everybody_comes_once_and_each_tenant_s_in_order(entries: list[tuple[str, bool]]) -> None:
    line = filled(entries)
    assert len(line) == len(entries)
    taken = drained(line, with_videos=True)
    assert sorted(taken) == list(range(len(entries)))
    assert len(line) == 0
    for tenant in "abc":
        own = [number for number in taken if entries[number][0] == tenant]
        assert own == sorted(own)


@given(ENTRIES)
def test_tenants_take_turns(entries: list[tuple[str, bool]]) -> None:
    taken = [entries[number][0] for number in drained(filled(entries), with_videos=True)]
    for length in range(1, len(taken)):
        # Of two who both still wait, neither has had more than one turn more.
        had, left = Counter(taken[:length]), Counter(taken[length:])
        turns = [had[tenant] for tenant in left if left[tenant]]
        assert max(turns) - min(turns) <= 1


@given(ENTRIES)
def test_pictures_pass_videos(entries: list[tuple[str, bool]]) -> None:
    line = filled(entries)
    taken = drained(line, with_videos=False)
    assert sorted(taken) == [n for n, (_, is_video) in enumerate(entries) if not is_video]
    assert all(entries[number][1] for number in drained(line, with_videos=True))


@given(ENTRIES, st.integers(0, 29))
def test_who_leaves_is_not_called(entries: list[tuple[str, bool]], number: int) -> None:
    line = filled(entries)
    tenant = entries[number][0] if number < len(entries) else "a"
    line.remove(number, tenant=tenant)
    line.remove(number, tenant=tenant)
    expected = [other for other in range(len(entries)) if other != number]
    assert sorted(drained(line, with_videos=True)) == expected
