"""The worker's loop in this process: a scripted inbox before it, a scripted runner behind it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import pytest

from server.core import GenerationRequest, Tiles, TokenEvent
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.facts import EngineStats, EngineTotals
from server.engine.messages import (
    Abort,
    Building,
    FromEngine,
    Joined,
    Progress,
    Stop,
    Submit,
    ToEngine,
)
from server.engine.meter import Meter
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, DeviceError, SpanOutput, StepBudget, TokenMask
from server.engine.worker import MASK_POLL_S, MAX_BUILDING, Worker
from tests.engine.samples import FACTS, PICTURE, SPEC, make_request, make_tiles


class ScriptedChannel:
    """Hands out one list of messages each time it is asked; then says stop.

    `sent` is what came without its stats, which are in `stats`, one for each `Progress`.
    """

    def __init__(self, script: list[list[ToEngine]]) -> None:
        self._script = iter(script)
        self.sent: list[FromEngine] = []
        self.stats: list[EngineStats | None] = []
        self.timeouts_s: list[float] = []

    def receive(self, *, timeout_s: float) -> list[tuple[ToEngine, list[Tiles]]]:
        self.timeouts_s.append(timeout_s)
        return [
            (message, make_tiles(message.request) if isinstance(message, Submit) else [])
            for message in next(self._script, [Stop()])
        ]

    def send(self, message: FromEngine) -> None:
        if isinstance(message, Progress):
            self.stats.append(message.stats)
            message = Progress(message.events)
        self.sent.append(message)

    @property
    def events(self) -> list[TokenEvent]:
        return [e for message in self.sent if isinstance(message, Progress) for e in message.events]


class ScriptedRunner:
    """Token 7 for everybody, except where `fault` does something for one of the requests."""

    def __init__(self, fault: Callable[[str], None] = lambda request_id: None) -> None:
        self._fault = fault
        self.batches: list[list[str]] = []

    def run(self, batch: Batch) -> list[SpanOutput]:
        names = [span.sequence.request_id for span in batch.spans]
        self.batches.append(names)
        for name in names:
            self._fault(name)
        return [SpanOutput(7 if span.is_sampled else None) for span in batch.spans]


class MasksByHand:
    """Masks that allow all, made when a test says so; `begun` are the futures by request.

    `ready` are masks by grammar that need not be made.
    """

    def __init__(self) -> None:
        self.begun: dict[str, Future[list[TokenMask]]] = {}
        self.ready: dict[str | None, list[TokenMask]] = {}

    def known(self, request: GenerationRequest) -> list[TokenMask] | None:
        return self.ready.get(request.grammar)

    def begin(self, request: GenerationRequest) -> Future[list[TokenMask]]:
        return self.begun.setdefault(request.request_id, Future())


def run(
    script: list[list[ToEngine]],
    runner: ScriptedRunner | None = None,
    *,
    masks: MasksByHand | None = None,
    max_running: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[ScriptedChannel, Scheduler]:
    channel = ScriptedChannel(script)
    scheduler = Scheduler(
        BlockPool(num_blocks=64, block_size=4),
        EncoderCache(max_bytes=1000, bytes_per_token=1),
        budget=StepBudget(100, 1, 100),
        max_running=max_running,
    )
    worker = Worker(
        channel,
        scheduler,
        runner or ScriptedRunner(),
        masks or MasksByHand(),
        facts=FACTS,
        vision=SPEC,
        meter=Meter(scheduler, clock=clock),
    )
    worker.run()
    return channel, scheduler


def submit(name: str, **options: object) -> Submit:
    request = make_request(name, **options)  # type: ignore[arg-type]
    return Submit(request, ())


def raise_for(*names: str) -> Callable[[str], None]:
    def fault(request_id: str) -> None:
        if request_id in names:
            raise ValueError("a fault")

    return fault


def test_a_request_is_announced_and_then_answered() -> None:
    channel, _ = run([[submit("a", max_tokens=2)], [], []])
    assert channel.sent[:3] == [
        Joined(("a",)),
        Progress((TokenEvent("a", 7),)),
        Progress((TokenEvent("a", 7, "length"),)),
    ]


def test_it_waits_only_when_idle_and_then_says_that_it_lives() -> None:
    channel, _ = run([[], [submit("a", max_tokens=3)], [], [], []])
    assert channel.timeouts_s == [1.0, 1.0, 0, 0, 1.0, 1.0]
    assert channel.sent.count(Progress()) == 2


def test_every_step_is_a_sign_of_life() -> None:
    """Also one that gives no token: here vision, and chunks of a prompt."""
    channel, _ = run([[submit("a", prompt=(1,) * 250, max_tokens=1)], [], []])
    progress = [message for message in channel.sent if isinstance(message, Progress)]
    assert [len(message.events) for message in progress] == [0, 0, 1]


def test_stats_come_first_now_and_then_and_last() -> None:
    """The clock goes on by a sixteenth of a second whenever it is read: three times a step."""
    ticks = itertools.count()
    script: list[list[ToEngine]] = [[submit("a", max_tokens=7)], *[[] for _ in range(6)]]
    channel, _ = run(script, clock=lambda: next(ticks) / 16)
    told = [stats is not None for stats in channel.stats]
    assert told == [True, False, True, False, True, False, True]
    assert channel.stats[0] == EngineStats(
        num_running=1,
        num_blocks_used=1,
        totals=EngineTotals(
            num_steps=1,
            steps_s=1 / 16,
            num_steps_up_to=(0, 0, 0, 0, 0, 0, 1, *[0] * 7),
            num_prompt_tokens_computed=3,
            num_tokens_generated=1,
            num_prefix_tokens_looked_up=3,
        ),
    )


def test_stats_are_told_with_whatever_leaves_nothing_behind() -> None:
    """However short it has been since the last ones: after them nobody may ask for long."""
    script: list[list[ToEngine]] = [[submit("a"), submit("b")], [Abort("a")], [Abort("b")]]
    channel, _ = run(script, clock=lambda: 0.0)
    assert [event.finish_reason for event in channel.events] == [None, "abort", None, "abort"]
    last = channel.stats[-1]
    assert last is not None
    assert (last.num_running, last.num_waiting, last.num_blocks_used) == (0, 0, 0)
    assert last.totals.num_tokens_generated == 2


def test_an_abort_takes_effect_before_the_next_step() -> None:
    script: list[list[ToEngine]] = [[submit("a", max_tokens=50)], [Abort("a")]]
    channel, scheduler = run(script)
    assert channel.events == [TokenEvent("a", 7), TokenEvent("a", None, "abort")]
    assert scheduler.pool.num_used == 0


def test_choices_are_announced_as_one_and_answered_each() -> None:
    channel, scheduler = run([[submit("a", max_tokens=1, num_choices=3)]], max_running=3)
    assert channel.sent[0] == Joined(("a",))
    assert channel.events == [TokenEvent("a", 7, "length", choice=choice) for choice in range(3)]
    assert scheduler.pool.num_used == 0


def test_one_choice_is_aborted_or_all() -> None:
    script: list[list[ToEngine]] = [
        [submit("a", max_tokens=50, num_choices=3)],
        [Abort("a", 1)],
        [Abort("a")],
    ]
    channel, scheduler = run(script, max_running=3)
    aborted = [event.choice for event in channel.events if event.finish_reason == "abort"]
    assert aborted == [1, 0, 2]
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("max_running", [1, 2, 5])
def test_choices_that_fail_end_their_request_and_not_the_process(max_running: int) -> None:
    """Each would fail in a step of its own, and two such steps in a row end the process."""
    script: list[list[ToEngine]] = [
        [submit("bad", num_choices=4), submit("good", max_tokens=1)],
        [],
        [],
    ]
    channel, scheduler = run(script, ScriptedRunner(raise_for("bad")), max_running=max_running)
    ends = [(e.request_id, e.finish_reason) for e in channel.events if e.finish_reason != "abort"]
    assert sorted(ends) == [("bad", "error"), ("good", "length")]
    assert scheduler.pool.num_used == 0


def test_choices_that_should_not_have_come_get_one_error_event() -> None:
    channel, _ = run([[submit("bad", max_tokens=10_000, num_choices=3)]])
    assert channel.events == [TokenEvent("bad", None, "error", "context_length_exceeded")]


def test_aborting_the_unknown_is_harmless() -> None:
    channel, _ = run([[Abort("nobody"), submit("a", max_tokens=1)]])
    assert channel.events == [TokenEvent("a", 7, "length")]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"prompt": (1, FACTS.logits_width)}, "invalid_prompt"),
        ({"prompt": (1, PICTURE, SPEC.image_token_id)}, "invalid_prompt"),
        ({"max_tokens": 10_000}, "context_length_exceeded"),
    ],
)
def test_what_should_not_have_come_gets_an_error_event(wrong: dict[str, object], code: str) -> None:
    channel, _ = run([[submit("bad", **wrong), submit("good", max_tokens=1)]])
    assert channel.events == [
        TokenEvent("bad", None, "error", code),
        TokenEvent("good", 7, "length"),
    ]


def test_the_one_that_fails_alone_ends_and_the_others_go_on() -> None:
    script: list[list[ToEngine]] = [
        [submit("good", max_tokens=2), submit("bad"), submit("also good", max_tokens=2)],
        [],
        [],
    ]
    runner = ScriptedRunner(raise_for("bad"))
    channel, scheduler = run(script, runner, max_running=3)
    assert runner.batches[:4] == [["good", "bad", "also good"], ["good"], ["bad"], ["also good"]]
    assert channel.events == [
        TokenEvent("good", 7),
        TokenEvent("bad", None, "error", "internal_error"),
        TokenEvent("also good", 7),
        TokenEvent("good", 7, "length"),
        TokenEvent("also good", 7, "length"),
    ]
    assert scheduler.pool.num_used == 0


def test_a_fault_that_passes_costs_nobody_anything() -> None:
    faults = iter([ValueError("once")])

    def fail_once(request_id: str) -> None:
        for fault in faults:
            raise fault

    channel, _ = run([[submit("a", max_tokens=1)]], ScriptedRunner(fail_once))
    assert channel.events == [TokenEvent("a", 7, "length")]


def test_a_second_failed_step_in_a_row_ends_the_process() -> None:
    with pytest.raises(ValueError, match="a fault"):
        run([[submit("bad"), submit("worse")], [], []], ScriptedRunner(raise_for("bad", "worse")))


def test_failed_steps_with_a_good_one_between_do_not() -> None:
    names = ("bad", "good", "worse")
    script: list[list[ToEngine]] = [[submit(name, max_tokens=1) for name in names], [], []]
    channel, _ = run(script, ScriptedRunner(raise_for("bad", "worse")))
    assert [event.finish_reason for event in channel.events] == ["error", "length", "error"]


def test_failed_steps_in_which_somebody_is_served_end_nothing() -> None:
    script: list[list[ToEngine]] = [
        [submit("good", max_tokens=9), submit("bad")],
        [submit("worse")],
        *[[] for _ in range(9)],
    ]
    channel, _ = run(script, ScriptedRunner(raise_for("bad", "worse")), max_running=3)
    ends = {event.request_id: event.finish_reason for event in channel.events}
    assert ends == {"good": "length", "bad": "error", "worse": "error"}


def test_what_is_computed_alone_is_told_at_once() -> None:
    """Each is a sign of life: all of them together may take longer than a step may."""
    script: list[list[ToEngine]] = [[submit(n, max_tokens=1) for n in ("a", "bad", "b")]]
    channel, _ = run(script, ScriptedRunner(raise_for("bad")), max_running=3)
    progress = [message for message in channel.sent if isinstance(message, Progress)]
    assert [[event.request_id for event in message.events] for message in progress[:3]] == [
        ["a"],
        ["bad"],
        ["b"],
    ]


def test_a_device_in_doubt_ends_the_process_at_once() -> None:
    def fault(request_id: str) -> None:
        raise DeviceError

    runner = ScriptedRunner(fault)
    with pytest.raises(DeviceError):
        run([[submit("a")]], runner)
    assert runner.batches == [["a"]]


class Anything:
    """A mask that allows all and keeps what it is told."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def submit_bound(name: str, **options: object) -> Submit:
    message = submit(name, stop=(9,), **options)
    return Submit(replace(message.request, grammar="a grammar"), ())


