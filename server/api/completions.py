"""POST /v1/completions: prompts as they stand, without a template, answered side by side.

Choices are numbered prompt by prompt: those of prompt p are p * n to p * n + n - 1. Each prompt is
a request of its own to the engine. Must not know how prompts become ids or tokens are chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dry_run import refuse_dry_run
from server.api.health import not_ready
from server.api.json_body import json_response, read_json_object
from server.api.metrics import counted, counting_refusals
from server.api.models import check_name
from server.api.rate_limits import Allowance, ChargedStream
from server.api.schemas import CompletionRequest, parse_completion_request
from server.api.sse import (
    LEAST_LOGPROB,
    Answer,
    Envelope,
    EventStream,
    cancel,
    collect,
    in_time,
    sse_frames,
)
from server.chat.prepare import Prepared, PromptUsage
from server.chat.tokenizer import Delta, EndReason, TokenChance, Tokenizer, detokenize
from server.core import TokenLogprobs
from server.errors import RateLimited, Unavailable

Start = Callable[[Prepared], Awaitable[AsyncGenerator[Delta, None]]]
"""Admits a prompt to the engine, or raises a ServerError."""

MAX_SIDE_BY_SIDE = 8
"""Prompts of one request in the engine at once: more would wait there for each other."""

NO_ROOM_CODES = (RateLimited.code, Unavailable.code)

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    state = request.app.state
    deadline_s = asyncio.get_running_loop().time() + state.http.request_timeout_s
    unavailable = not_ready(state.engine.status, is_draining=state.lifecycle.is_draining)
    if unavailable is not None:
        raise unavailable

    refuse_dry_run(request)
    body = await read_json_object(request)
    parsed = parse_completion_request(body, is_strict=state.http.strict)
    request.state.num_unknown_parameters = parsed.num_unknown
    state.metrics.count_unknown_parameters(parsed.num_unknown)
    asked = parsed.request
    shared = asked.shared
    check_name(state.model, shared.model)
    envelope = Envelope(
        f"cmpl-{uuid.uuid4().hex}", shared.model, int(time.time()), shared.answered_tier
    )
    state.engine.check_room(request.state.tenant, asked.num_choices)
    tokenizer: Tokenizer = state.preparer.tokenizer
    allowance: Allowance = request.state.allowance

    async def start(prepared: Prepared) -> AsyncGenerator[Delta, None]:
        stream = await state.engine.submit(prepared.request, prepared.tiles)
        allowance.take_tokens(prepared.usage.prompt_tokens)
        deltas = detokenize(
            ChargedStream(stream, allowance),
            tokenizer,
            stop=prepared.stop,
            min_tokens=prepared.request.sampling.min_tokens,
            num_choices=asked.num_choices,
            tells_end=True,
        )
        return counted(deltas, state.metrics, num_choices=asked.num_choices)

    async def begin() -> tuple[Answer, CompletionShape]:
        with counting_refusals(state.metrics):
            prepared = [
                await state.preparer.prepare(
                    each, request_id=f"{envelope.id}-{place}", tenant=request.state.tenant
                )
                for place, each in enumerate(asked.to_chat_requests())
            ]
        # All of them at once: a list of which a part is paid for and refused would never end.
        allowance.check_tokens(sum(each.usage.prompt_tokens for each in prepared))
        shape = await asyncio.to_thread(_shape, asked, prepared, tokenizer)
        deltas = side_by_side(await start(prepared[0]), prepared, start)
        answer = Answer(
            PromptUsage(
                text_tokens=sum(each.usage.text_tokens for each in prepared),
                image_tokens=0,
                video_tokens=0,
            ),
            _without_answers(deltas) if asked.is_only_scored else deltas,
            num_choices=len(prepared) * asked.num_choices,
        )
        return answer, shape

    if shared.stream:
        frames = sse_frames(begin, envelope, include_usage=shared.include_usage)
        return EventStream(frames, deadline_s=deadline_s)
    whole = collect(begin, envelope)
    completion = await in_time(whole, receive=request.receive, deadline_s=deadline_s)
    return json_response(completion)


async def side_by_side(
    first: AsyncGenerator[Delta, None], prompts: Sequence[Prepared], start: Start
) -> AsyncGenerator[Delta, None]:
    """The deltas of all prompts as they come, with the choices of all of them numbered through.

    The first has been started. For those that find no room beside it, the others of the same
    request are waited for: only where none of them is left to end, that is the caller's error.
    """
    pieces: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
    waiting = deque(prompts[1:])
    pumps = [asyncio.create_task(_pump(first, 0, pieces))]
    num_running, has_room = 1, True
    try:
        while num_running or waiting:
            while waiting and has_room and num_running < MAX_SIDE_BY_SIDE:
                try:
                    deltas = await start(waiting[0])
                except (RateLimited, Unavailable) as error:
                    if error.code not in NO_ROOM_CODES or not num_running:
                        raise
                    has_room = False
                    continue
                first_choice = len(pumps) * waiting.popleft().request.num_choices
                pumps.append(asyncio.create_task(_pump(deltas, first_choice, pieces)))
                num_running += 1
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                num_running, has_room = num_running - 1, True
            else:
                yield piece
    finally:
        await cancel(*pumps)


async def _pump(
    deltas: AsyncGenerator[Delta, None],
    first_choice: int,
    pieces: asyncio.Queue[Delta | Exception | None],
) -> None:
    """Put the deltas of one prompt there, and then None; or what went wrong."""
    try:
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                pieces.put_nowait(replace(delta, choice=first_choice + delta.choice))
        pieces.put_nowait(None)
    except Exception as error:
        pieces.put_nowait(error)


async def _without_answers(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """Of what came after the prompts nothing is left: none was asked for."""
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            yield replace(
                delta,
                text="",
                finish_reason="length" if delta.finish_reason == "stop" else delta.finish_reason,
                num_tokens=0,
                chances=(),
                starts=(),
            )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it is shown: its text, and each token of it with the place where it begins."""

    text: str
    tokens: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


