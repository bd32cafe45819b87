"""Who may fetch now: so many in all, so many from one host, the rest in line.

Must not know what a fetch is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import RateLimited, Unavailable
from server.media.line import Line


@dataclass(eq=False)
class _Waiter:
    """`turn` is done when it has come, or will not come."""

    host: str
    turn: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Turns:
    """A waiter whose host is busy is passed by others, so that a slow host holds up only itself."""

    def __init__(self, *, max_running: int, max_per_host: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_per_host = max_per_host
        self._max_waiting = max_waiting
        self._waiting: Line[_Waiter] = Line()
        self._running_of_host: Counter[str] = Counter()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, host: str, *, tenant: str, max_wait_s: float) -> AsyncIterator[None]:
        """Holds a turn. Unavailable where too many wait already, or it does not come in time;
        RateLimited for one that must make room for another tenant's."""
        if self._has_room(host):
            self._start(host)
        else:
            await self._wait(host, tenant, max_wait_s)
        try:
            yield
        finally:
            self._end(host)

    async def _wait(self, host: str, tenant: str, max_wait_s: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            crowded_out = self._waiting.crowd_out(tenant=tenant)
            if crowded_out is None:
                raise Unavailable(shortage="fetches")
            crowded_out.turn.set_exception(RateLimited())
        waiter = _Waiter(host)
        self._waiting.add(waiter, tenant=tenant)
        try:
            async with asyncio.timeout(max_wait_s):
                await asyncio.shield(waiter.turn)
        except BaseException as error:
            has_come = waiter.turn.done() and waiter.turn.exception() is None
            if has_come:  # called and told to leave in the same moment
                self._end(host)
            self._waiting.remove(waiter, tenant=tenant)
            if isinstance(error, TimeoutError):
                raise Unavailable(shortage="fetches") from None
            raise

    def _has_room(self, host: str) -> bool:
        return (
            self.num_running < self._max_running
            and self._running_of_host[host] < self._max_per_host
        )

    def _start(self, host: str) -> None:
        self.num_running += 1
        self._running_of_host[host] += 1

    def _end(self, host: str) -> None:
        self.num_running -= 1
        self._running_of_host[host] -= 1
        if not self._running_of_host[host]:
            del self._running_of_host[host]
        while (waiter := self._waiting.take(lambda each: self._has_room(each.host))) is not None:
            self._start(waiter.host)
            waiter.turn.set_result(None)
