"""GET /health (the process answers) and GET /ready (a request would be served), and the drain.

`Lifecycle` is what both and the request layers share: whether new work is taken and how much is
still running. Must not know how the engine is watched: its status is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.json_body import json_response
from server.engine.client import EngineStatus
from server.errors import ModelLoading, ServerError, ShuttingDown, WorkerRestarting

router = APIRouter()


class Lifecycle:
    """From the first request to the last one before the process ends.

    `count_connections` is for whoever runs the server below to set; it alone can know.
    """

    def __init__(self) -> None:
        self.count_connections: Callable[[], int] = lambda: 0
        self.is_draining = False
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around everything done for one request."""
        self.num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if self.num_running == 0:
                self._idle.set()

    async def wait_idle(self, *, timeout_s: float) -> bool:
        """Wait until nothing runs; whether that came true in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def not_ready(status: EngineStatus, *, is_draining: bool) -> ServerError | None:
    """Why a request would not be served now; None when it would."""
    if is_draining or status == "stopping":
        return ShuttingDown()
    if status == "loading":
        return ModelLoading()
    if status == "restarting":
        return WorkerRestarting()
    if status == "crashed":
        return WorkerRestarting("The model worker crashed too often and is not started again.")
    return None


@router.get("/health")
async def health() -> Response:
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    state = request.app.state
    reason = not_ready(state.engine.status, is_draining=state.lifecycle.is_draining)
    if reason is not None:
        raise reason
    if state.engine.status == "silent":  # new requests may still wait for it, or for the next one
        raise WorkerRestarting("The model worker has not been heard of for some seconds.")
    return json_response({"status": "ready"})
