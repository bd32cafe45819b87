from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.line import Line

TENANTS = st.lists(st.sampled_from("abc"), max_size=30)


def filled(tenants: list[str]) -> Line[int]:
    line: Line[int] = Line()
    for number, tenant in enumerate(tenants):
        line.add(number, tenant=tenant)
    return line


def drained(line: Line[int]) -> list[int]:
    taken: list[int] = []
    while (entry := line.take()) is not None:
        taken.append(entry)
    return taken


@given(TENANTS)
def test_everybody_comes_once_and_each_tenant_s_in_order(tenants: list[str]) -> None:
    line = filled(tenants)
    assert len(line) == len(tenants)
    taken = drained(line)
    assert sorted(taken) == list(range(len(tenants)))
    assert len(line) == 0
    for tenant in "abc":
        own = [number for number in taken if tenants[number] == tenant]
        assert own == sorted(own)


@given(TENANTS)
def test_tenants_take_turns(tenants: list[str]) -> None:
    taken = [tenants[number] for number in drained(filled(tenants))]
    for length in range(1, len(taken)):
        # Of two who both still wait, neither has had more than one turn more.
        had, left = Counter(taken[:length]), Counter(taken[length:])
        turns = [had[tenant] for tenant in left if left[tenant]]
        assert max(turns) - min(turns) <= 1


@given(TENANTS)
def test_who_may_not_go_is_passed(tenants: list[str]) -> None:
    line = filled(tenants)
    taken = []
    while (entry := line.take(lambda number: number % 2 == 0)) is not None:
        taken.append(entry)
    assert sorted(taken) == list(range(0, len(tenants), 2))
    assert all(number % 2 for number in drained(line))


@given(TENANTS, st.integers(0, 29))
def test_who_leaves_is_not_called(tenants: list[str], number: int) -> None:
    line = filled(tenants)
    tenant = tenants[number] if number < len(tenants) else "a"
    line.remove(number, tenant=tenant)
    line.remove(number, tenant=tenant)
    expected = [other for other in range(len(tenants)) if other != number]
    assert sorted(drained(line)) == expected


@given(TENANTS, st.sampled_from("abcd"))
def test_the_longest_make_room_for_shorter_ones(tenants: list[str], newcomer: str) -> None:
    line = filled(tenants)
    before = Counter(tenants)
    entry = line.crowd_out(tenant=newcomer)
    most = max(before.values(), default=0)
    assert (entry is None) == (most <= before[newcomer] + 1)
    if entry is not None:
        tenant = tenants[entry]
        assert before[tenant] == most
        newest = max(number for number, each in enumerate(tenants) if each == tenant)
        assert entry == newest
        assert entry not in drained(line)


def test_a_full_line_comes_to_equal_shares() -> None:
    line = filled(["a"] * 9)
    for number in range(9, 99):
        if line.crowd_out(tenant="b") is not None:
            line.add(number, tenant="b")
    counts = Counter("a" if number < 9 else "b" for number in drained(line))
    assert counts == {"a": 5, "b": 4}
