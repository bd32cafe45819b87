"""The loop of the engine process: take in what came, compute a step, tell what it made.

Synchronous and free of features; what is longer belongs in the scheduler, the runner or the
sampler. It must not know who listens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from server.core import GenerationRequest, Tiles, TokenEvent, VisionSpec
from server.engine.facts import EngineFacts
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
from server.engine.sequence import Batch, DeviceError, Sequence, SpanOutput, TokenMask
from server.engine.validation import check_request
from server.errors import ServerError
from server.line import Line

HEARTBEAT_S = 1.0
"""How often an idle worker says that it lives."""

MASK_POLL_S = 0.005
"""How often a worker that is otherwise idle looks whether a mask has been made."""

MAX_BUILDING = 4
"""Requests whose masks may be made next, in the order they were taken: so many are under suspicion
when the process dies over one, and so many at most come before another tenant's. More than one,
because steps may be long and the next is only taken between two."""

_log = logging.getLogger(__name__)


class Channel(Protocol):
    """The worker's one contact with the outside."""

    def receive(self, *, timeout_s: float) -> list[tuple[ToEngine, list[Tiles]]]:
        """What has come, waiting so long for the first; `Stop` when nobody is there any more."""

    def send(self, message: FromEngine) -> None: ...


class StepRunner(Protocol):
    def run(self, batch: Batch) -> AbstractSequence[SpanOutput]: ...


class Masks(Protocol):
    def known(self, request: GenerationRequest) -> list[TokenMask] | None:
        """One for each choice of a request whose grammar was started before, made at once."""

    def begin(self, request: GenerationRequest) -> Future[list[TokenMask]]:
        """One for each choice of a request with a grammar, made while steps go on."""


@dataclass(slots=True, eq=False)
class _Building:
    """A request that waits for its masks, and those of its choices that are still wanted.

    `masks` come once it has had its turn.
    """

    request: GenerationRequest
    tiles: list[Tiles]
    choices: list[int]
    masks: Future[list[TokenMask]] | None = None


