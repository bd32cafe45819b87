"""Deadlines as a state machine: a client and a worker, one clock, and what is between them.

Deadlines are the HTTP process's own affair: that of waiting for a place among those who run, and
that of the whole request. The engine only hears of an abort, in whatever state the request is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from starlette.types import Message

from server.api.sse import in_time
from server.config import EngineConfig, ModelConfig
from server.core import Tiles, TokenEvent
from server.engine import client as client_module
from server.engine.blocks import BlockPool
from server.engine.client import EngineClient, QueueStats, TokenStream
from server.engine.encodings import EncoderCache
from server.engine.messages import (
    FromEngine,
    Joined,
    Progress,
    Stop,
    Submit,
    ToEngine,
    decode_to_engine,
)
from server.engine.meter import Meter
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, SpanOutput, StepBudget
from server.engine.worker import Worker
from server.errors import RequestTimeout, Unavailable
from server.telemetry.metrics import Metrics
from tests.engine.samples import FACTS, make_request
from tests.engine.test_worker import MasksByHand

MAX_WAIT_S = 10.5
"""Between two ticks of the whole deadlines, so that never two pass at once."""

NUM_BLOCKS = 12


class ClockedLoop(asyncio.SelectorEventLoop):
    """Its time goes on when it is told."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def settle(self) -> None:
        """Whatever can happen now has happened."""

        async def turns() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        self.run_until_complete(turns())


class ProcessByHand:
    """In the place of the engine's process: it computes, and is heard, when a rule says so."""

    status, is_silent, pid, num_restarts = "ready", False, None, 0
    facts = replace(FACTS, max_request_tokens=4 * NUM_BLOCKS, kv_tokens=4 * NUM_BLOCKS)

    def __init__(self, *args: object, listener: EngineClient, **more: object) -> None:
        self.listener = listener
        self.inbox: list[ToEngine] = []
        self.unheard: deque[FromEngine] = deque()
        self.present: set[str] = set()
        self.scheduler = Scheduler(
            BlockPool(num_blocks=NUM_BLOCKS, block_size=4),
            EncoderCache(max_bytes=0, bytes_per_token=1),
            budget=StepBudget(5, 1, 5),
            max_running=3,
        )

    async def start(self) -> None: ...

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        self.inbox.append(decode_to_engine(bytes(frames[0])))

    def receive(self, *, timeout_s: float) -> list[tuple[ToEngine, list[Tiles]]]:
        taken, self.inbox = self.inbox, []
        return [(message, []) for message in (*taken, Stop())]

    def run(self, batch: Batch) -> list[SpanOutput]:
        return [SpanOutput(7 if span.is_sampled else None) for span in batch.spans]

    def send_back(self, message: FromEngine) -> None:
        self.unheard.append(message)
        for event in message.events if isinstance(message, Progress) else ():
            if event.finish_reason is not None:
                self.present.discard(event.request_id)

    def compute(self) -> None:
        """Takes in what came, and one step."""
        self.present |= {each.request.request_id for each in self.inbox if isinstance(each, Submit)}
        channel = mock.Mock(receive=self.receive, send=self.send_back)
        meter, masks = Meter(self.scheduler), MasksByHand()
        worker = Worker(
            channel, self.scheduler, self, masks, facts=self.facts, vision=None, meter=meter
        )
        worker.run()
        self.scheduler.check()
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.present)

    def hear(self) -> FromEngine:
        """The next of what it told reaches the client."""
        message = self.unheard.popleft()
        if isinstance(message, Joined):
            self.listener.on_joined(message.request_ids)
        elif isinstance(message, Progress):
            self.listener.on_events(message.events)
        return message


async def never() -> Message:
    return await asyncio.Future()


async def listen(stream: TokenStream, events: list[TokenEvent]) -> None:
    with contextlib.closing(stream):
        async for event in stream:
            events.append(event)


@dataclass(slots=True)
class Asked:
    """A request whose end nobody has heard of. It has no time to join by once it is known to."""

    max_tokens: int
    stream: TokenStream
    events: list[TokenEvent]
    task: asyncio.Task[None]
    join_by_s: float | None
    end_by_s: float