NO_ECHO = Echo("")


@dataclass(frozen=True, slots=True)
class _Row:
    """One place in the four lists of OpenAI's older log-probabilities."""

    token: str
    logprob: float | None
    top: dict[str, float] | None
    start: int


class CompletionShape:
    """Choices as plain texts; each begins with its prompt's echo, which may be empty."""

    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, echoes: Sequence[Echo], *, num_choices: int, has_logprobs: bool) -> None:
        self._echoes = echoes
        self._num_choices = num_choices
        self._has_logprobs = has_logprobs
        self._begun: set[int] = set()  # the choices that have sent something
        self._echo_rows: dict[int, list[_Row]] = {}  # by the place of the prompt
        self._held: dict[int, list[Delta]] = {}

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, object]:
        for delta in deltas:
            self._learn(delta)
        echo, echo_rows = self._echo(index)
        rows = echo_rows + [row for delta in deltas for row in self._rows(delta)]
        text = echo.text + "".join(delta.text for delta in deltas)
        return self._choice(index, text, rows, deltas[-1].finish_reason)

    def pieces(self, delta: Delta) -> Iterator[dict[str, object]]:
        """Whatever comes before the echo's log-probabilities are known is held back for them."""
        self._learn(delta)
        place = delta.choice // self._num_choices
        held = self._held.setdefault(place, [])
        held.append(delta)
        if self._echoes[place].tokens and place not in self._echo_rows:
            return
        ready, held[:] = held[:], []
        for each in ready:
            text, rows = each.text, self._rows(each)
            if each.choice not in self._begun:
                self._begun.add(each.choice)
                echo, echo_rows = self._echo(each.choice)
                text, rows = echo.text + text, echo_rows + rows
            if text or rows or each.finish_reason is not None:
                yield self._choice(each.choice, text, rows, each.finish_reason)

    def _learn(self, delta: Delta) -> None:
        """The first choice of a prompt brings what is told of the prompt."""
        place = delta.choice // self._num_choices
        echo = self._echoes[place]
        if delta.prompt_chances is not None:
            self._echo_rows[place] = [
                _Row(token, None, None, start) if chance is None else _row(chance, start)
                for token, start, chance in zip(
                    echo.tokens, echo.starts, delta.prompt_chances, strict=True
                )
            ]

    def _echo(self, index: int) -> tuple[Echo, list[_Row]]:
        place = index // self._num_choices
        return self._echoes[place], self._echo_rows.get(place, [])

    def _rows(self, delta: Delta) -> list[_Row]:
        before = len(self._echoes[delta.choice // self._num_choices].text)
        return [
            _row(chance, before + start)
            for chance, start in zip(delta.chances, delta.starts, strict=True)
        ]

    def _choice(
        self, index: int, text: str, rows: Sequence[_Row], finish_reason: EndReason | None
    ) -> dict[str, object]:
        logprobs = {
            "tokens": [row.token for row in rows],
            "token_logprobs": [row.logprob for row in rows],
            "top_logprobs": [row.top for row in rows],
            "text_offset": [row.start for row in rows],
        }
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs if self._has_logprobs else None,
            "finish_reason": finish_reason,
        }


def _shape(
    asked: CompletionRequest, prepared: Sequence[Prepared], tokenizer: Tokenizer
) -> CompletionShape:
    has_logprobs = asked.own.logprobs is not None
    echoes = [NO_ECHO] * len(prepared)
    if asked.is_echoing:
        echoes = [_echo_of(each, tokenizer, has_logprobs=has_logprobs) for each in prepared]
    return CompletionShape(echoes, num_choices=asked.num_choices, has_logprobs=has_logprobs)


def _echo_of(prepared: Prepared, tokenizer: Tokenizer, *, has_logprobs: bool) -> Echo:
    """As an answer would be shown: special tokens are no part of the text."""
    ids = prepared.request.prompt_ids
    if not has_logprobs:
        return Echo(tokenizer.decode(ids))
    shown = (_shown(tokenizer.chance_of(TokenLogprobs(token_id, 0.0))) for token_id in ids)
    return Echo(tokenizer.decode(ids), tuple(shown), tuple(tokenizer.starts_of(ids)))


def _row(chance: TokenChance, start: int) -> _Row:
    """The likeliest, and always the token itself, by their texts; the likelier of two alike."""
    top: dict[str, float] = {}
    for each in (*chance.top, chance):
        top.setdefault(_shown(each), max(each.logprob, LEAST_LOGPROB))
    return _Row(_shown(chance), max(chance.logprob, LEAST_LOGPROB), top, start)


def _shown(chance: TokenChance) -> str:
    """A token's text; the bytes of one that is no text, so that no two of them look alike."""
    try:
        return chance.text_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in chance.text_bytes)
