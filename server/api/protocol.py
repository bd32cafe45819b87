"""uvicorn's HTTP/1.1 protocol with the one limit it lacks: how long a request's headers may take.

Without it a connection that says nothing, or half a header, is held for ever. Bodies and idle
connections have limits of their own, in `middleware` and in uvicorn.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with_deadline(headers_timeout_s: float) -> type[H11Protocol]:
    """The class for uvicorn to make one of for each connection; it closes what is too slow."""

    class DeadlineProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_deadline()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_deadline()
            super().connection_lost(exc)

        @property
        def _awaits_headers(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _set_deadline(self) -> None:
            """From the first byte on: more bytes give no more time, only whole headers do."""
            if not self._awaits_headers:
                self._unset_deadline()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(headers_timeout_s, self._give_up)

        def _unset_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self._awaits_headers:
                self.transport.close()

    return DeadlineProtocol