class DeadlineMachine(RuleBasedStateMachine):
    """Requests come, are computed, heard, given up, and both their deadlines pass, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = ClockedLoop()
        with mock.patch.object(client_module, "EngineProcess", ProcessByHand):
            self.client = EngineClient(
                Path("nowhere"),
                vision=None,
                engine=EngineConfig(max_wait_s=MAX_WAIT_S),
                model=ModelConfig(),
                metrics=Metrics(),
            )
        self.process: ProcessByHand = self.client._process  # type: ignore[assignment]
        self.loop.run_until_complete(self.client.start())
        self.num_requests = 0
        self.open: dict[str, Asked] = {}

    @rule(num_ids=st.integers(1, 17), max_tokens=st.integers(1, 20), timeout_s=st.integers(1, 30))
    def submit(self, num_ids: int, max_tokens: int, timeout_s: int) -> None:
        name, self.num_requests = str(self.num_requests), self.num_requests + 1
        request = make_request(name, prompt=range(1, num_ids + 1), max_tokens=max_tokens)
        try:
            stream = self.loop.run_until_complete(self.client.submit(request, []))
        except Unavailable:
            return
        events: list[TokenEvent] = []
        join_by_s, end_by_s = self.loop.now_s + MAX_WAIT_S, self.loop.now_s + timeout_s
        work = in_time(listen(stream, events), receive=never, deadline_s=end_by_s)
        task = self.loop.create_task(work)
        self.open[name] = Asked(max_tokens, stream, events, task, join_by_s, end_by_s)
        self.loop.settle()

    @rule()
    def compute(self) -> None:
        """By this step the engine has let go of everybody who was given up before it."""
        self.process.compute()
        assert self.process.present <= self.open.keys()

    @rule()
    def hear(self) -> None:
        if not self.process.unheard:
            return
        message = self.process.hear()
        self.loop.settle()
        if isinstance(message, Joined):
            for name in self.open.keys() & message.request_ids:
                self.open[name].join_by_s = None
        for name, asked in list(self.open.items()):
            assert asked.task.done() == (len(asked.events) == asked.max_tokens)
            if asked.task.done():
                assert asked.task.exception() is None
                assert asked.events[-1].finish_reason == "length"
                del self.open[name]

    @rule(num_seconds=st.integers(1, 12))
    def wait(self, num_seconds: int) -> None:
        for _ in range(2 * num_seconds):
            self.loop.now_s += 0.5
            self.loop.settle()
            for name, asked in list(self.open.items()):
                is_late = asked.end_by_s <= self.loop.now_s
                waits_too_long = asked.join_by_s is not None and asked.join_by_s <= self.loop.now_s
                assert asked.task.done() == (is_late or waits_too_long)
                if is_late:
                    assert isinstance(asked.task.exception(), RequestTimeout)
                elif waits_too_long:
                    assert asked.task.exception() is None
                    assert asked.events == [TokenEvent(name, None, "error", "server_is_overloaded")]
                if asked.task.done():
                    del self.open[name]

    @rule(number=st.integers(0, 20))
    def give_up(self, number: int) -> None:
        asked = self.open.pop(str(number), None)
        if asked is not None:
            asked.stream.close()
            self.loop.settle()
            assert asked.task.done() and asked.task.exception() is None

    @invariant()
    def the_queue_holds_those_who_are_open(self) -> None:
        num_waiting = sum(asked.join_by_s is not None for asked in self.open.values())
        queue = self.client.queue
        assert (queue.num_waiting, queue.num_waiting + queue.num_started) == (
            num_waiting,
            len(self.open),
        )

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            for asked in self.open.values():
                asked.task.cancel()
            self.loop.settle()
            self.loop.close()

    def finish(self) -> None:
        """Whose deadlines have not passed are answered, and nothing is left behind."""
        for _ in range(1000):
            if not (self.process.present or self.process.inbox or self.process.unheard):
                break
            self.compute()
            while self.process.unheard:
                self.hear()
        assert not self.open and self.client.queue == QueueStats()
        assert self.process.scheduler.idle and self.process.scheduler.pool.num_used == 0


DeadlineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDeadlineMachine = DeadlineMachine.TestCase
