"""Who may enter, and that the counts it depends on are those of who is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.core import GenerationRequest
from server.engine.admission import (
    DRAIN_WINDOW_S,
    MAX_DEPARTED,
    MAX_WAITING_CAPACITIES,
    Admissions,
    Admitted,
    Departures,
    Shortage,
)
from server.engine.facts import EngineTotals, QueueStats
from tests.engine.samples import make_request


def make_admitted(
    name: str,
    *,
    tenant: str = "tenant",
    num_tokens: int = 3,
    num_tile_bytes: int = 0,
    num_choices: int = 1,
) -> Admitted:
    request = make_request(name, prompt=(1,) * num_tokens, num_choices=num_choices)
    request = replace(request, tenant=tenant)
    return Admitted(request, [b"message"], num_tile_bytes)


def shortage(
    admissions: Admissions,
    *,
    tenant: str = "tenant",
    num_tokens: int = 3,
    num_tile_bytes: int = 0,
    num_choices: int = 1,
) -> Shortage | None:
    new = make_admitted("new", tenant=tenant, num_tokens=num_tokens, num_choices=num_choices)
    return admissions.shortage(new.request, num_tile_bytes=num_tile_bytes, kv_tokens=100)


def test_who_finds_no_room_is_told_how_fast_others_end() -> None:
    now_s = 1000.0
    admissions = Admissions(max_waiting=4, max_per_tenant=None, clock=lambda: now_s)
    assert admissions.room_in_s("waiting_requests", "tenant") == 0
    admitted = [make_admitted(str(index), num_choices=2) for index in range(20)]
    others = [make_admitted(f"other {index}", tenant="other") for index in range(10)]
    for each in (*admitted, *others):
        admissions.enter(each)
    now_s += 5
    assert admissions.room_in_s("waiting_requests", "tenant") == 5 * 50  # as if one had ended
    for each in admitted[:10]:
        admissions.leave(each)
    # 20 in 5 s; 30 wait, of whom 20 are this tenant's.
    assert admissions.room_in_s("waiting_requests", "tenant") == 30 / 4
    assert admissions.room_in_s("key_requests", "tenant") == pytest.approx(30 / 20 / 4)
    assert admissions.room_in_s("key_requests", "other") == pytest.approx(30 / 10 / 4)
    now_s += DRAIN_WINDOW_S - 1
    admissions.leave(admitted[10])
    assert admissions.room_in_s("waiting_requests", "tenant") == DRAIN_WINDOW_S / 22 * 28
    now_s += 2  # what ended so long ago counts no more
    assert admissions.room_in_s("waiting_requests", "tenant") == DRAIN_WINDOW_S / 2 * 28
    for each in (*admitted[11:], *others):
        admissions.leave(each)
    now_s += 1000
    admissions.enter(make_admitted("after a pause"))
    now_s += 1
    assert admissions.room_in_s("waiting_requests", "tenant") == 1


def test_what_is_known_before_a_request_is_prepared() -> None:
    admissions = Admissions(max_waiting=2, max_per_tenant=1)
    assert admissions.too_many("tenant", 8) is None
    first = make_admitted("0")
    admissions.enter(first)
    assert admissions.too_many("tenant", 1) == "key_requests"
    assert admissions.too_many("other", 1) is None
    assert admissions.too_many("other", 2) == "waiting_requests"
    admissions.leave(first)
    assert admissions.too_many("tenant", 1) is None


def test_each_bound_has_its_name() -> None:
    admissions = Admissions(max_waiting=3, max_per_tenant=2)
    most_bytes = 1 << 30
    most_tokens = MAX_WAITING_CAPACITIES * 100
    # Nobody waits: whatever can run is admitted.
    assert shortage(admissions, num_tokens=9999, num_tile_bytes=most_bytes + 1) is None
    first = make_admitted("0", num_tokens=100, num_tile_bytes=10)
    admissions.enter(first)
    assert shortage(admissions, num_tokens=most_tokens - 100) is None
    assert shortage(admissions, num_tokens=most_tokens - 99) == "waiting_prompt_tokens"
    assert shortage(admissions, num_tile_bytes=most_bytes - 10) is None
    assert shortage(admissions, num_tile_bytes=most_bytes - 9) == "waiting_tile_bytes"
    admissions.enter(make_admitted("1"))
    assert shortage(admissions) == "key_requests"
    assert shortage(admissions, tenant="other") is None
    admissions.enter(make_admitted("2", tenant="other"))
    assert shortage(admissions, tenant="other") == "waiting_requests"
    admissions.start(first)
    assert shortage(admissions, tenant="other") is None
    admissions.leave(first)
    assert shortage(admissions) is None


def test_without_a_bound_for_each_tenant_there_is_none() -> None:
    admissions = Admissions(max_waiting=10, max_per_tenant=None)
    for name in "01234":
        admissions.enter(make_admitted(name))
    assert shortage(admissions) is None


def test_each_choice_counts_as_a_request_does() -> None:
    admissions = Admissions(max_waiting=4, max_per_tenant=3)
    # One that is over a bound by itself is admitted where there is nobody else.
    assert shortage(admissions, num_choices=8) is None
    first = make_admitted("0", num_choices=2)
    admissions.enter(first)
    assert admissions.stats.num_waiting == 2
    assert shortage(admissions) is None
    assert shortage(admissions, num_choices=2) == "key_requests"
    assert shortage(admissions, tenant="other", num_choices=2) is None
    assert shortage(admissions, tenant="other", num_choices=3) == "waiting_requests"
    admissions.start(first)
    assert admissions.stats == QueueStats(num_started=2)
    assert shortage(admissions, num_choices=2) == "key_requests"
    admissions.leave(first)
    assert admissions.stats == QueueStats()


def test_they_are_kept_in_the_order_they_came_and_may_leave_meanwhile() -> None:
    admissions = Admissions(max_waiting=10, max_per_tenant=None)
    for name in "3120":
        admissions.enter(make_admitted(name))
    left = []
    for admitted in admissions:
        admissions.leave(admitted)
        left.append(admitted.request.request_id)
    assert left == ["3", "1", "2", "0"] and list(admissions) == []


@pytest.mark.parametrize("name", [field.name for field in fields(EngineTotals)])
def test_totals_are_added_field_by_field(name: str) -> None:
    def only(value: int) -> EngineTotals:
        is_tuple = isinstance(getattr(EngineTotals(), name), tuple)
        counts = (value, *[0] * 13)
        return replace(EngineTotals(), **{name: counts if is_tuple else value})  # type: ignore[arg-type]

    assert only(3).plus(only(4)) == only(7)


MAX_PER_TENANT = 3


def num_choices(requests: list[Admitted]) -> int:
    return sum(admitted.request.num_choices for admitted in requests)


class AdmissionsMachine(RuleBasedStateMachine):
    """Any order of what can happen to requests; the counts are compared with a recount."""

    def __init__(self) -> None:
        super().__init__()
        self.admissions = Admissions(max_waiting=99, max_per_tenant=MAX_PER_TENANT)
        self.present: list[Admitted] = []
        self.num_entered = 0

    @rule(
        tenant=st.sampled_from("abc"),
        num_tokens=st.integers(1, 9),
        num_tile_bytes=st.integers(0, 9),
        num_choices=st.integers(1, 8),
    )
    def enter(self, tenant: str, num_tokens: int, num_tile_bytes: int, num_choices: int) -> None:
        admitted = make_admitted(
            str(self.num_entered),
            tenant=tenant,
            num_tokens=num_tokens,
            num_tile_bytes=num_tile_bytes,
            num_choices=num_choices,
        )
        self.num_entered += 1
        self.admissions.enter(admitted)
        self.present.append(admitted)

    @precondition(lambda self: self.present)
    @rule(index=st.integers(0, 99))
    def start(self, index: int) -> None:
        self.admissions.start(self.present[index % len(self.present)])

    @precondition(lambda self: any(not each.is_waiting for each in self.present))
    @rule()
    def crash(self) -> None:
        for admitted in self.present:
            if not admitted.is_waiting:
                self.admissions.meet_crash(admitted)

    @precondition(lambda self: self.present)
    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        admitted = self.present.pop(index % len(self.present))
        self.admissions.leave(admitted)
        assert admitted.request.request_id not in self.admissions

    @invariant()
    def the_counts_are_right(self) -> None:
        waiting = [admitted for admitted in self.present if admitted.is_waiting]
        assert self.admissions.stats == QueueStats(
            num_started=num_choices(self.present) - num_choices(waiting),
            num_waiting=num_choices(waiting),
            waiting_prompt_tokens=sum(len(each.request.prompt_ids) for each in waiting),
            waiting_tile_bytes=sum(each.num_tile_bytes for each in waiting),
        )
        assert list(self.admissions) == self.present
        assert set(map(id, self.admissions.suspects)) == {
            id(each) for each in self.present if each.num_crashes
        }

    @invariant()
    def a_tenant_that_has_its_share_gets_no_more(self) -> None:
        for tenant in "abc":
            count = num_choices([each for each in self.present if each.request.tenant == tenant])
            is_short = shortage(self.admissions, tenant=tenant) == "key_requests"
            assert is_short == (count >= MAX_PER_TENANT)


AdmissionsMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
TestAdmissionsMachine = AdmissionsMachine.TestCase


def admitted_of(name: str, *, is_waiting: bool = True) -> Admitted:
    admitted = Admitted(make_request(name), [], 0)
    admitted.is_waiting = is_waiting
    return admitted


def names_of(requests: Iterable[GenerationRequest]) -> list[str]:
    return [request.request_id for request in requests]


def test_who_left_is_there_until_the_engine_has_let_go() -> None:
    departures = Departures()
    for name, is_waiting in (("waited", True), ("ran", False), ("joined", True), ("ended", False)):
        departures.add(admitted_of(name, is_waiting=is_waiting))
    departures.join("joined")
    departures.join("somebody else")
    departures.end("ended")
    assert names_of(departures.take_at_work()) == ["ran", "joined"]
    assert departures.take_at_work() == []


def test_who_left_is_there_as_long_as_a_thread_builds_for_him() -> None:
    departures = Departures()
    departures.build(["left", "other"])
    departures.add(admitted_of("left"))
    departures.end("left")
    assert names_of(departures.take_at_work()) == ["left"]
    departures.build(["left"])
    departures.add(admitted_of("left"))
    departures.end("left")
    departures.build([])
    assert departures.take_at_work() == []


def test_of_those_who_left_so_many_are_remembered() -> None:
    departures = Departures()
    for number in range(MAX_DEPARTED + 10):
        departures.add(admitted_of(str(number), is_waiting=False))
    assert len(departures.take_at_work()) == MAX_DEPARTED
