"""What every request passes before routing: an id, a log line, its key, and limits on its body.

Four plain ASGI layers, outermost first: `RequestRecord`, `Authentication`, `BodyLimit` and
`HeadAsGet`. They decide on `scope["path"]` and headers alone, never on the Host header, and read no
body to decide. `app` says which layers of other files stand between them. Must not know what any
endpoint does.

In `scope["state"]` the endpoints find `request_id` and `tenant`, and may leave
`num_unknown_parameters` for the log. One that sees its client leave raises `ClientGone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.content_type import is_multipart
from server.api.health import Lifecycle
from server.api.json_body import error_response
from server.config import ApiKey
from server.errors import (
    HeadersTooLarge,
    InvalidApiKey,
    MethodNotAllowed,
    RequestReceiveTimeout,
    RequestTooLarge,
    ServerError,
    ShuttingDown,
    Unavailable,
    UnsupportedContentType,
)
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""Answered without a key and not logged."""

NO_TENANT: Final = ""
"""The tenant of everyone where no keys are configured."""

MAX_HEADERS: Final = 100
MAX_HEADER_LINE_BYTES: Final = 16 * 1024
MIN_BODY_BYTES_PER_S: Final = 1024 * 1024

MULTIPART_PATHS: Final = frozenset({"/v1/files", "/v1/chat/completions"})
"""Their bodies may be longer, where they come as multipart/form-data."""

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
NEVER_ROUTED: Final = frozenset({"OPTIONS", "TRACE", "CONNECT"})
ALL_METHODS: Final = "GET, HEAD, POST, DELETE"
_MAX_LOGGED_CHARS = 128
# How much longer a client may go on sending after its answer, so that it gets to read the answer.
_LINGER_S = 2.0


class ClientGone(Exception):
    """The client hung up: there is nobody left to answer."""


class RequestRecord:
    """Outermost: gives the request its id, turns a fault of ours into a 500, writes the log line.

    While the server drains, or has too many connections, it refuses all but the open paths. After
    an error whose request is still being sent it goes on reading for a moment: closing while the
    client sends would reset the connection and lose the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifecycle: Lifecycle,
        metrics: Metrics,
        max_connections: int,
        max_header_bytes: int,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_connections = max_connections
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _Record(scope, receive, send)
        try:
            await self._answer(scope, record)
        except (ClientGone, ClientDisconnect):
            record.client_gone = True
        except asyncio.CancelledError:
            # The server is closing and nobody waits for this task: it may end with an answer.
            if record.status is not None or record.client_gone:
                raise
            refusal = error_response(ShuttingDown(), headers={"connection": "close"})
            await refusal(scope, receive, record.send)
        except Exception:
            if record.client_gone:
                logger.warning("request %s failed after its client left", record.request_id)
            else:
                logger.exception("request %s failed", record.request_id)
                if record.status is None:
                    await error_response(ServerError())(scope, receive, record.send)
                else:
                    raise
        finally:
            if scope["path"] not in OPEN_PATHS:
                record.log()
                if record.outcome is not None:
                    self._metrics.count_http_request(record.outcome)

    async def _answer(self, scope: Scope, record: _Record) -> None:
        if self._has_large_headers(scope):
            refusal = error_response(HeadersTooLarge(), headers={"connection": "close"})
            await refusal(scope, record.receive, record.send)
        elif scope["path"] in OPEN_PATHS:
            await self._app(scope, record.receive, record.send)
        elif self._lifecycle.is_draining:
            refusal = error_response(ShuttingDown(), headers={"connection": "close"})
            await refusal(scope, record.receive, record.send)
        elif self._lifecycle.count_connections() > self._max_connections:
            self._metrics.count_rejection("connections")
            refusal = error_response(Unavailable(), headers={"connection": "close"})
            await refusal(scope, record.receive, record.send)
        else:
            with self._lifecycle.running():
                await self._app(scope, record.receive, record.send)

    def _has_large_headers(self, scope: Scope) -> bool:
        """The server below only limits headers that come in pieces."""
        lengths = [len(name) + len(value) for name, value in scope["headers"]]
        lengths.append(len(scope["raw_path"]) + len(scope["query_string"]))
        return (
            sum(lengths) > self._max_header_bytes
            or max(lengths) > MAX_HEADER_LINE_BYTES
            or len(scope["headers"]) > MAX_HEADERS
        )


class _Record:
    """One request while it runs."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self.is_complete = False
        self.client_gone = False
        self._is_body_read = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started_s = time.monotonic()
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.is_complete:
            self.client_gone = True
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._is_body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(self._elapsed_s() * 1000))
            if self.status in (408, 413):
                headers["connection"] = "close"
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and self.status is not None and self.status >= 400 and not self._is_body_read:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        if ends:
            self.is_complete = True
        await self._send(message)

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                message = await self._receive()
                while message["type"] == "http.request" and message.get("more_body", False):
                    message = await self._receive()

    @property
    def outcome(self) -> int | None:
        """The status of the answer; 499 where the client left, None where none was begun."""
        return 499 if self.client_gone else self.status

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def log(self) -> None:
        path = self._scope["path"]
        line = {
            "event": "request",
            "request_id": self.request_id,
            "tenant": self._scope["state"].get("tenant", NO_TENANT),
            "method": self._scope["method"][:_MAX_LOGGED_CHARS],
            "path": path[:_MAX_LOGGED_CHARS],
            "status": self.outcome,
            "duration_ms": round(self._elapsed_s() * 1000, 1),
        }
        if num_unknown := self._scope["state"].get("num_unknown_parameters", 0):
            line["num_unknown_parameters"] = num_unknown
        # Escaped to ASCII: nothing a client wrote can break the line or the terminal.
        access_logger.info(json.dumps(line, ensure_ascii=True))


