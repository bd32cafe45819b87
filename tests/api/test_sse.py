from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from server.api.chat import ChatShape
from server.api.middleware import ClientGone
from server.api.sse import DONE, Answer, Envelope, EventStream, collect, data_frame, sse_frames
from server.chat.prepare import PromptUsage
from server.chat.tokenizer import Delta, TokenChance
from server.errors import ServerError, WorkerRestarting

ENVELOPE = Envelope("chatcmpl-1", "m", 1_700_000_000)
USAGE = PromptUsage(text_tokens=3, image_tokens=81, video_tokens=90)


def answer_of(*deltas: Delta, told: bool = False) -> tuple[Answer, ChatShape]:
    async def generated() -> AsyncGenerator[Delta, None]:
        for delta in deltas:
            yield delta

    return Answer(USAGE, generated()), ChatShape(has_logprobs=told)


async def frames_of(*deltas: Delta, include_usage: bool = False) -> list[bytes]:
    async def begin() -> tuple[Answer, ChatShape]:
        return answer_of(*deltas)

    return [frame async for frame in sse_frames(begin, ENVELOPE, include_usage=include_usage)]


async def test_usage_adds_up_what_every_delta_counts() -> None:
    deltas = (Delta("a", None, 3, 128), Delta("b", None, 1), Delta("", "stop", 2))
    frames = await frames_of(*deltas, include_usage=True)

    async def begin() -> tuple[Answer, ChatShape]:
        return answer_of(*deltas)

    completion = await collect(begin, ENVELOPE)
    usage = {
        "prompt_tokens": 174,
        "completion_tokens": 6,
        "total_tokens": 180,
        "prompt_tokens_details": {
            "cached_tokens": 128,
            "text_tokens": 3,
            "image_tokens": 81,
            "video_tokens": 90,
        },
    }
    assert completion["usage"] == usage
    assert frames[-1] == DONE
    assert json.loads(frames[-2].removeprefix(b"data: "))["usage"] == usage


async def test_an_answer_without_text_still_has_its_role() -> None:
    frames = await frames_of(Delta("", "stop", 1))
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": ""}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, "stop"]


async def test_logprobs_that_come_with_no_text_come_with_the_end() -> None:
    """Minus infinity is not JSON; an unfinished character has bytes that are no text."""
    chance = TokenChance("\ufffd", b"\xed", -math.inf, (TokenChance("a", b"a", -0.5),))

    async def begin() -> tuple[Answer, ChatShape]:
        return answer_of(Delta("a", None, 1), Delta("", "length", 1, chances=(chance,)), told=True)

    expected = {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -9999.0,
                "bytes": [0xED],
                "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
            }
        ],
        "refusal": None,
    }
    frames = [frame async for frame in sse_frames(begin, ENVELOPE, include_usage=False)]
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert told == [None, None, expected]
    completion: Any = await collect(begin, ENVELOPE)
    assert completion["choices"][0]["logprobs"] == expected


async def test_an_answer_of_which_a_choice_is_missing_is_an_error() -> None:
    async def generated() -> AsyncGenerator[Delta, None]:
        yield Delta("a", "stop", 1, choice=1)

    async def begin() -> tuple[Answer, ChatShape]:
        return Answer(USAGE, generated(), num_choices=2), ChatShape(has_logprobs=False)

    with pytest.raises(ServerError):
        await collect(begin, ENVELOPE)


@pytest.mark.parametrize("last", [Delta("x", None, 1), Delta("x", "abort", 1)])
async def test_an_answer_that_was_cut_off_is_an_error(last: Delta) -> None:
    with pytest.raises(ServerError):
        await frames_of(Delta("a", None, 1), last)


def test_no_frame_has_a_line_end_of_any_kind_within() -> None:
    text = "a\u2028b\u2029c\u0085d\re\nf\x0bg\x0ch\x1ci\x1ej"
    frame = data_frame(json.dumps({"t": text}, ensure_ascii=False).encode())
    assert len(frame.decode().splitlines()) == 2  # the line and the empty one that ends it
    assert json.loads(frame.removeprefix(b"data: ")) == {"t": text}


