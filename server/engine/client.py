"""The engine as the HTTP process sees it: requests in, streams of tokens out.

`Engine` is the seam the API is written and tested against; `EngineClient` is the engine process
behind it. Nothing here knows tensors, text or HTTP, and importing it does not import torch.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from server.config import EngineConfig, ModelConfig
from server.core import GenerationRequest, Tiles, TokenEvent, VisionSpec
from server.engine.admission import Admissions, Admitted, Departures, Shortage
from server.engine.facts import STEP_BOUNDS_S, EngineFacts, EngineStats, EngineStatus, QueueStats
from server.engine.messages import Abort, Start, encode, submit_frames
from server.engine.process import ENTRY_MODULE, EngineProcess, RestartPolicy
from server.engine.quarantine import MAX_CRASHES_MET, Quarantine
from server.engine.validation import check_request
from server.errors import (
    ModelLoading,
    PoisonRequest,
    RateLimited,
    ServerError,
    ShuttingDown,
    Unavailable,
    WorkerRestarting,
)
from server.telemetry.metrics import Metrics

__all__ = [
    "STEP_BOUNDS_S",
    "Engine",
    "EngineClient",
    "EngineFacts",
    "EngineStats",
    "EngineStatus",
    "QueueStats",
    "TokenStream",
]


class TokenStream:
    """The events of one admitted request; those of each choice in order, the last with a reason.

    A choice that ends by "stop" carries the ending id in its last event: it counts as generated
    but is not part of the text. One that ends by "length" carries its last ordinary token, and
    "error" none; an error ends all choices. Closing the stream, or dropping the last reference to
    it, aborts a request that has not finished; a closed stream or choice yields nothing more.
    """

    def __init__(
        self,
        mailbox: asyncio.Queue[TokenEvent],
        abort: Callable[[int | None], None],
        *,
        num_choices: int = 1,
    ) -> None:
        """`abort` is called with the number of a choice, or None for all that are left.

        Whoever fills `mailbox` must hold no reference to the stream, or it is never dropped.
        """
        self._mailbox = mailbox
        self._running = set(range(num_choices))
        self._ended = False
        self._abort_choice = abort
        self._abort = weakref.finalize(self, abort, None)
        self._abort.atexit = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._ended:
            event = await self._mailbox.get()
            is_error = event.finish_reason == "error"
            if self._ended or not (is_error or event.choice in self._running):
                continue  # closed while waiting
            if event.finish_reason is not None:
                self._running.discard(event.choice)
            if is_error or not self._running:
                self._ended = True
                self._abort.detach()
            return event
        raise StopAsyncIteration

    def close_choice(self, choice: int) -> None:
        """Abort one choice unless it has finished. The others go on; the last one ends them all."""
        if choice in self._running and not self._ended:
            self._running.discard(choice)
            if self._running:
                self._abort_choice(choice)
            else:
                self.close()

    def close(self) -> None:
        """Abort the request unless it has finished. May be called any number of times."""
        if not self._ended:
            self._ended = True
            self._abort()
            # Wakes a consumer that is waiting for the next event; it never sees this one.
            self._mailbox.put_nowait(TokenEvent("", None, "abort"))


class Engine(Protocol):
    """What the API needs of an engine."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def facts(self) -> EngineFacts | None:
        """None until the model has been loaded for the first time."""

    @property
    def worker_pid(self) -> int | None: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def stats(self) -> EngineStats:
        """What the engine process last said; its totals are those of all processes so far."""

    @property
    def queue(self) -> QueueStats: ...

    async def start(self) -> None:
        """Load the model; returns when ready. One-line CheckpointError or ConfigError if it cannot.

        Meanwhile `status` is "loading" and `submit` refuses with ModelLoading, so this may run
        beside a server that is already listening.
        """

    async def stop(self) -> None:
        """End every stream with an error event and the engine process with them."""

    def check_room(self, tenant: str, num_choices: int) -> None:
        """Raise what `submit` would now, as far as that is known before a request is prepared."""

    async def submit(self, request: GenerationRequest, tiles: Sequence[Tiles]) -> TokenStream:
        """Admit the request or raise a ServerError; `tiles[i]` are those of `request.vision[i]`."""


