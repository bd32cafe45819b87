"""Who was admitted to the engine, and whether there is room for one more.

Counted as requests come, start and go, so that admitting the thousandth costs what the first did.
Knows no process: who has started, and whom a crash has met, it is told.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from server.core import GenerationRequest, TokenEvent
from server.engine.facts import QueueStats

MAX_WAITING_CAPACITIES = 4
"""How many times the cache's capacity the waiting prompts may be, together."""

MAX_WAITING_TILE_BYTES = 1 << 30

DRAIN_WINDOW_S = 60.0
"""What has ended in it says how fast the queue drains."""

MAX_DEPARTED = 4_096
"""Requests whose leaving the engine has not confirmed; the oldest are forgotten."""

Shortage = Literal[
    "key_requests", "waiting_requests", "waiting_prompt_tokens", "waiting_tile_bytes"
]
"""What there is no room for: requests of one key, or one of the bounds of the queue."""


@dataclass(slots=True, eq=False)
class Admitted:
    """A request in the engine. `frames` is what would be sent again; empty after its first event.

    `running` are the choices that have not finished. It waits until the engine process says that
    one of them joined the running set; `num_crashes` counts the processes that ended while it was
    in there. One that a crash has met is held back while another such is on its way. Whoever met a
    restart while waiting may wait as long again.
    """

    request: GenerationRequest
    frames: list[bytes | memoryview]
    num_tile_bytes: int
    running: set[int] = field(init=False)
    mailbox: asyncio.Queue[TokenEvent] = field(default_factory=asyncio.Queue)
    is_waiting: bool = True
    num_crashes: int = 0
    is_held_back: bool = False
    has_met_restart: bool = False

    def __post_init__(self) -> None:
        self.running = set(range(self.request.num_choices))


