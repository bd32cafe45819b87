"""An answer on the wire: `Delta`s printed as server-sent events, or added up to one completion.

`sse_frames` and `collect` read the same `Answer`; usage and finish reason are worked out once, in
it, and a `Shape` says how an endpoint words the choices. `EventStream` is the HTTP side of a
stream: when its headers go out, what keeps it alive, and how it ends whatever happens. Must not
know where an answer comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.json_body import error_json, to_json
from server.api.media_usage import MediaUsage
from server.api.middleware import ClientGone
from server.chat.prepare import PromptUsage
from server.chat.tokenizer import Delta, TokenChance
from server.errors import RequestTimeout, ServerError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_EVENT_WAIT_S = 10.0
KEEP_ALIVE_S = 15.0
SLOW_CLIENT_S = 30.0

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's number for it."""

DONE: Final = b"data: [DONE]\n\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"
# Legal in JSON, but line ends to clients that split text where Unicode would.
_LINE_ENDS: Final = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all pieces of one answer have in common; `created_s` in seconds since 1970.

    The `service_tier` is told where one was asked for.
    """

    id: str
    model: str
    created_s: int
    service_tier: str | None = None

    def around(self, kind: str, choices: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """The object of this kind with these choices, without its usage."""
        content: dict[str, object] = {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }
        if self.service_tier is not None:
            content["service_tier"] = self.service_tier
        return content


class Shape(Protocol):
    """How one endpoint words the choices of one answer."""

    @property
    def whole_kind(self) -> str:
        """The `object` of a whole answer."""

    @property
    def chunk_kind(self) -> str:
        """The `object` of a piece of a streamed one."""

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, object]:
        """A choice of which these are all the deltas. Asked of each, in the order of indices."""

    def pieces(self, delta: Delta) -> Iterator[dict[str, object]]:
        """What is sent now that the delta has come; each piece is one choice of a chunk."""


class Answer:
    """One answer while it is being made: its choices as they come, its counts, how each ended."""

    def __init__(
        self,
        prompt: PromptUsage,
        deltas: AsyncGenerator[Delta, None],
        *,
        media: MediaUsage | None = None,
        num_choices: int = 1,
    ) -> None:
        self.prompt = prompt
        self.num_choices = num_choices
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._media = media
        self._deltas = deltas

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All pieces of all choices. Raises a ServerError where one has not come to its end."""
        num_running = self.num_choices
        async with contextlib.aclosing(self._deltas):
            async for delta in self._deltas:
                self.completion_tokens += delta.num_tokens
                self.cached_tokens += delta.num_cached_tokens
                if self._media is not None and delta.encode_times_s:
                    self._media.encoded(delta.encode_times_s)
                if delta.finish_reason is not None:
                    num_running -= 1
                    if delta.finish_reason not in ("stop", "length", "tool_calls"):
                        # Nobody but us aborts, so an answer cut off is our fault.
                        raise ServerError()
                yield delta
        if num_running:
            raise ServerError()

    async def choices(self) -> list[list[Delta]]:
        """All there is of each choice, once it has ended."""
        choices: list[list[Delta]] = [[] for _ in range(self.num_choices)]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.choice].append(delta)
        return choices

    def usage(self) -> dict[str, object]:
        """OpenAI's object for chats and completions, with what is ours."""
        usage: dict[str, object] = {
            "prompt_tokens": self.prompt.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "text_tokens": self.prompt.text_tokens,
                "image_tokens": self.prompt.image_tokens,
                "video_tokens": self.prompt.video_tokens,
            },
        }
        return usage | self.media_usage()

    def media_usage(self) -> dict[str, object]:
        """What any usage tells of media: nothing where there are none."""
        if self._media is None or not self._media.has_media:
            return {}
        return {"media": self._media.usage()}


Begin = Callable[[], Awaitable[tuple[Answer, Shape]]]
"""Prepares and admits the request, or raises a ServerError."""


async def collect(begin: Begin, envelope: Envelope) -> dict[str, object]:
    """The whole answer as one object."""
    answer, shape = await begin()
    choices = await answer.choices()
    worded = [shape.whole(index, of_choice) for index, of_choice in enumerate(choices)]
    return envelope.around(shape.whole_kind, worded) | {"usage": answer.usage()}


async def in_time(
    work: Coroutine[Any, Any, Result], *, receive: Receive, deadline_s: float
) -> Result:
    """Its result; RequestTimeout at the deadline, ClientGone where the client leaves before."""
    try:
        async with asyncio.timeout_at(deadline_s) as deadline:
            return await until_client_leaves(receive, work)
    except TimeoutError:
        if deadline.expired():
            raise RequestTimeout() from None
        raise