class Worker:
    """Runs until it is told to stop. An exception out of `run` ends the engine process."""

    def __init__(
        self,
        channel: Channel,
        scheduler: Scheduler,
        runner: StepRunner,
        masks: Masks,
        *,
        facts: EngineFacts,
        vision: VisionSpec | None,
        meter: Meter,
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._meter = meter
        self._runner = runner
        self._masks = masks
        self._building: dict[str, _Building] = {}  # those in line among them
        self._line: Line[_Building] = Line()
        self._told_building: tuple[str, ...] = ()
        self._facts = facts
        self._vision = vision
        self._stopping = False
        self._last_step_failed = False

    def run(self) -> None:
        while not self._stopping:
            self._drain_inbox(block=self._scheduler.idle)
            self._add_built()
            self._build_next()
            if batch := self._scheduler.schedule():
                self._announce(batch)
                self._step(batch)

    def _drain_inbox(self, *, block: bool) -> None:
        if block:
            self._scheduler.check()
        longest_s = MASK_POLL_S if self._building else HEARTBEAT_S
        received = self._channel.receive(timeout_s=longest_s if block else 0)
        if block and not received:
            self._emit([])
        for message, tiles in received:
            match message:
                case Submit():
                    self._add(message, tiles)
                case Abort():
                    self._abort(message)
                case Stop():
                    self._stopping = True

    def _announce(self, batch: Batch) -> None:
        """Said before the step, so that the other side knows whom a crash has met."""
        if batch.joined:
            names = dict.fromkeys(sequence.request_id for sequence in batch.joined)
            self._channel.send(Joined(tuple(names)))

    def _emit(self, events: AbstractSequence[TokenEvent]) -> None:
        self._channel.send(Progress(tuple(events), self._meter.stats_if_due()))

    def _add(self, message: Submit, tiles: list[Tiles]) -> None:
        request = message.request
        try:
            check_request(request, tiles, facts=self._facts, vision=self._vision)
        except ServerError as error:
            self._emit([TokenEvent(request.request_id, None, "error", error.code)])
            return
        waiting = _Building(request, tiles, list(range(request.num_choices)))
        if request.grammar is None:
            self._add_to_scheduler(waiting, [None] * request.num_choices)
        elif (masks := self._masks.known(request)) is not None:
            self._add_to_scheduler(waiting, masks)
        else:
            self._building[request.request_id] = waiting
            self._line.add(waiting, tenant=request.tenant)

    def _add_built(self) -> None:
        """To the scheduler with those whose masks are made, whoever came meanwhile."""
        for request_id, waiting in list(self._building.items()):
            if waiting.masks is None or not waiting.masks.done():
                continue
            del self._building[request_id]
            try:
                masks = waiting.masks.result()
            except Exception:
                _log.exception("The masks of a request could not be made.")
                if waiting.choices:
                    self._emit([TokenEvent(request_id, None, "error", "internal_error")])
                continue
            self._add_to_scheduler(waiting, masks)

    def _build_next(self) -> None:
        """Gives those in line their turn. Said before it begins, so that a crash has its suspects.

        What has become known since they came needs no turn.
        """
        turns: list[_Building] = []
        begun = [each for each in self._building.values() if each.masks is not None]
        while len(begun) + len(turns) < MAX_BUILDING and (waiting := self._line.take()) is not None:
            masks = self._masks.known(waiting.request)
            if masks is None:
                turns.append(waiting)
            else:
                del self._building[waiting.request.request_id]
                self._add_to_scheduler(waiting, masks)
        names = tuple(each.request.request_id for each in [*begun, *turns])
        if names != self._told_building:
            self._told_building = names
            self._channel.send(Building(names))
        for waiting in turns:
            waiting.masks = self._masks.begin(waiting.request)

    def _add_to_scheduler(
        self, waiting: _Building, masks: AbstractSequence[TokenMask | None]
    ) -> None:
        for choice in waiting.choices:
            sequence = Sequence.from_request(
                waiting.request, waiting.tiles, choice=choice, constraint=masks[choice]
            )
            self._scheduler.add(sequence)

    def _abort(self, message: Abort) -> None:
        waiting = self._building.get(message.request_id)
        if waiting is None:
            self._emit(self._scheduler.abort(message.request_id, message.choice))
            return
        gone = [c for c in waiting.choices if message.choice in (None, c)]
        waiting.choices = [c for c in waiting.choices if c not in gone]
        # What a thread is at cannot be ended: it keeps its turn, and is named if the process dies.
        if not waiting.choices and (waiting.masks is None or waiting.masks.cancel()):
            self._line.remove(waiting, tenant=waiting.request.tenant)
            del self._building[message.request_id]
        self._emit([TokenEvent(message.request_id, None, "abort", choice=c) for c in gone])

    def _step(self, batch: Batch) -> None:
        self._meter.begin_step()
        try:
            outputs = self._runner.run(batch)
        except DeviceError:
            raise
        except Exception:
            if self._last_step_failed:
                raise
            _log.exception("A step failed; running it again, one sequence at a time.")
            succeeded = [
                self._alone(sequence, part)
                for sequence, part in batch.alone()
                if sequence.status == "running"  # else another choice of its request has failed
            ]
            self._last_step_failed = not any(succeeded)
            self._meter.end_step()
            return
        self._last_step_failed = False
        events = self._scheduler.commit(batch, outputs)
        self._meter.end_step()
        self._emit(events)

    def _alone(self, sequence: Sequence, batch: Batch) -> bool:
        """Whether it could be computed. Told at once: together they may take long."""
        try:
            outputs = self._runner.run(batch)
        except DeviceError:
            raise
        except Exception:
            _log.exception("A request failed alone.")
            self._emit(self._scheduler.fail(sequence, error_code="internal_error"))
            return False
        self._emit(self._scheduler.commit(batch, outputs))
        return True