class Authentication:
    """Deny by default: every path but the `open_paths` needs the Bearer key of a tenant.

    Keys are known by their SHA-256 only; a presented key is compared with all of them in constant
    time. Methods that no route has are refused as such without a key too, and then nothing is told
    of the path.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: Mapping[str, ApiKey], open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._digests = {name: bytes.fromhex(key.sha256) for name, key in api_keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in self._open_paths:
            tenant = self._tenant(Headers(scope=scope))
            if tenant is None:
                await _refusal_without_key(scope["method"])(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, headers: Headers) -> str | None:
        """Whose key the request carries; None where it carries none that is known."""
        if not self._digests:
            return NO_TENANT
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        presented = hashlib.sha256(key.strip(" ").encode("latin-1")).digest()
        owner: str | None = None
        for name, digest in self._digests.items():
            if secrets.compare_digest(presented, digest):
                owner = name
        return owner if scheme.lower() == "bearer" and key else None


def _refusal_without_key(method: str) -> Response:
    if method in NEVER_ROUTED:
        return error_response(MethodNotAllowed(), headers={"allow": ALL_METHODS})
    return error_response(InvalidApiKey())


class BodyLimit:
    """Bodies come as they are, not encoded, no longer than allowed, and in time.

    A body has `receive_timeout_s` to arrive, or longer where it comes at the least accepted rate.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        max_multipart_bytes: int,
        receive_timeout_s: float,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_multipart_bytes = max_multipart_bytes
        self._receive_timeout_s = receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        max_bytes = self._max_bytes
        if scope["path"] in MULTIPART_PATHS and is_multipart(headers):
            max_bytes = self._max_multipart_bytes
        refusal = _refusal(headers, max_bytes)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        received, is_complete = 0, False
        loop = asyncio.get_running_loop()
        started_s = loop.time()

        async def counted() -> Message:
            nonlocal received, is_complete
            if is_complete:  # what is waited for now is the client's leaving
                return await receive()
            allowed_s = max(self._receive_timeout_s, received / MIN_BODY_BYTES_PER_S)
            try:
                async with asyncio.timeout_at(started_s + allowed_s) as deadline:
                    message = await receive()
            except TimeoutError:
                if deadline.expired():
                    raise RequestReceiveTimeout() from None
                raise
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > max_bytes:
                raise _too_large(max_bytes)
            return message

        await self._app(scope, counted, send)


class HeadAsGet:
    """HEAD is answered as GET; the server below sends the headers and leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _refusal(headers: Headers, max_bytes: int) -> ServerError | None:
    length = headers.get("content-length", "")
    # Digits only and few: the server below has checked the header's form.
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        return _too_large(max_bytes)
    encodings = headers.getlist("content-encoding")
    if any(encoding.lower() != "identity" for encoding in encodings):
        return UnsupportedContentType()
    return None


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_bytes} bytes.")
