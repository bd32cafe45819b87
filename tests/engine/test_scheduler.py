"""The scheduler as a state machine, with a model that is a function of the ids."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.core import TokenEvent
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Sequence, Span, SpanOutput
from tests.engine.samples import PICTURE, VIDEO, make_request, make_tiles


def make_scheduler(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_tokens_per_step: int = 8,
    max_tiles_per_step: int = 2,
    max_running: int = 1,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=block_size),
        max_tokens_per_step=max_tokens_per_step,
        max_tiles_per_step=max_tiles_per_step,
        max_running=max_running,
    )


def make_sequence(name: str = "r", **options: object) -> Sequence:
    request = make_request(name, **options)  # type: ignore[arg-type]
    return Sequence.from_request(request, make_tiles(request))


def next_id(span: Span) -> int:
    """The fake model: depends on all ids so far, like a real one."""
    return sum(span.sequence.token_ids) % 97


def step(scheduler: Scheduler, batch: Batch) -> list[TokenEvent]:
    outputs = [
        SpanOutput(next_id(span)) if span.is_sampled else SpanOutput() for span in batch.spans
    ]
    return scheduler.commit(batch, outputs)


def answer(scheduler: Scheduler) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while batch := scheduler.schedule():
        events += step(scheduler, batch)
    return events


def test_a_long_prompt_goes_in_chunks_and_then_one_position_a_step() -> None:
    scheduler = make_scheduler(max_tokens_per_step=3)
    scheduler.add(make_sequence(prompt=tuple(range(7)), max_tokens=3))
    spans = []
    while batch := scheduler.schedule():
        spans += [(span.start, span.stop, span.is_sampled) for span in batch.spans]
        step(scheduler, batch)
    assert spans == [(0, 3, False), (3, 6, False), (6, 7, True), (7, 8, True), (8, 9, True)]


def test_an_answer_ends_by_length_and_returns_its_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=2))
    events = answer(scheduler)
    assert [(event.token_id, event.finish_reason) for event in events] == [
        (6, None),
        (12, "length"),
    ]
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_a_stop_id_ends_the_answer_and_is_its_last_event() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=9, stop=(12,)))
    assert answer(scheduler)[-1] == TokenEvent("r", 12, "stop")


def test_a_stop_id_that_is_also_the_last_allowed_token_is_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=2, stop=(12,)))
    assert answer(scheduler)[-1].finish_reason == "stop"


def test_requests_run_in_the_order_they_came_one_at_a_time() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_sequence(name, max_tokens=2))
    assert [event.request_id for event in answer(scheduler)] == ["a", "a", "b", "b", "c", "c"]


def test_joined_names_a_sequence_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=2))
    joined = []
    while batch := scheduler.schedule():
        joined.append([sequence.request_id for sequence in batch.joined])
        step(scheduler, batch)
    assert joined == [["a"], []]


def test_nobody_overtakes_the_first_that_waits_for_room() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_running=4)
    scheduler.add(make_sequence("running", prompt=(1,) * 8, max_tokens=4))
    scheduler.add(make_sequence("large", prompt=(1,) * 8, max_tokens=1))
    scheduler.add(make_sequence("small", prompt=(1,), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert [sequence.request_id for sequence in batch.joined] == ["running"]
    events = step(scheduler, batch) + answer(scheduler)
    finished = [event.request_id for event in events if event.finish_reason]
    assert finished == ["running", "large", "small"]


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="longer than the whole cache"):
        scheduler.add(make_sequence(prompt=(1,) * 8, max_tokens=1))


def test_tiles_are_encoded_before_the_positions_that_need_them() -> None:
    """Two of its seven tiles a step; the text before it is computed meanwhile."""
    scheduler = make_scheduler(num_blocks=64, max_tokens_per_step=8, max_tiles_per_step=2)
    scheduler.add(make_sequence(prompt=(1, 2, VIDEO, 3), max_tokens=1))
    steps = []
    while batch := scheduler.schedule():
        tiles = [(piece.start, piece.stop) for piece in batch.vision]
        spans = [(span.start, span.stop) for span in batch.spans]
        steps.append((tiles, spans))
        step(scheduler, batch)
    assert steps == [
        ([(0, 2)], [(0, 2)]),
        ([(2, 4)], []),
        ([(4, 6)], []),
        ([(6, 7)], [(2, 10)]),
        ([], [(10, 13)]),
    ]


def test_a_medium_behind_the_step_s_last_position_is_not_encoded_yet() -> None:
    scheduler = make_scheduler(max_tokens_per_step=2)
    scheduler.add(make_sequence(prompt=(1, 2, PICTURE), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None and batch.vision == [] and len(batch.spans) == 1


def test_a_failed_span_ends_its_request_alone() -> None:
    scheduler = make_scheduler(max_running=2)
    scheduler.add(make_sequence("good", max_tokens=1))
    scheduler.add(make_sequence("bad", max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    events = scheduler.commit(batch, [SpanOutput(5), SpanOutput(error_code="internal_error")])
    assert events == [
        TokenEvent("good", 5, "length"),
        TokenEvent("bad", None, "error", "internal_error"),
    ]
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_aborting_what_is_not_there_is_harmless() -> None:
    assert make_scheduler().abort("nobody") == []


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps and aborts, in a pool that is often too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.max_tokens_per_step = 5
        self.scheduler = make_scheduler(
            num_blocks=12,
            max_tokens_per_step=self.max_tokens_per_step,
            max_tiles_per_step=3,
            max_running=3,
        )
        self.added: list[Sequence] = []
        self.answers: dict[str, list[int]] = {}
        self.finals: dict[str, str] = {}

    @rule(
        num_ids=st.integers(1, 9),
        max_tokens=st.integers(1, 6),
        medium=st.sampled_from([None, PICTURE, VIDEO]),
        stop=st.lists(st.integers(0, 96), max_size=20),
    )
    def add(self, num_ids: int, max_tokens: int, medium: object, stop: list[int]) -> None:
        prompt = (*range(1, num_ids + 1), *([medium] if medium else []))
        name = str(len(self.added))
        sequence = make_sequence(name, prompt=prompt, max_tokens=max_tokens, stop=stop)
        self.added.append(sequence)
        self.answers[name] = []
        self.scheduler.add(sequence)

    @rule()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.scheduler.idle
            return
        assert batch.num_tokens <= self.max_tokens_per_step
        assert sum(map(len, batch.vision)) <= 3
        for span in batch.spans:
            assert span.start == span.sequence.num_computed < span.stop <= len(span.sequence)
            assert span.stop <= len(span.sequence.block_table) * self.scheduler.pool.block_size
        self.note(step(self.scheduler, batch))

    @rule(number=st.integers(0, 40))
    def abort(self, number: int) -> None:
        self.note(self.scheduler.abort(str(number)))

    def note(self, events: list[TokenEvent]) -> None:
        for event in events:
            assert event.request_id not in self.finals
            if event.token_id is not None:
                self.answers[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                self.finals[event.request_id] = event.finish_reason

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()
        kept = [s for s in self.added if self.finals.get(s.request_id) != "abort"]
        joined = [sequence for sequence in kept if sequence.status != "waiting"]
        assert kept[: len(joined)] == joined  # first come, first joined

    def teardown(self) -> None:
        """All that was admitted ends, as it would have ended alone, and nothing is left behind."""
        while not self.scheduler.idle:
            self.step()
        self.scheduler.check()
        assert self.scheduler.pool.num_used == 0
        for sequence in self.added:
            name = sequence.request_id
            alone = make_scheduler(num_blocks=64)
            alone.add(Sequence.from_request(sequence.request, make_tiles(sequence.request)))
            expected = [event.token_id for event in answer(alone)]
            if self.finals[name] == "abort":
                assert self.answers[name] == expected[: len(self.answers[name])]
            else:
                assert self.answers[name] == expected


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