class Admissions:
    """All admitted requests that have not ended, in the order they came.

    Each choice of a request counts, until all have ended: in the engine it is a request's work.
    """

    def __init__(
        self,
        *,
        max_waiting: int,
        max_per_tenant: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_per_tenant = max_per_tenant
        self._by_id: dict[str, Admitted] = {}
        self._suspects: dict[str, Admitted] = {}
        self._num_of_tenant: Counter[str] = Counter()
        self._num_waiting = 0
        self._waiting_prompt_tokens = 0
        self._waiting_tile_bytes = 0
        self._clock = clock
        self._busy_since_s = 0.0
        self._ends: deque[tuple[float, int]] = deque()
        self._num_ended = 0

    def __iter__(self) -> Iterator[Admitted]:
        """Of those there are now: whoever iterates may let them leave."""
        return iter(list(self._by_id.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def get(self, request_id: str) -> Admitted | None:
        return self._by_id.get(request_id)

    @property
    def suspects(self) -> list[Admitted]:
        """Those that a crash has met."""
        return list(self._suspects.values())

    @property
    def stats(self) -> QueueStats:
        return QueueStats(
            num_started=self._num_of_tenant.total() - self._num_waiting,
            num_waiting=self._num_waiting,
            waiting_prompt_tokens=self._waiting_prompt_tokens,
            waiting_tile_bytes=self._waiting_tile_bytes,
        )

    def shortage(
        self, request: GenerationRequest, *, num_tile_bytes: int, kv_tokens: int
    ) -> Shortage | None:
        """Why the request cannot be admitted. An empty queue takes anything that can run."""
        too_many = self.too_many(request.tenant, request.num_choices)
        if too_many is not None:
            return too_many
        num_tokens = self._waiting_prompt_tokens + len(request.prompt_ids)
        if self._num_waiting and num_tokens > MAX_WAITING_CAPACITIES * kv_tokens:
            return "waiting_prompt_tokens"
        if self._num_waiting and self._waiting_tile_bytes + num_tile_bytes > MAX_WAITING_TILE_BYTES:
            return "waiting_tile_bytes"
        return None

    def too_many(self, tenant: str, num_choices: int) -> Shortage | None:
        """What of `shortage` is known of a request before anything is done for it."""
        num_of_tenant = self._num_of_tenant[tenant]
        if (
            self._max_per_tenant is not None
            and num_of_tenant
            and num_of_tenant + num_choices > self._max_per_tenant
        ):
            return "key_requests"
        if self._num_waiting and self._num_waiting + num_choices > self._max_waiting:
            return "waiting_requests"
        return None

    def room_in_s(self, shortage: Shortage, tenant: str) -> float:
        """How long until there may be room again, at the rate at which choices ended of late."""
        now_s = self._clock()
        self._forget_ends(now_s)
        # Where none has ended yet, one takes at least as long as they have been at it.
        each_s = min(DRAIN_WINDOW_S, now_s - self._busy_since_s) / max(1, self._num_ended)
        if shortage == "key_requests":  # until one of its own has ended
            return each_s * self._num_of_tenant.total() / max(1, self._num_of_tenant[tenant])
        return each_s * self._num_waiting  # until those who wait now have started

    def enter(self, admitted: Admitted) -> None:
        if not self._by_id:
            self._busy_since_s = self._clock()
            self._ends.clear()
            self._num_ended = 0
        self._by_id[admitted.request.request_id] = admitted
        self._num_of_tenant[admitted.request.tenant] += admitted.request.num_choices
        self._count_waiting(admitted, 1)

    def start(self, admitted: Admitted) -> None:
        """It joined the running set, so that it waits no longer."""
        if admitted.is_waiting:
            admitted.is_waiting = False
            self._count_waiting(admitted, -1)

    def meet_crash(self, admitted: Admitted) -> None:
        """The process ended while it was, or may have been, computed: it waits for the next one."""
        admitted.num_crashes += 1
        self.wait_again(admitted)
        self._suspects[admitted.request.request_id] = admitted

    def wait_again(self, admitted: Admitted) -> None:
        """The process that had it is no more."""
        if not admitted.is_waiting:
            admitted.is_waiting = True
            self._count_waiting(admitted, 1)

    def leave(self, admitted: Admitted) -> None:
        request = admitted.request
        del self._by_id[request.request_id]
        now_s = self._clock()
        self._ends.append((now_s, request.num_choices))
        self._num_ended += request.num_choices
        self._forget_ends(now_s)
        self._suspects.pop(request.request_id, None)
        self._num_of_tenant[request.tenant] -= request.num_choices
        if not self._num_of_tenant[request.tenant]:
            del self._num_of_tenant[request.tenant]
        if admitted.is_waiting:
            self._count_waiting(admitted, -1)

    def _forget_ends(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_s - DRAIN_WINDOW_S:
            self._num_ended -= self._ends.popleft()[1]

    def _count_waiting(self, admitted: Admitted, change: Literal[1, -1]) -> None:
        self._num_waiting += change * admitted.request.num_choices
        self._waiting_prompt_tokens += change * len(admitted.request.prompt_ids)
        self._waiting_tile_bytes += change * admitted.num_tile_bytes


@dataclass(slots=True)
class _Departed:
    request: GenerationRequest
    is_at_work: bool
    is_known_to_engine: bool = False


class Departures:
    """Requests that nobody waits for any more, until the engine has let go of them too.

    If its process ends before that, they are among those who may have ended it.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, _Departed] = {}
        self._building_ids: frozenset[str] = frozenset()

    def add(self, admitted: Admitted) -> None:
        """The engine is told to abort it."""
        departed = _Departed(admitted.request, is_at_work=not admitted.is_waiting)
        self._by_id[admitted.request.request_id] = departed
        if len(self._by_id) > MAX_DEPARTED:
            del self._by_id[next(iter(self._by_id))]

    def join(self, request_id: str) -> None:
        """It was started before the engine heard that it should not be."""
        if request_id in self._by_id:
            self._by_id[request_id].is_at_work = True

    def end(self, request_id: str) -> None:
        """The engine has aborted it, but for what a thread may still be building for it."""
        if request_id in self._by_id:
            self._by_id[request_id].is_known_to_engine = True
            self._forget()

    def build(self, request_ids: Iterable[str]) -> None:
        """So many grammars are being started, and no others."""
        self._building_ids = frozenset(request_ids)
        self._forget()

    def take_at_work(self) -> list[GenerationRequest]:
        """Those who were there when the process ended; none is left."""
        there = [
            departed.request
            for request_id, departed in self._by_id.items()
            if departed.is_at_work or request_id in self._building_ids
        ]
        self._by_id.clear()
        self._building_ids = frozenset()
        return there

    def _forget(self) -> None:
        self._by_id = {
            request_id: departed
            for request_id, departed in self._by_id.items()
            if not departed.is_known_to_engine or request_id in self._building_ids
        }
