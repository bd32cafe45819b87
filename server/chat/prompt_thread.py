"""The one thread that renders and encodes prompts, at which tenants take turns.

However many prompts one tenant sends, another one's next waits for those that run, not for those
that wait. Must not know what a prompt is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from server.errors import RateLimited, Unavailable
from server.line import Line

_T = TypeVar("_T")
_Turn: TypeAlias = asyncio.Future[None]


class PromptThread:
    """Does one thing after another; `max_waiting` may wait."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: Line[_Turn] = Line()
        self._is_busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompt")

    def close(self) -> None:
        """Drop what waits for the thread; what runs ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], _T], *, tenant: str) -> _T:
        """What the work returns.

        Unavailable where too many wait already; RateLimited for one that must make room because
        another tenant has fewer there.
        """
        if self._is_busy:
            await self._wait(tenant)
        self._is_busy = True
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
        except BaseException:
            self._next()
            raise
        running.add_done_callback(lambda _: self._next())
        return await running

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
