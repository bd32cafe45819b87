"""One response in OpenAI's words: its object, and the typed events of a stream.

Both come from the same `ResponseWords`, so that a stream ends with what would have been answered
whole. Must not know where an answer comes from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from server.api.json_body import to_json
from server.api.response_fields import ResponseRequest
from server.api.sse import DONE, Answer, data_frame, worded_chance
from server.chat.calls import CallPiece
from server.chat.prepare import Prepared
from server.chat.tokenizer import Delta, EndReason
from server.errors import ServerError

Event = dict[str, object]
"""One event, without its number."""

Status = Literal["in_progress", "completed", "incomplete"]

NEVER_SAID: Final = (
    "access_programs",
    "conversation",
    "image",
    "input_transformations",
    "max_tool_calls",
    "moderation",
    "previous_response_id",
    "prompt",
    "prompt_cache_diagnostics",
    "prompt_cache_options",
    "prompt_cache_retention",
    "tool_usage",
)
"""Fields of OpenAI's object that are null here."""


class EventFrames:
    """Events as they are sent, numbered through."""

    def __init__(self) -> None:
        self._num_sent = 0

    def frame(self, event: Event) -> bytes:
        numbered = event | {"sequence_number": self._num_sent}
        self._num_sent += 1
        return f"event: {event['type']}\n".encode() + data_frame(to_json(numbered))

    def last_words(self, error: ServerError) -> bytes:
        """One frame that is OpenAI's event and our error frame at once; and `[DONE]`."""
        said = error.body()["error"]
        event: Event = {
            "type": "error",
            "code": said["code"],
            "message": said["message"],
            "param": said["param"],
            "error": said,
        }
        return self.frame(event) + DONE