class Client:
    """The other side of an ASGI call: records what it is sent, leaves when told to."""

    def __init__(self, *, reads: bool = True) -> None:
        self.sent: list[tuple[float, Any]] = []
        self.leaves = asyncio.Event()
        self.reads = reads

    async def receive(self) -> Any:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.reads:
            await asyncio.sleep(3600)
        self.sent.append((asyncio.get_running_loop().time(), message))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for _, message in self.sent)

    @property
    def is_ended(self) -> bool:
        return bool(self.sent) and self.sent[-1][1].get("more_body") is False


class Script:
    """Frames after waits: numbers are seconds, exceptions are raised."""

    def __init__(self, *steps: float | bytes | Exception) -> None:
        self.steps = steps
        self.is_closed = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        try:
            for step in self.steps:
                if isinstance(step, bytes):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                else:
                    await asyncio.sleep(step)
        finally:
            self.is_closed = True


async def run(script: Script, client: Client, *, time_s: float = 60, **times: float) -> None:
    deadline_s = asyncio.get_running_loop().time() + time_s
    stream = EventStream(script.frames(), deadline_s=deadline_s, **times)
    await asyncio.wait_for(stream({}, client.receive, client.send), 10)


async def test_headers_wait_for_the_first_frame() -> None:
    client = Client()
    started_s = asyncio.get_running_loop().time()
    await run(Script(0.2, b"one", b"two"), client)
    assert client.sent[0][1]["type"] == "http.response.start"
    assert client.sent[0][1]["status"] == 200
    assert client.sent[0][0] - started_s >= 0.2
    assert client.body == b"onetwo"
    assert client.is_ended


async def test_headers_wait_only_so_long_and_comments_follow() -> None:
    client = Client()
    started_s = asyncio.get_running_loop().time()
    await run(Script(0.5, b"one"), client, first_event_wait_s=0.1, keep_alive_s=0.15)
    assert 0.1 <= client.sent[0][0] - started_s < 0.3
    assert client.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert client.body.endswith(b"one")


async def test_no_comment_disturbs_a_stream_that_flows() -> None:
    client = Client()
    script = Script(*[0.05, b"x"] * 8)
    await run(script, client, first_event_wait_s=0.1, keep_alive_s=0.1)
    assert client.body == b"x" * 8


async def test_an_error_before_the_headers_is_raised() -> None:
    client = Client()
    with pytest.raises(WorkerRestarting):
        await run(Script(0.05, WorkerRestarting()), client)
    assert client.sent == []


async def test_an_error_after_the_headers_is_a_frame_even_before_the_first_event() -> None:
    client = Client()
    await run(Script(0.2, WorkerRestarting()), client, first_event_wait_s=0.05)
    comment, frame, done, rest = client.body.split(b"\n\n")
    assert (comment, done, rest) == (b": keep-alive", b"data: [DONE]", b"")
    assert json.loads(frame.removeprefix(b"data: "))["error"]["code"] == "worker_restarting"
    assert client.is_ended


async def test_a_fault_of_ours_within_a_stream_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client()
    await run(Script(b"one", ZeroDivisionError("canary")), client)
    frame = client.body.removeprefix(b"one").split(b"\n\n")[0]
    assert json.loads(frame.removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert b"canary" not in client.body
    assert client.body.endswith(DONE)
    assert "ZeroDivisionError" in caplog.text


async def test_a_stream_beyond_its_time_ends_in_a_frame() -> None:
    client = Client()
    script = Script(b"one", 60.0)
    await run(script, client, time_s=0.1)
    assert b'"code":"request_timeout"' in client.body
    assert client.body.endswith(DONE)
    assert script.is_closed


@pytest.mark.parametrize("steps", [(60.0,), (b"one", 60.0)], ids=["waiting", "streaming"])
async def test_frames_are_closed_when_the_client_leaves(steps: tuple[float | bytes, ...]) -> None:
    client = Client()
    script = Script(*steps)
    asyncio.get_running_loop().call_later(0.1, client.leaves.set)
    with pytest.raises(ClientGone):
        await run(script, client)
    assert script.is_closed
    assert not client.is_ended


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    client = Client(reads=False)
    script = Script(b"one", 60.0)
    with pytest.raises(ClientGone):
        await run(script, client, slow_client_s=0.1)
    assert script.is_closed