def when_asked(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], object]]) -> None:
    """Does something before the inbox is asked for the n-th time."""
    receive = ScriptedChannel.receive

    def acting(self: ScriptedChannel, *, timeout_s: float) -> list[tuple[ToEngine, list[Tiles]]]:
        acts.get(len(self.timeouts_s), lambda: None)()
        return receive(self, timeout_s=timeout_s)

    monkeypatch.setattr(ScriptedChannel, "receive", acting)


def test_nobody_waits_for_the_masks_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, made = MasksByHand(), [Anything(), Anything()]
    when_asked(monkeypatch, {3: lambda: masks.begun["a"].set_result([*made])})
    script: list[list[ToEngine]] = [
        [submit_bound("a", max_tokens=2, num_choices=2), submit("b", max_tokens=2)],
        *[[] for _ in range(6)],
    ]
    channel, scheduler = run(script, masks=masks, max_running=4)
    assert [(e.request_id, e.choice) for e in channel.events] == [
        ("b", 0),
        ("b", 0),
        ("a", 0),
        ("a", 1),
        ("a", 0),
        ("a", 1),
    ]
    # While only a mask is missing it looks for it often, but does not spin.
    assert channel.timeouts_s[:4] == [1.0, 0, MASK_POLL_S, MASK_POLL_S]
    assert [mask.accepted for mask in made] == [[7], [7]]
    assert scheduler.idle


