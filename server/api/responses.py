"""POST /v1/responses: OpenAI's Responses without anything kept, over the path of every chat.

`POST /v1/responses/input_tokens` prepares the same request and tells only how long its prompt is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dry_run import refuse_dry_run
from server.api.generation import Generation, refuse_unless_ready
from server.api.json_body import json_response, read_json_object
from server.api.models import check_name
from server.api.response_fields import ResponseRequest, parse_response_request
from server.api.response_words import EventFrames, ResponseWords
from server.api.sse import Answer, EventStream, in_time

Begin = Callable[[], Awaitable[tuple[Answer, ResponseWords]]]
"""Prepares and admits the request, or raises a ServerError."""

router = APIRouter()


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    deadline_s = _deadline_s(request)
    asked = await _read(request)
    created_s = int(time.time())
    response_id = f"resp_{uuid.uuid4().hex}"
    generation = _generation(request, asked, response_id)

    async def begin() -> tuple[Answer, ResponseWords]:
        prepared = await generation.prepare()
        answer = await generation.start(prepared)
        return answer, ResponseWords(asked, prepared, id=response_id, created_s=created_s)

    if asked.shared.stream:
        frames = EventFrames()
        return EventStream(
            _sent(begin, frames),
            deadline_s=deadline_s,
            late_headers=generation.media.headers,
            last_words=frames.last_words,
        )
    whole = await in_time(_whole(begin), receive=request.receive, deadline_s=deadline_s)
    return json_response(whole, headers=generation.media.headers())


@router.post("/v1/responses/input_tokens")
async def input_tokens(request: Request) -> Response:
    """Refuses what would be refused; generates nothing, and costs no tokens of a key's."""
    deadline_s = _deadline_s(request)
    asked = await _read(request)
    generation = _generation(request, asked, f"resp_{uuid.uuid4().hex}")
    prepared = await in_time(generation.prepare(), receive=request.receive, deadline_s=deadline_s)
    counted = {"object": "response.input_tokens", "input_tokens": prepared.usage.prompt_tokens}
    return json_response(counted, headers=generation.media.headers())


def _deadline_s(request: Request) -> float:
    timeout_s: float = request.app.state.http.request_timeout_s
    return asyncio.get_running_loop().time() + timeout_s


async def _read(request: Request) -> ResponseRequest:
    # Before anything is read, decoded or tokenised; `Generation.start` asks again.
    refuse_unless_ready(request)
    refuse_dry_run(request)
    state = request.app.state
    body = await read_json_object(request)
    parsed = parse_response_request(body, is_strict=state.http.strict)
    request.state.num_unknown_parameters = parsed.num_unknown
    state.metrics.count_unknown_parameters(parsed.num_unknown)
    check_name(state.model, parsed.request.shared.model)
    return parsed.request


def _generation(request: Request, asked: ResponseRequest, response_id: str) -> Generation:
    generation = Generation(request, asked.to_chat_request(), id=response_id, places=asked.places)
    generation.check_room()
    return generation


async def _whole(begin: Begin) -> dict[str, object]:
    answer, words = await begin()
    (deltas,) = await answer.choices()
    return words.whole(deltas, answer)


async def _sent(begin: Begin, frames: EventFrames) -> AsyncGenerator[bytes, None]:
    """The response in events, which end without a `[DONE]`.

    The first of them wait for the first token: until it comes an error can be a plain answer.
    """
    answer, words = await begin()
    opening = words.opening()
    async with contextlib.aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            for event in itertools.chain(opening, words.events(delta)):
                yield frames.frame(event)
    yield frames.frame(words.closing(answer))
