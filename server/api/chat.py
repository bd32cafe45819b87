"""POST /v1/chat/completions: read, prepare, submit, then stream the answer or add it up.

Everything that can be refused is refused before the first byte of an answer. Must not know how
prompts are made or tokens are chosen.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive

from server.api.content_type import is_multipart
from server.api.dry_run import described, is_dry_run
from server.api.generation import Generation, refuse_unless_ready
from server.api.json_body import json_response, parse_body, read_json_object
from server.api.models import check_name
from server.api.multipart import AttachmentLimits, Attachments
from server.api.schemas import parse_chat_request
from server.api.sse import (
    Answer,
    Envelope,
    EventStream,
    collect,
    in_time,
    sse_frames,
    worded_chance,
)
from server.chat.calls import CallPiece, WholeCall, added_up
from server.chat.tokenizer import Delta, EndReason, TokenChance

MAX_ATTACHMENTS = 128
"""Files that come with one request; of each the server holds a descriptor."""

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    state = request.app.state
    deadline_s = asyncio.get_running_loop().time() + state.http.request_timeout_s
    # Before anything is read, decoded or tokenised; `submit` asks again.
    refuse_unless_ready(request)

    is_dry = is_dry_run(request)
    body, attachments, receive = await _read_body(request)
    parsed = parse_chat_request(body, is_strict=state.http.strict)
    request.state.num_unknown_parameters = parsed.num_unknown
    state.metrics.count_unknown_parameters(parsed.num_unknown)
    wire = parsed.request
    check_name(state.model, wire.model)
    envelope = Envelope(
        f"chatcmpl-{uuid.uuid4().hex}", wire.model, int(time.time()), wire.answered_tier
    )
    chat_request = wire.to_chat_request()
    # The id under which the engine knows the request is ours: clients choose theirs freely.
    generation = Generation(request, chat_request, id=envelope.id, attachments=attachments)
    generation.check_room()

    async def begin() -> tuple[Answer, ChatShape]:
        prepared = await generation.prepare()
        shape = ChatShape(has_logprobs=bool(wire.logprobs), echo=prepared.echo)
        return await generation.start(prepared), shape

    async def describe() -> dict[str, object]:
        prepared, tokenizer = await generation.prepare(), state.preparer.tokenizer
        return described(prepared, generation.media, tokenizer, state.model, name=wire.model)

    if is_dry:
        return json_response(await in_time(describe(), receive=receive, deadline_s=deadline_s))
    if wire.stream:
        frames = sse_frames(begin, envelope, include_usage=wire.include_usage)
        return EventStream(
            frames,
            receive=receive,
            deadline_s=deadline_s,
            late_headers=generation.media.headers,
        )
    whole = collect(begin, envelope)
    completion = await in_time(whole, receive=receive, deadline_s=deadline_s)
    return json_response(completion, headers=generation.media.headers())


class ChatShape:
    """Choices as messages, and as deltas of them; a choice's first piece gives its role.

    Each begins with the echo, which may be empty.
    """

    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, *, has_logprobs: bool, echo: str = "") -> None:
        self._has_logprobs = has_logprobs
        self._echo = echo
        self._num_begun = 0  # the choices that have sent their role

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, object]:
        text = self._echo + "".join(delta.text for delta in deltas)
        calls = added_up(piece for delta in deltas for piece in delta.calls)
        message: dict[str, object] = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [_worded(call) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(chance for delta in deltas for chance in delta.chances),
            "finish_reason": deltas[-1].finish_reason,
        }

    def pieces(self, delta: Delta) -> Iterator[dict[str, object]]:
        # In order, whoever speaks first: OpenAI's SDK fails where choice 0 is not the first.
        while self._num_begun <= delta.choice:
            yield _piece(self._num_begun, {"role": "assistant", "content": ""})
            if self._echo:
                yield _piece(self._num_begun, {"content": self._echo})
            self._num_begun += 1
        logprobs = self._logprobs(delta.chances) if delta.chances else None
        if delta.text:
            yield _piece(delta.choice, {"content": delta.text}, logprobs)
            logprobs = None
        for call in delta.calls:
            yield _piece(delta.choice, {"tool_calls": [_worded_piece(call)]}, logprobs)
            logprobs = None
        if delta.finish_reason is not None:
            yield _piece(delta.choice, {}, logprobs, delta.finish_reason)

    def _logprobs(self, chances: Iterable[TokenChance]) -> dict[str, object] | None:
        """OpenAI's object; None where none were asked for."""
        if not self._has_logprobs:
            return None
        return {"content": [worded_chance(chance) for chance in chances], "refusal": None}


def _worded(call: WholeCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _worded_piece(piece: CallPiece) -> dict[str, object]:
    """The first piece of a call has all that is told of it once."""
    function = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name} | function,
    }


def _piece(
    index: int,
    content: Mapping[str, object],
    logprobs: Mapping[str, object] | None = None,
    finish_reason: EndReason | None = None,
) -> dict[str, object]:
    return {
        "index": index,
        "delta": content,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


async def _read_body(request: Request) -> tuple[dict[str, Any], Attachments | None, Receive]:
    """The request's JSON; and, of a form, what comes after it, with how that is received."""
    if not is_multipart(request.headers):
        return await read_json_object(request), None, request.receive
    state = request.app.state
    attachments = Attachments(
        request.receive,
        request.headers["content-type"],
        spool_folder=state.media.spool_dir,
        limits=AttachmentLimits(
            max_attachments=MAX_ATTACHMENTS,
            max_attachment_bytes=state.media.max_video_bytes,
            max_total_bytes=state.media.max_request_bytes,
            max_request_bytes=state.http.max_body_bytes,
        ),
        threads=state.disk_threads,
    )
    body = await parse_body(await attachments.read_request())
    return body, attachments, attachments.receive
