"""The admin port: what an operator's tools ask. A small application of its own.

It has no keys, no limits and no log lines, so it listens where only they can reach it. It answers
as long as the process lives, also while the rest drains.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.json_body import error_response
from server.errors import MethodNotAllowed, ServerError, UnknownUrl
from server.telemetry.metrics import MEDIA_TYPE, Metrics

logger = logging.getLogger(__name__)

METHODS: Final = ("GET", "HEAD")


class AdminApp:
    """One function for each path; all of them only read."""

    def __init__(self, metrics: Metrics) -> None:
        self._routes: Mapping[str, Callable[[], Response]] = {
            "/metrics": lambda: Response(metrics.text(), media_type=MEDIA_TYPE),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._answer(scope["method"], scope["path"])
        response.headers["x-request-id"] = uuid.uuid4().hex
        await response(scope, receive, send)

    def _answer(self, method: str, path: str) -> Response:
        route = self._routes.get(path)
        if route is None:
            return error_response(UnknownUrl())
        if method not in METHODS:
            return error_response(MethodNotAllowed(), headers={"allow": ", ".join(METHODS)})
        try:
            return route()
        except Exception:
            logger.exception("%s failed", path)
            return error_response(ServerError())
