"""The one thread that renders and encodes prompts, at which tenants take turns.

However many prompts one tenant sends, before another one's next come at most the one that runs and
one more of each tenant. Must not know what a prompt is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from server.errors import RateLimited, ShuttingDown, Unavailable
from server.line import Line

_T = TypeVar("_T")
_Turn: TypeAlias = asyncio.Future[None]


class PromptThread:
    """Does one thing after another; `max_waiting` may wait."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: Line[_Turn] = Line()
        self._is_busy = False
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompt")

    def close(self) -> None:
        """Refuse what waits and what comes; what runs ends by itself."""
        self._is_closed = True
        while (turn := self._waiting.take()) is not None:
            turn.set_exception(ShuttingDown())
        self._thread.shutdown(wait=False)

    async def run(self, work: Callable[[], _T], *, tenant: str) -> _T:
        """What the work returns.

        Unavailable where too many wait already; RateLimited for one that must make room because
        another tenant has fewer there; ShuttingDown once it is closed.
        """
        if self._is_closed:
            raise ShuttingDown
        if self._is_busy:
            await self._wait(tenant)
        self._is_busy = True
        running = self._thread.submit(work)
        loop = asyncio.get_running_loop()
        # When the thread is free, not when nobody waits for it any more.
        running.add_done_callback(lambda _: self._call_next(loop))
        return await asyncio.wrap_future(running)

    def _call_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """From the thread, which may outlive the loop."""
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._next)

    async def _wait(self, tenant: str) -> None:
        """Returns with the thread held."""
        if len(self._waiting) >= self._max_waiting:
            crowded_out = self._waiting.crowd_out(tenant=tenant)
            if crowded_out is None:
                raise Unavailable(shortage="encodes")
            crowded_out.set_exception(RateLimited("Too many prompts of this client are waiting."))
        turn: _Turn = asyncio.get_running_loop().create_future()
        self._waiting.add(turn, tenant=tenant)
        try:
            await asyncio.shield(turn)
        except BaseException:
            has_come = turn.done() and turn.exception() is None
            if has_come:  # called and told to leave in the same moment
                self._next()
            self._waiting.remove(turn, tenant=tenant)
            raise

    def _next(self) -> None:
        """Whose turn it is holds the thread before it knows, so that nobody comes in between."""
        turn = self._waiting.take()
        self._is_busy = turn is not None
        if turn is not None:
            turn.set_result(None)
