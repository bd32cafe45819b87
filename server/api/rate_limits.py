"""What each key may use: requests and tokens a minute, and requests at the same time.

`RateLimits` is the layer behind `Authentication`. It refuses before a body is read, counts the
request and tells the caller what is left. The endpoint finds the caller's `Allowance` as
`request.state.allowance` and tells it the tokens. Must not know what a token is.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.json_body import error_response
from server.chat.tokenizer import TokenStream
from server.config import ApiKey
from server.core import TokenEvent
from server.errors import RateLimited
from server.telemetry.metrics import Metrics

Clock = Callable[[], float]
"""Seconds that only ever grow."""

# Refilling adds up fractions: what is short by less than this is rounding.
_ROUNDING: Final = 1e-6


class TokenBucket:
    """A minute's worth at most, refilled all the time; it may owe, and then fills from below zero.

    Whoever takes only what `wait_s` says is there never gets more than `per_minute` at once and
    `per_minute / 60` for each second that passes.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_s = clock()

    @property
    def remaining(self) -> int:
        """Whole units that are there; 0 where it owes."""
        return max(0, math.floor(self._fill() + _ROUNDING))

    @property
    def full_in_s(self) -> float:
        """How long until it is full, if nobody takes anything."""
        return (self.per_minute - self._fill()) * 60 / self.per_minute

    def wait_s(self, count: int) -> float:
        """How long until `count` units are there; of more than a minute's worth, until it is full.

        0 where they are there now.
        """
        missing = min(count, self.per_minute) - self._fill()
        return missing * 60 / self.per_minute if missing > _ROUNDING else 0.0

    def take(self, count: int) -> None:
        self._level = self._fill() - count

    def _fill(self) -> float:
        now_s = self._clock()
        added = (now_s - self._filled_s) * self.per_minute / 60
        self._filled_s = now_s
        self._level = min(self.per_minute, self._level + added)
        return self._level


class Allowance:
    """What one key may still use. One without limits is never refused and told of nothing."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Clock,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
    ) -> None:
        self._requests = _bucket(requests_per_minute, clock)
        self._tokens = _bucket(tokens_per_minute, clock)
        self._max_concurrent = max_concurrent
        self._num_running = 0
        self._metrics = metrics

    def enter(self, *, needs_tokens: bool) -> None:
        """Count one more request; RateLimited, and nothing is counted, where there is no room.

        One that `needs_tokens` is refused while there is not a single one. Who entered must leave.
        """
        if self._max_concurrent is not None and self._num_running >= self._max_concurrent:
            self._refuse("key_concurrent", RateLimited())
        if self._requests is not None and (wait_s := self._requests.wait_s(1)):
            message = f"This key may make {self._requests.per_minute} requests a minute."
            self._refuse("key_requests_per_minute", RateLimited(message, wait_s=wait_s))
        if needs_tokens:
            self.check_tokens(1)
        if self._requests is not None:
            self._requests.take(1)
        self._num_running += 1

    def leave(self) -> None:
        self._num_running -= 1

    def check_tokens(self, num_tokens: int) -> None:
        """RateLimited where there are not as many. More than a minute's worth needs all of that."""
        if self._tokens is not None and (wait_s := self._tokens.wait_s(num_tokens)):
            message = f"This key may use {self._tokens.per_minute} tokens a minute."
            self._refuse("key_tokens_per_minute", RateLimited(message, wait_s=wait_s))

    def take_tokens(self, num_tokens: int) -> None:
        """Charge them, whether or not they are there: what has begun is not cut off, but owed."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def headers(self) -> Iterator[tuple[str, str]]:
        """OpenAI's headers for what is limited by the minute."""
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{name}", str(bucket.per_minute)
                yield f"x-ratelimit-remaining-{name}", str(bucket.remaining)
                yield f"x-ratelimit-reset-{name}", duration(bucket.full_in_s)

    def _refuse(self, reason: str, error: RateLimited) -> None:
        self._metrics.count_rejection(reason)
        raise error


def _bucket(per_minute: int | None, clock: Clock) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, clock)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `0s`, `17ms`, `1s`, `6m0s`; rounded up."""
    milliseconds = math.ceil(max(0.0, seconds - _ROUNDING) * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, seconds_left = divmod(math.ceil(milliseconds / 1000), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes_left}m{seconds_left}s"
    return f"{minutes}m{seconds_left}s" if minutes else f"{seconds_left}s"


class ChargedStream:
    """The same events; each token is charged as it comes, whether or not it has a text."""

    def __init__(self, stream: TokenStream, allowance: Allowance) -> None:
        self._stream = stream
        self._allowance = allowance

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._events()

    async def _events(self) -> AsyncIterator[TokenEvent]:
        async for event in self._stream:
            if event.token_id is not None:
                self._allowance.take_tokens(1)
            yield event

    def close_choice(self, choice: int) -> None:
        self._stream.close_choice(choice)

    def close(self) -> None:
        self._stream.close()


class RateLimits:
    """Behind `Authentication`: every request counts for its key, but those that needed none.

    Only a POST can cost tokens, so only a POST is refused for the lack of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Mapping[str, ApiKey],
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self._app = app
        self._allowances = {
            name: Allowance(
                metrics,
                clock,
                requests_per_minute=key.requests_per_minute,
                tokens_per_minute=key.tokens_per_minute,
                max_concurrent=key.max_concurrent,
            )
            for name, key in api_keys.items()
        }
        self._unlimited = Allowance(metrics, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = scope["state"].get("tenant") if scope["type"] == "http" else None
        if tenant is None:
            await self._app(scope, receive, send)
            return
        allowance = self._allowances.get(tenant, self._unlimited)
        scope["state"]["allowance"] = allowance

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict(allowance.headers()))
            await send(message)

        try:
            allowance.enter(needs_tokens=scope["method"] == "POST")
        except RateLimited as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            allowance.leave()
