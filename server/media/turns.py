"""Who may fetch now: so many in all, so many from one host, the rest in the order they came.

Must not know what a fetch is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import Unavailable


@dataclass(eq=False)
class _Waiter:
    host: str
    is_called: asyncio.Event = field(default_factory=asyncio.Event)


class Turns:
    """A waiter whose host is busy is passed by others, so that a slow host holds up only itself."""

    def __init__(self, *, max_running: int, max_per_host: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_per_host = max_per_host
        self._max_waiting = max_waiting
        self._waiting: list[_Waiter] = []
        self._running_of_host: Counter[str] = Counter()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, host: str, *, max_wait_s: float) -> AsyncIterator[None]:
        """Holds a turn; Unavailable where too many wait already, or it does not come in time."""
        if self._has_room(host):
            self._start(host)
        else:
            await self._wait(host, max_wait_s)
        try:
            yield
        finally:
            self._end(host)

    async def _wait(self, host: str, max_wait_s: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise Unavailable(shortage="fetches")
        waiter = _Waiter(host)
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(max_wait_s):
                await waiter.is_called.wait()
        except BaseException as error:
            if waiter.is_called.is_set():  # called and told to leave in the same moment
                self._end(host)
            else:
                self._waiting.remove(waiter)
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
        for waiter in list(self._waiting):
            if self._has_room(waiter.host):
                self._waiting.remove(waiter)
                self._start(waiter.host)
                waiter.is_called.set()