class EngineClient:
    """The engine process behind the seam: admits requests, keeps them, hands out their events.

    A request is kept until its first token, so that one the process lost while it was waiting, or
    before it had answered anything, is sent again to the next process. The caller notices nothing.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        vision: VisionSpec | None,
        engine: EngineConfig,
        model: ModelConfig,
        metrics: Metrics,
        max_requests_per_tenant: int | None = None,
        on_loading: Callable[[int, int], None] | None = None,
        restart_policy: RestartPolicy | None = None,
        entry_module: str = ENTRY_MODULE,
    ) -> None:
        """`on_loading` is told the bytes of weights read so far and in all, also at a restart."""
        self._vision = vision
        self._metrics = metrics
        self._max_wait_s = engine.max_wait_s
        self._on_loading = on_loading
        self._requests = Admissions(
            max_waiting=engine.max_requests_waiting, max_per_tenant=max_requests_per_tenant
        )
        self._building_ids: frozenset[str] = frozenset()
        self._departures = Departures()
        self._quarantine = Quarantine()
        self._stats = EngineStats()
        self._totals_of_the_gone = self._stats.totals
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = EngineProcess(
            Start(
                checkpoint=str(checkpoint.resolve()),
                device=model.device,
                dtype=model.dtype,
                attention=engine.attention_backend,
                max_context=model.max_context,
                num_threads=engine.num_threads,
                block_size=engine.block_size,
                kv_cache_bytes=engine.kv_cache_bytes,
                encoder_cache_bytes=engine.encoder_cache_bytes,
                max_requests_running=engine.max_requests_running,
                max_tokens_per_step=engine.max_tokens_per_step,
            ),
            listener=self,
            restart_policy=restart_policy or RestartPolicy(max_delay_s=engine.restart_delay_max_s),
            loading_timeout_s=engine.loading_timeout_s,
            step_timeout_s=engine.step_timeout_s,
            shutdown_timeout_s=engine.shutdown_timeout_s,
            entry_module=entry_module,
        )

    @property
    def status(self) -> EngineStatus:
        return "silent" if self._process.is_silent else self._process.status

    @property
    def facts(self) -> EngineFacts | None:
        return self._process.facts

    @property
    def worker_pid(self) -> int | None:
        return self._process.pid

    @property
    def num_restarts(self) -> int:
        return self._process.num_restarts

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def queue(self) -> QueueStats:
        return self._requests.stats

    async def launch(self) -> None:
        """Begin to load; returns when the process runs. `start` does it where nobody else has."""
        self._loop = asyncio.get_running_loop()
        await self._process.launch()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._process.start()

    async def stop(self) -> None:
        self._end_all("shutting_down")
        await self._process.stop()
        self._end_all("shutting_down")

    def check_room(self, tenant: str, num_choices: int) -> None:
        self._refuse(self._requests.too_many(tenant, num_choices), tenant)

    async def submit(self, request: GenerationRequest, tiles: Sequence[Tiles]) -> TokenStream:
        facts = self._ready_facts()
        check_request(request, tiles, facts=facts, vision=self._vision)
        if request.request_id in self._requests:
            raise ServerError("Two requests have the same id.")
        if self._quarantine.is_barred(request):
            raise PoisonRequest()
        num_tile_bytes = sum(medium.nbytes for medium in tiles)
        self._check_room(request, num_tile_bytes, facts)
        if request.sampling.seed is None:  # drawn here, so that sent twice it is the same request
            sampling = replace(request.sampling, seed=secrets.randbits(63))
            request = replace(request, sampling=sampling)
        admitted = Admitted(request, submit_frames(request, tiles), num_tile_bytes)
        self._requests.enter(admitted)
        self._process.send(admitted.frames)
        self._limit_wait(request.request_id)
        return TokenStream(
            admitted.mailbox,
            partial(self._abort_from_anywhere, request.request_id),
            num_choices=request.num_choices,
        )

    def on_loading(self, num_bytes: int, total_bytes: int) -> None:
        if self._on_loading is not None:
            self._on_loading(num_bytes, total_bytes)

    def on_ready(self, facts: EngineFacts) -> None:
        for admitted in self._requests:
            if not admitted.num_crashes:
                self._process.send(admitted.frames)
        self._send_next_suspect()

    def on_building(self, request_ids: Sequence[str]) -> None:
        self._building_ids = frozenset(request_ids)
        self._departures.build(request_ids)

    def on_joined(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            admitted = self._requests.get(request_id)
            if admitted is not None:
                self._requests.start(admitted)
            else:
                self._departures.join(request_id)

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            admitted = self._requests.get(event.request_id)
            if admitted is None and event.finish_reason is not None:
                self._departures.end(event.request_id)
            if admitted is None or event.choice not in admitted.running:
                continue  # its stream was closed meanwhile, or it was
            admitted.mailbox.put_nowait(event)
            admitted.frames = []
            if event.finish_reason is not None:
                admitted.running.discard(event.choice)
            if event.finish_reason == "error":
                admitted.running.clear()  # the engine has ended them too
            if not admitted.running:
                self._requests.leave(admitted)
            if admitted.num_crashes:
                self._send_next_suspect()

    def on_stats(self, stats: EngineStats) -> None:
        self._stats = replace(stats, totals=self._totals_of_the_gone.plus(stats.totals))

    def on_lost(self, *, is_final: bool) -> None:
        self._totals_of_the_gone = self._stats.totals
        self._stats = EngineStats(totals=self._totals_of_the_gone)
        departed = self._departures.take_at_work()
        # A process may end before its word of who joined has left it. Where nothing is known to
        # have been done for anybody, it may have been anyone who was sent.
        at_work = {
            admitted.request.request_id
            for admitted in self._requests
            if not admitted.is_waiting or admitted.request.request_id in self._building_ids
        }
        self._building_ids = frozenset()
        self._quarantine.meet_crash(
            [*departed, *self._blamed(at_work, has_departed=bool(departed))]
        )
        for admitted in self._requests:
            if is_final or not admitted.frames:
                self._end(admitted, "worker_restarting")
                continue
            admitted.has_met_restart = True
            is_at_work = admitted.request.request_id in at_work
            if departed:  # it may have been theirs: nobody who is still here is held back for it
                self._requests.wait_again(admitted)
            elif is_at_work if at_work else not admitted.is_held_back:
                self._requests.meet_crash(admitted)
            admitted.is_held_back = admitted.num_crashes > 0
            if admitted.num_crashes >= MAX_CRASHES_MET:
                self._quarantine.bar(admitted.request)
                self._end(admitted, PoisonRequest.code)

    def _blamed(self, at_work: Collection[str], *, has_departed: bool) -> list[GenerationRequest]:
        """Those that were computed; of them the one that was tried for an earlier crash, if any."""
        there = [each for each in self._requests if each.request.request_id in at_work]
        tried = [each for each in there if each.num_crashes and each.frames]
        blamed = there if has_departed else tried or there
        return [admitted.request for admitted in blamed]

    def _send_next_suspect(self) -> None:
        """Those that a crash has met go one after another, so that one is guilty of the next."""
        if self._process.status != "ready":
            return  # nothing would be sent; `on_ready` asks again
        unanswered = [admitted for admitted in self._requests.suspects if admitted.frames]
        if unanswered and all(admitted.is_held_back for admitted in unanswered):
            unanswered[0].is_held_back = False
            self._process.send(unanswered[0].frames)

    def _ready_facts(self) -> EngineFacts:
        match self._process.status:
            case "loading":
                raise ModelLoading
            case "restarting":
                raise WorkerRestarting
            case "crashed":
                raise WorkerRestarting("The model worker has failed and needs the operator.")
            case "stopping":
                raise ShuttingDown
            case "ready" | "silent":
                if self._process.facts is None:
                    raise ModelLoading
                return self._process.facts

    def _check_room(
        self, request: GenerationRequest, num_tile_bytes: int, facts: EngineFacts
    ) -> None:
        shortage = self._requests.shortage(
            request, num_tile_bytes=num_tile_bytes, kv_tokens=facts.kv_tokens
        )
        self._refuse(shortage, request.tenant)

    def _refuse(self, shortage: Shortage | None, tenant: str) -> None:
        if shortage is not None:
            self._metrics.count_rejection(shortage)
            error = RateLimited if shortage == "key_requests" else Unavailable
            raise error(wait_s=self._requests.room_in_s(shortage, tenant))

    def _limit_wait(self, request_id: str) -> None:
        # By its id: a timer must not keep the pixels of a request that is over.
        asyncio.get_running_loop().call_later(self._max_wait_s, self._end_wait, request_id)

    def _end_wait(self, request_id: str) -> None:
        """Whoever still waits after the longest wait is told so; a restart does not count."""
        admitted = self._requests.get(request_id)
        if admitted is None or not admitted.is_waiting:
            return
        if self._process.status != "ready" or admitted.num_crashes or admitted.has_met_restart:
            admitted.has_met_restart = False
            self._limit_wait(request_id)
            return
        self._metrics.count_rejection("waiting_time")
        self._process.send([encode(Abort(request_id))])
        self._end(admitted, "server_is_overloaded")
        self._departures.add(admitted)

    def _abort_from_anywhere(self, request_id: str, choice: int | None) -> None:
        """From a finaliser, so possibly from another thread or after the end of the loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, request_id, choice)

    def _abort(self, request_id: str, choice: int | None) -> None:
        admitted = self._requests.get(request_id)
        if admitted is None:
            return
        left = set() if choice is None else admitted.running - {choice}
        if left != admitted.running:
            admitted.running = left
            self._process.send([encode(Abort(request_id, choice))])
        if not left:
            self._requests.leave(admitted)
            self._departures.add(admitted)
            self._send_next_suspect()

    def _end(self, admitted: Admitted, error_code: str) -> None:
        self._requests.leave(admitted)
        event = TokenEvent(admitted.request.request_id, None, "error", error_code)
        admitted.mailbox.put_nowait(event)

    def _end_all(self, error_code: str) -> None:
        for admitted in self._requests:
            self._end(admitted, error_code)