async def sse_frames(
    begin: Begin, envelope: Envelope, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer in chunks, `[DONE]` included."""
    answer, shape = await begin()

    def frame(choices: list[dict[str, object]], *, usage: dict[str, object] | None) -> bytes:
        content = envelope.around(shape.chunk_kind, choices)
        if include_usage:
            content["usage"] = usage
        return data_frame(to_json(content))

    async with contextlib.aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            for piece in shape.pieces(delta):
                yield frame([piece], usage=None)
    if include_usage:
        yield frame([], usage=answer.usage())
    yield DONE


def data_frame(content: bytes) -> bytes:
    """One event with one line of JSON."""
    text = content.decode("utf-8")
    return f"data: {text.translate(_LINE_ENDS)}\n\n".encode()


def worded_chance(chance: TokenChance) -> dict[str, object]:
    """OpenAI's object for one token's log-probability, and those of the likeliest there."""
    return _worded_alone(chance) | {"top_logprobs": [_worded_alone(each) for each in chance.top]}


def _worded_alone(chance: TokenChance) -> dict[str, object]:
    return {
        "token": chance.text,
        "logprob": max(chance.logprob, LEAST_LOGPROB),
        "bytes": list(chance.text_bytes),
    }


def last_words(error: ServerError) -> bytes:
    """How a stream ends that has begun and cannot go on."""
    return data_frame(error_json(error)) + DONE


async def until_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; ClientGone, with `work` cancelled, where the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_leaves(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            leaving.result()  # a body that goes on arriving may turn out to be wrong
            raise ClientGone()
        return working.result()
    finally:
        await cancel(working, leaving)
        del working, leaving  # they hold an error, which holds this frame


async def client_leaves(receive: Receive) -> None:
    """Returns when the client hangs up. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Frames as they come.

    Until the headers go out, with the first frame or after `first_event_wait_s`, an error of the
    frames is raised, so that it becomes a plain HTTP answer. After that it becomes one error frame
    and `[DONE]`: a body that was begun is always ended. While nothing comes, comments keep the
    connection alive. A client that leaves, or reads nothing for `slow_client_s`, raises ClientGone
    and closes the frames.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        deadline_s: float,
        receive: Receive | None = None,
        late_headers: Callable[[], Mapping[str, str]] = dict,
        last_words: Callable[[ServerError], bytes] = last_words,
        first_event_wait_s: float = FIRST_EVENT_WAIT_S,
        keep_alive_s: float = KEEP_ALIVE_S,
        slow_client_s: float = SLOW_CLIENT_S,
    ) -> None:
        """`deadline_s` is a time of the event loop's clock.

        The client's leaving is noticed by `receive`, or by the request's own. `late_headers` is
        asked when the headers go out, and `last_words` for the error frame and `[DONE]`.
        """
        super().__init__(media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._frames = frames
        self._deadline_s = deadline_s
        self._receive = receive
        self._late_headers = late_headers
        self._last_words = last_words
        self._first_event_wait_s = first_event_wait_s
        self._keep_alive_s = keep_alive_s
        self._slow_client_s = slow_client_s
        self._is_started = False
        self._last_sent_s = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pumping = asyncio.ensure_future(self._pump(send))
        leaving = asyncio.ensure_future(client_leaves(self._receive or receive))
        keeping_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            await asyncio.wait(
                (pumping, leaving, keeping_alive), return_when=asyncio.FIRST_COMPLETED
            )
            if leaving.done() and leaving.exception() is not None and self._is_started:
                await pumping  # it meets the same error, and ends the body with it
                return
            if pumping.done():
                pumping.result()
            elif keeping_alive.done():
                keeping_alive.result()
            else:
                leaving.result()
                raise ClientGone()
        finally:
            await cancel(pumping, leaving, keeping_alive)
            del pumping, leaving, keeping_alive  # they hold an error, which holds this frame

    async def _pump(self, send: Send) -> None:
        try:
            async with (
                contextlib.aclosing(self._frames) as frames,
                asyncio.timeout_at(self._deadline_s) as deadline,
            ):
                async for frame in frames:
                    await self._send(send, frame)
        except Exception as error:
            if isinstance(error, ClientGone):
                raise
            if isinstance(error, TimeoutError) and deadline.expired():
                error = RequestTimeout()
            if not self._is_started:
                raise error from None
            if not isinstance(error, ServerError):
                logger.exception("a stream failed")
                error = ServerError()
            await self._send(send, self._last_words(error))
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Runs until cancelled, or the client reads nothing."""
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(self._first_event_wait_s)
        if not self._is_started:
            await self._send(send, _KEEP_ALIVE)
        while True:
            quiet_s = clock() - self._last_sent_s
            if quiet_s >= self._keep_alive_s:
                await self._send(send, _KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_s - quiet_s)

    async def _send(self, send: Send, body: bytes) -> None:
        try:
            async with self._sending, asyncio.timeout(self._slow_client_s):
                if not self._is_started:
                    self._is_started = True
                    self.headers.update(self._late_headers())
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                await send({"type": "http.response.body", "body": body, "more_body": True})
                self._last_sent_s = asyncio.get_running_loop().time()
        except TimeoutError as error:
            raise ClientGone() from error