def test_a_request_may_be_aborted_while_its_masks_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks, made = MasksByHand(), [Anything(), Anything()]
    when_asked(monkeypatch, {3: lambda: masks.begun["b"].set_result([*made])})
    script: list[list[ToEngine]] = [
        [submit_bound("a"), submit_bound("b", max_tokens=2, num_choices=2)],
        [Abort("a"), Abort("b", 0)],
        *[[] for _ in range(5)],
    ]
    channel, scheduler = run(script, masks=masks, max_running=4)
    assert masks.begun["a"].cancelled()
    assert channel.events == [
        TokenEvent("a", None, "abort"),
        TokenEvent("b", None, "abort"),
        TokenEvent("b", 7, choice=1),
        TokenEvent("b", 7, "length", choice=1),
    ]
    assert [mask.accepted for mask in made] == [[], [7]] and scheduler.idle


def test_masks_that_cannot_be_made_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = MasksByHand()
    when_asked(monkeypatch, {1: lambda: masks.begun["a"].set_exception(ValueError("no"))})
    script: list[list[ToEngine]] = [[submit_bound("a"), submit("b", max_tokens=1)], [], []]
    channel, _ = run(script, masks=masks)
    assert channel.events == [
        TokenEvent("b", 7, "length"),
        TokenEvent("a", None, "error", "internal_error"),
    ]


