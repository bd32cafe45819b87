from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from server.chat.planner import Rung, plan

LADDERS = st.lists(
    st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True).map(
        lambda tokens: [
            Rung(each, limit) for limit, each in enumerate(sorted(tokens, reverse=True))
        ]
    ),
    max_size=5,
)


@given(LADDERS, st.integers(0, 200))
def test_a_plan_keeps_to_the_budget_whenever_one_can(
    ladders: list[list[Rung]], budget: int
) -> None:
    planned = plan(ladders, budget)
    least = sum(ladder[-1].tokens for ladder in ladders)
    assert (planned is None) == (least > budget)
    if planned is not None:
        assert sum(rung.tokens for rung in planned) <= budget
        assert all(rung in ladder for rung, ladder in zip(planned, ladders, strict=True))


@given(LADDERS, st.integers(0, 200))
def test_nothing_gets_less_than_needed(ladders: list[list[Rung]], budget: int) -> None:
    """The last step down of the plan was needed: one step up by anybody who stepped down as the
    last of all would not fit."""
    planned = plan(ladders, budget)
    if planned is None:
        return
    steps = [ladder.index(rung) for rung, ladder in zip(planned, ladders, strict=True)]
    total = sum(rung.tokens for rung in planned)
    gains = [
        ladder[step - 1].tokens - ladder[step].tokens
        for step, ladder in zip(steps, ladders, strict=True)
        if step
    ]
    assert not gains or total + max(gains) > budget


@given(LADDERS, st.integers(0, 200), st.integers(0, 200))
def test_a_larger_budget_never_gives_anybody_less(
    ladders: list[list[Rung]], one: int, other: int
) -> None:
    smaller, larger = (plan(ladders, budget) for budget in sorted((one, other)))
    if smaller is not None:
        assert larger is not None
        pairs = zip(larger, smaller, strict=True)
        assert all(more.tokens >= less.tokens for more, less in pairs)


def test_the_largest_pays_first_and_of_equals_the_last() -> None:
    big, small = [Rung(30, 3), Rung(20, 2), Rung(10, 1)], [Rung(12, 2), Rung(5, 1)]
    chosen = {
        budget: [rung.tokens for rung in plan([small, big, big], budget) or ()]
        for budget in (72, 71, 62, 52, 51, 42, 35, 32, 25)
    }
    assert chosen == {
        72: [12, 30, 30],
        71: [12, 30, 20],
        62: [12, 30, 20],
        52: [12, 20, 20],
        51: [12, 20, 10],
        42: [12, 20, 10],
        35: [12, 10, 10],
        32: [12, 10, 10],
        25: [5, 10, 10],
    }


def test_without_media_every_budget_is_kept() -> None:
    assert plan([], 0) == []


def test_planning_many_media_is_one_pass() -> None:
    ladders = [[Rung(tokens, tokens) for tokens in range(2_000, 0, -1)] for _ in range(18)]
    planned = plan(ladders, 18)
    assert planned is not None
    assert list(itertools.chain(rung.tokens for rung in planned)) == [1] * 18