@dataclass(slots=True)
class _Message:
    """A message that is being written; `chances` as they are worded."""

    place: int
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    pieces: list[str] = field(default_factory=list)
    chances: list[dict[str, object]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def item(self, status: Status) -> dict[str, object]:
        return self._item(status, [_part(self.text, self.chances)])

    def opening(self) -> Iterator[Event]:
        item = self._item("in_progress", [])
        yield {"type": "response.output_item.added", "output_index": self.place, "item": item}
        yield self._event("content_part.added", {"part": _part("", [])})

    def write(self, text: str, chances: list[dict[str, object]]) -> Event:
        self.pieces.append(text)
        self.chances += chances
        return self._event("output_text.delta", {"delta": text, "logprobs": chances})

    def closing(self, status: Status) -> Iterator[Event]:
        yield self._event("output_text.done", {"text": self.text, "logprobs": self.chances})
        yield self._event("content_part.done", {"part": _part(self.text, self.chances)})
        yield _item_done(self.place, self.item(status))

    def _item(self, status: Status, content: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _event(self, kind: str, content: Mapping[str, object]) -> Event:
        place = {"item_id": self.id, "output_index": self.place, "content_index": 0}
        return {"type": f"response.{kind}", **place, **content}


@dataclass(slots=True)
class _Call:
    """A function call that is being written; `index` is its number among the calls."""

    place: int
    index: int
    call_id: str
    name: str
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def item(self, status: Status) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }

    def opening(self) -> Iterator[Event]:
        item = self.item("in_progress")
        yield {"type": "response.output_item.added", "output_index": self.place, "item": item}

    def write(self, arguments: str) -> Event:
        self.pieces.append(arguments)
        return self._event("delta", {"delta": arguments})

    def closing(self, status: Status) -> Iterator[Event]:
        yield self._event("done", {"name": self.name, "arguments": self.arguments})
        yield _item_done(self.place, self.item(status))

    def _event(self, kind: str, content: Mapping[str, object]) -> Event:
        place = {"item_id": self.id, "output_index": self.place}
        return {"type": f"response.function_call_arguments.{kind}", **place, **content}


class ResponseWords:
    """A response from its first event to its last: one item of its output is open at a time."""

    def __init__(
        self, asked: ResponseRequest, prepared: Prepared, *, id: str, created_s: int
    ) -> None:
        """Told are the sampling values that hold, whoever set them."""
        self._asked = asked
        self._sampling = prepared.request.sampling
        self._id = id
        self._created_s = created_s
        self._status: Status = "in_progress"
        self._output: list[dict[str, object]] = []  # what is finished of it
        self._open: _Message | _Call | None = None
        self._chances: list[dict[str, object]] = []  # of text that has not come yet

    def opening(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield {"type": kind, "response": self._response(None)}

    def events(self, delta: Delta) -> Iterator[Event]:
        """What is to be sent now that the delta has come."""
        if self._asked.has_logprobs:
            self._chances += [worded_chance(chance) for chance in delta.chances]
        if delta.text:
            yield from self._write(delta.text)
        for piece in delta.calls:
            yield from self._call(piece)
        if delta.finish_reason is not None:
            yield from self._finish(delta.finish_reason)

    def closing(self, answer: Answer) -> Event:
        """The last event."""
        return {"type": f"response.{self._status}", "response": self._response(_usage(answer))}

    def whole(self, deltas: Sequence[Delta], answer: Answer) -> dict[str, object]:
        """The response of which these are all the deltas."""
        for delta in deltas:
            for _ in self.events(delta):
                pass
        return self._response(_usage(answer))

    def _write(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Message):
            yield from self._open_message()
        assert isinstance(self._open, _Message)
        chances, self._chances = self._chances, []
        yield self._open.write(text, chances)

    def _open_message(self) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = _Message(len(self._output))
        yield from self._open.opening()

    def _call(self, piece: CallPiece) -> Iterator[Event]:
        call = self._open
        if not isinstance(call, _Call) or call.index != piece.index:
            yield from self._close("completed")
            place = len(self._output)
            call = _Call(place, piece.index, call_id=piece.id or "", name=piece.name or "")
            self._open = call
            yield from call.opening()
        if piece.arguments:
            yield call.write(piece.arguments)

    def _finish(self, reason: EndReason) -> Iterator[Event]:
        """An answer has at least one item, be it an empty message. The last one may be cut off."""
        self._status = "incomplete" if reason == "length" else "completed"
        if self._open is None:
            yield from self._open_message()
        yield from self._close(self._status)

    def _close(self, status: Status) -> Iterator[Event]:
        if self._open is None:
            return
        if isinstance(self._open, _Message):
            self._open.chances += self._chances
            self._chances = []
        yield from self._open.closing(status)
        self._output.append(self._open.item(status))
        self._open = None

    def _response(self, usage: Mapping[str, object] | None) -> dict[str, object]:
        """OpenAI's object as it is now."""
        asked, own, shared = self._asked, self._asked.own, self._asked.shared
        is_cut = self._status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": shared.model,
            "instructions": own.instructions,
            "output": list(self._output),
            "usage": usage,
            "max_output_tokens": own.max_output_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_logprobs": own.top_logprobs or 0,
            "text": {"format": asked.text_format, "verbosity": "medium"},
            "tools": asked.tools,
            "tool_choice": asked.tool_choice,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "store": False,
            "truncation": "disabled",
            "service_tier": shared.answered_tier,
            "metadata": shared.metadata or {},
            "user": shared.user,
            "safety_identifier": shared.safety_identifier,
            "prompt_cache_key": shared.prompt_cache_key,
        } | dict.fromkeys(NEVER_SAID)


def _part(text: str, chances: list[dict[str, object]]) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(chances)}


def _item_done(place: int, item: dict[str, object]) -> Event:
    return {"type": "response.output_item.done", "output_index": place, "item": item}


def _usage(answer: Answer) -> dict[str, object]:
    """OpenAI's object, and what is ours of pictures and videos."""
    prompt = answer.prompt
    usage: dict[str, object] = {
        "input_tokens": prompt.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "cache_write_tokens": 0,  # OpenAI's are those that cost more; here none do
            "text_tokens": prompt.text_tokens,
            "image_tokens": prompt.image_tokens,
            "video_tokens": prompt.video_tokens,
        },
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt.prompt_tokens + answer.completion_tokens,
    }
    return usage | answer.media_usage()
