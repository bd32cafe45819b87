"""Cross-origin requests of browsers (CORS), where `http.cors_origins` names who may make them.

Two layers: `CrossOriginHeaders` is outermost of all, so that errors can be read too; `Preflights`
stands before `Authentication`, because a browser asks without a key. Both are there only where
origins are configured. Credentials (cookies) are never allowed: a key is sent by the page itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY_ORIGIN: Final = "*"

METHODS: Final = ("GET", "POST", "DELETE")

REQUEST_HEADERS: Final = (
    "authorization",
    "content-type",
    "x-request-id",
    "idempotency-key",
    "openai-beta",
    "openai-organization",
    "openai-project",
)
CLIENT_HEADER: Final = re.compile(r"x-stainless-[a-z0-9-]{1,64}")
"""What OpenAI's clients say of themselves; each version has its own, so any such name will do."""

EXPOSED_HEADERS: Final = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "server-timing",
)

PREFLIGHT_MAX_AGE_S: Final = 600


class CrossOriginHeaders:
    """Lets pages of the allowed origins read every answer, whichever layer it comes from."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Origin")
                if origin is not None and is_allowed(origin, self._origins):
                    headers["access-control-allow-origin"] = origin
                    headers["access-control-expose-headers"] = ", ".join(EXPOSED_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Preflights:
    """Answers a browser's question before a request. Any other OPTIONS is left to be refused."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            is_preflight = "access-control-request-method" in headers
            if is_preflight and is_allowed(headers.get("origin", ""), self._origins):
                await _preflight_answer(headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_allowed(origin: str, origins: Collection[str]) -> bool:
    return bool(origin) and (origin in origins or ANY_ORIGIN in origins)


def _preflight_answer(headers: Headers) -> Response:
    """What is allowed; whether that is enough, the browser decides."""
    asked = headers.get("access-control-request-headers", "").lower().split(",")
    of_client = {name.strip() for name in asked if CLIENT_HEADER.fullmatch(name.strip())}
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": ", ".join(METHODS),
            "access-control-allow-headers": ", ".join([*REQUEST_HEADERS, *sorted(of_client)]),
            "access-control-max-age": str(PREFLIGHT_MAX_AGE_S),
            "vary": "Access-Control-Request-Headers",
        },
    )