def submit_of(tenant: str, name: str, *, grammar: str = "a grammar") -> Submit:
    request = replace(submit_bound(name, max_tokens=1).request, tenant=tenant, grammar=grammar)
    return Submit(request, ())


def told(channel: ScriptedChannel) -> list[tuple[str, ...]]:
    return [message.request_ids for message in channel.sent if isinstance(message, Building)]


def test_tenants_take_turns_where_matchers_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at once, and it is said whose before they are begun."""
    masks = MasksByHand()
    many = [f"many {number}" for number in range(MAX_BUILDING + 3)]

    def finish(*names: str) -> None:
        for name in names:
            masks.begun[name].set_result([Anything()])

    when_asked(
        monkeypatch,
        {
            2: lambda: finish(*many[:2]),
            4: lambda: finish(*many[2:MAX_BUILDING], "few"),
            6: lambda: finish(*many[MAX_BUILDING:]),
        },
    )
    channel, scheduler = run(
        [
            [submit_of("many", name) for name in many],
            [submit_of("few", "few")],
            *[[] for _ in range(9)],
        ],
        masks=masks,
    )
    first, next_of_many, last = many[:MAX_BUILDING], many[MAX_BUILDING], many[MAX_BUILDING + 1 :]
    assert told(channel) == [
        tuple(first),
        (*first[2:], next_of_many, "few"),
        (next_of_many, *last),
        (),
    ]
    assert len(channel.events) == len(many) + 1 and scheduler.idle


def test_what_is_known_needs_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was when it came, or has become so meanwhile."""
    masks = MasksByHand()
    masks.ready["old"] = [Anything()]
    names = [f"r{number}" for number in range(MAX_BUILDING + 1)]

    def finish() -> None:
        masks.ready["a grammar"] = [Anything()]
        masks.begun["r0"].set_result([Anything()])

    when_asked(monkeypatch, {2: finish})
    channel, _ = run(
        [
            [*[submit_of("t", name) for name in names], submit_of("t", "known", grammar="old")],
            *[[] for _ in range(6)],
        ],
        masks=masks,
    )
    assert [event.request_id for event in channel.events] == ["known", "r0", names[-1]]
    assert told(channel) == [tuple(names[:-1]), tuple(names[1:-1])]


def test_who_is_aborted_in_line_is_never_built() -> None:
    masks = MasksByHand()
    names = [f"r{number}" for number in range(MAX_BUILDING + 1)]
    script: list[list[ToEngine]] = [
        [submit_of("t", name) for name in names],
        [Abort(names[-1])],
        [Abort(names[0])],
        [],
    ]
    channel, _ = run(script, masks=masks)
    assert set(masks.begun) == set(names[:-1])
    assert [event.request_id for event in channel.events] == [names[-1], names[0]]
    assert told(channel)[-1] == tuple(names[1:-1])


def test_who_is_aborted_while_a_thread_builds_is_still_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot be ended there: if it ends the process, nobody else is to be blamed."""
    masks = MasksByHand()
    ready: list[TokenMask] = [Anything()]

    def run_both() -> None:
        for future in masks.begun.values():
            assert future.set_running_or_notify_cancel()

    when_asked(
        monkeypatch,
        {1: run_both, 3: lambda: [each.set_result(ready) for each in masks.begun.values()]},
    )
    script: list[list[ToEngine]] = [
        [submit_of("t", "deadly"), submit_of("t", "other")],
        [],
        [Abort("deadly")],
        *[[] for _ in range(4)],
    ]
    channel, scheduler = run(script, masks=masks)
    assert told(channel) == [("deadly", "other"), ()]
    assert channel.events == [
        TokenEvent("deadly", None, "abort"),
        TokenEvent("other", 7, "length"),
    ]
    assert scheduler.idle
