"""Who may go on now: so many in all, so many at one place, the rest in line.

Must not know what they wait for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import RateLimited, Unavailable
from server.line import Line


@dataclass(eq=False)
class _Waiter:
    """`turn` is done when it has come, or will not come."""

    place: str
    turn: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Turns:
    """A waiter whose place is busy is passed by others: a slow place holds up only itself."""

    def __init__(
        self, *, max_running: int, max_per_place: int, max_waiting: int, shortage: str
    ) -> None:
        """`shortage` is what there is too little of where somebody is refused, in one word."""
        self._shortage = shortage
        self._max_running = max_running
        self._max_per_place = max_per_place
        self._max_waiting = max_waiting
        self._waiting: Line[_Waiter] = Line()
        self._running_of_place: Counter[str] = Counter()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, place: str, *, tenant: str, max_wait_s: float) -> AsyncIterator[None]:
        """Holds a turn. Unavailable where too many wait already, or it does not come in time;
        RateLimited for one that must make room for another tenant's."""
        if self._has_room(place):
            self._start(place)
        else:
            await self._wait(place, tenant, max_wait_s)
        try:
            yield
        finally:
            self._end(place)

    async def _wait(self, place: str, tenant: str, max_wait_s: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            crowded_out = self._waiting.crowd_out(tenant=tenant)
            if crowded_out is None:
                raise Unavailable(shortage=self._shortage)
            crowded_out.turn.set_exception(RateLimited())
        waiter = _Waiter(place)
        self._waiting.add(waiter, tenant=tenant)
        try:
            async with asyncio.timeout(max_wait_s):
                await asyncio.shield(waiter.turn)
        except BaseException as error:
            has_come = waiter.turn.done() and waiter.turn.exception() is None
            if has_come:  # called and told to leave in the same moment
                self._end(place)
            self._waiting.remove(waiter, tenant=tenant)
            if isinstance(error, TimeoutError):
                raise Unavailable(shortage=self._shortage) from None
            raise

    def _has_room(self, place: str) -> bool:
        return (
            self.num_running < self._max_running
            and self._running_of_place[place] < self._max_per_place
        )

    def _start(self, place: str) -> None:
        self.num_running += 1
        self._running_of_place[place] += 1

    def _end(self, place: str) -> None:
        self.num_running -= 1
        self._running_of_place[place] -= 1
        if not self._running_of_place[place]:
            del self._running_of_place[place]
        while (waiter := self._waiting.take(lambda each: self._has_room(each.place))) is not None:
            self._start(waiter.place)
            waiter.turn.set_result(None)
