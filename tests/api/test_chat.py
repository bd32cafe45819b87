from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.config import HttpConfig
from server.errors import InvalidPrompt, RateLimited, ServerError, Unavailable
from tests.conftest import END, MODEL, Serve, Server, TextPreparer, assert_error, chat
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a finished stream, which must end in [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.content.endswith(b"\n\n")
    frames = response.content.decode("utf-8").split("\n\n")[:-1]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(
        event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]
    )


def test_a_whole_answer(server: Server) -> None:
    response = server.http.post(URL, json=chat("한국"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 6,
            "total_tokens": 12,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "text_tokens": 6,
                "image_tokens": 0,
                "video_tokens": 0,
            },
        },
    }


def test_a_streamed_answer(server: Server) -> None:
    events = events_of(server.http.post(URL, json=chat(stream=True)))
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:-1]] == [{"content": c} for c in "hello"]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["stop"]
    assert all("usage" not in event for event in events)


def test_usage_comes_last_and_with_no_choices_when_asked_for(server: Server) -> None:
    body = chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    events = events_of(server.http.post(URL, json=body))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 6
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)


ANSWERS = {
    "plain": "The circle is red.",
    "korean": "빨간 원이 왼쪽에 있어요.",
    "emoji": "👩‍🚀 done",
    "line ends": "a\u2028b\u0085c\r\nd\te\u0000f",
    "quotes": '"\\" data: [DONE]\n\n{}',
    "empty": "",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("fields", [{}, {"stop": "re"}, {"max_tokens": 5}], ids=str)
def test_streamed_equals_whole(serve: Serve, answer: str, fields: dict[str, Any]) -> None:
    server = serve(engine=FakeEngine([*answer.encode(), END]))
    whole = server.http.post(URL, json=chat(**fields)).json()
    options = {"include_usage": True}
    streamed = events_of(
        server.http.post(URL, json=chat(stream=True, stream_options=options, **fields))
    )
    assert text_of(streamed) == whole["choices"][0]["message"]["content"]
    assert streamed[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert streamed[-1]["usage"] == whole["usage"]


def test_the_whole_text_arrives_unchanged(serve: Serve) -> None:
    for answer in ANSWERS.values():
        server = serve(engine=FakeEngine([*answer.encode(), END]))
        body = server.http.post(URL, json=chat()).json()
        assert body["choices"][0]["message"]["content"] == answer


def test_the_service_tier_is_told_to_whom_asks_for_one(server: Server) -> None:
    hints = {"metadata": {"a": "b"}, "store": False, "prompt_cache_key": "k"}
    asked = chat(service_tier="auto", **hints)
    assert server.http.post(URL, json=asked).json()["service_tier"] == "default"
    events = events_of(server.http.post(URL, json=asked | {"stream": True}))
    assert {event["service_tier"] for event in events} == {"default"}
    assert "service_tier" not in server.http.post(URL, json=chat(**hints)).json()


def test_hangul_is_sent_as_itself(serve: Serve) -> None:
    server = serve(engine=FakeEngine([*"원".encode(), END]))
    for stream in (True, False):
        response = server.http.post(URL, json=chat(stream=stream))
        assert "원".encode() in response.content
        assert b"\\u" not in response.content


def test_a_stop_string_ends_the_answer_and_the_request(serve: Serve) -> None:
    server = serve(engine=FakeEngine([*b"one, two, three", END]))
    body = server.http.post(URL, json=chat(stop=["three", ", t"])).json()
    assert body["choices"][0]["message"]["content"] == "one"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one, t")


def words(request: object, choice: int) -> list[int]:
    """Choices of other lengths, so that they do not end together."""
    return [*("ab한", "c", "한글")[choice].encode(), END]


def test_choices_are_answered_side_by_side(serve: Serve) -> None:
    server = serve(engine=FakeEngine(words))
    whole = server.http.post(URL, json=chat("hi", n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in whole["choices"]] == ["ab한", "c", "한글"]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"stop"}
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 6 + 2 + 7)
    ((request, _),) = server.engine.submitted
    assert request.num_choices == 3


def test_choices_are_streamed_in_turn_each_with_its_own_index(serve: Serve) -> None:
    server = serve(engine=FakeEngine(words))
    options = {"include_usage": True}
    body = chat("hi", n=3, stream=True, stream_options=options)
    *events, last = events_of(server.http.post(URL, json=body))
    assert all(len(event["choices"]) == 1 for event in events)
    pieces = [event["choices"][0] for event in events]
    assert pieces[0]["index"] != pieces[2]["index"]  # nobody waits for the end of another
    for index, text in enumerate(("ab한", "c", "한글")):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in own) == text
        assert [p["finish_reason"] for p in own] == [None] * (len(own) - 1) + ["stop"]
        assert sum("role" in piece["delta"] for piece in own) == 1
    assert last["usage"]["completion_tokens"] == 6 + 2 + 7


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_one_choice_and_not_the_others(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(words)
    server = serve(engine=engine)
    response = server.http.post(URL, json=chat(n=3, stop="b", stream=stream))
    if stream:
        pieces = [event["choices"][0] for event in events_of(response)]
        texts = [
            "".join(p["delta"].get("content", "") for p in pieces if p["index"] == index)
            for index in range(3)
        ]
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["a", "c", "한글"]
    assert (engine.aborted_choices, engine.aborted) == ([0], [])


def test_an_error_of_one_choice_is_the_error_of_the_answer(serve: Serve) -> None:
    server = serve(engine=FakeEngine(list(b"ab"), error_code="internal_error"))
    assert_error(server.http.post(URL, json=chat(n=2)), 500, "internal_error")
    *events, last = events_of(server.http.post(URL, json=chat(n=2, stream=True)))
    assert {event["choices"][0]["finish_reason"] for event in events} == {None}
    assert last["error"]["code"] == "internal_error"


def test_nothing_is_sent_for_a_choice_before_its_first_token(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    server = serve(engine=FakeEngine(words, gate=gate), http=HttpConfig(request_timeout_s=0.3))
    *events, last = events_of(server.http.post(URL, json=chat(n=3, stream=True)))
    assert [event["choices"][0]["index"] for event in events] == [0, 0]
    assert last["error"]["code"] == "request_timeout"


def entry(byte: int, logprob: float) -> dict[str, Any]:
    return {"token": chr(byte), "logprob": logprob, "bytes": [byte]}


@pytest.mark.parametrize("num_top", [None, 0, 2])
def test_logprobs_are_told_when_asked_for(server: Server, num_top: int | None) -> None:
    fields = {"logprobs": True} | ({} if num_top is None else {"top_logprobs": num_top})
    whole = server.http.post(URL, json=chat(**fields)).json()["choices"][0]["logprobs"]
    assert whole == {
        "content": [
            entry(byte, -byte / 100)
            | {"top_logprobs": [entry(byte - n, -0.5 * n - 0.5) for n in range(num_top or 0)]}
            for byte in b"hello"
        ],
        "refusal": None,
    }
    events = events_of(server.http.post(URL, json=chat(stream=True, **fields)))
    told = [event["choices"][0]["logprobs"] for event in events]
    assert told[0] is told[-1] is None
    assert [piece["content"] for piece in told[1:-1]] == [[each] for each in whole["content"]]
    assert all(piece["refusal"] is None for piece in told[1:-1])


def test_logprobs_of_an_empty_answer_are_an_empty_list(serve: Serve) -> None:
    server = serve(engine=FakeEngine([END]))
    body = server.http.post(URL, json=chat(logprobs=True)).json()
    assert body["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_an_answer_cut_by_its_limit_says_so(server: Server) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = server.http.post(URL, json=chat(**{field: 3})).json()
        assert body["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": "hel", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
        assert body["usage"]["completion_tokens"] == 3


def test_the_engine_knows_the_request_by_an_id_of_ours(server: Server) -> None:
    headers = {"x-request-id": "mine"}
    ids = [server.http.post(URL, json=chat(), headers=headers).json()["id"] for _ in range(2)]
    assert ids == [request.request_id for request, _ in server.engine.submitted]
    assert ids[0] != ids[1]


def test_another_model_is_not_found(server: Server) -> None:
    response = server.http.post(URL, json=chat() | {"model": "gpt-4o"})
    assert_error(response, 404, "model_not_found", param="model")
    assert not server.preparer.requests


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidPrompt("The prompt is wrong.", param="messages"), 400, "invalid_prompt"),
        (RateLimited(), 429, "rate_limit_exceeded"),
        (Unavailable(), 503, "server_is_overloaded"),
        (ServerError(), 500, "internal_error"),
        (ZeroDivisionError("secret /etc/passwd 0x7fff"), 500, "internal_error"),
    ],
    ids=lambda value: getattr(value, "code", None) or type(value).__name__,
)
def test_a_refusal_before_the_first_event_is_a_plain_error(
    serve: Serve, stream: bool, error: Exception, status: int, code: str
) -> None:
    param = getattr(error, "param", None)
    server = serve(preparer=TextPreparer(error=error))
    response = server.http.post(URL, json=chat(stream=stream))
    assert_error(response, status, code, param=param)
    if isinstance(error, RateLimited | Unavailable):
        server = serve(engine=FakeEngine([END], refuse=error))
        assert_error(server.http.post(URL, json=chat(stream=stream)), status, code)


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_error_before_the_first_token_is_a_plain_error(
    serve: Serve, stream: bool
) -> None:
    server = serve(engine=FakeEngine([], error_code="worker_restarting"))
    response = server.http.post(URL, json=chat(stream=stream))
    assert_error(response, 503, "worker_restarting")


def test_an_engine_error_in_a_stream_is_one_frame_and_a_proper_end(serve: Serve) -> None:
    server = serve(engine=FakeEngine(list(b"half"), error_code="worker_restarting"))
    events = events_of(server.http.post(URL, json=chat(stream=True)))
    assert text_of(events[:-1]) == "half"
    assert [list(event) for event in events].count(["error"]) == 1
    assert events[-1]["error"]["code"] == "worker_restarting"
    assert_error(server.http.post(URL, json=chat()), 503, "worker_restarting")


def test_a_request_beyond_its_time_is_ended(serve: Serve) -> None:
    http = HttpConfig(request_timeout_s=0.2)
    slow = serve(http=http, preparer=TextPreparer(delay_s=60))
    for stream in (True, False):
        assert_error(slow.http.post(URL, json=chat(stream=stream)), 504, "request_timeout")
    assert slow.preparer.cancelled == 2


def test_a_stream_beyond_its_time_ends_in_an_error_frame(serve: Serve) -> None:
    gate = asyncio.Semaphore(2)
    engine = FakeEngine([*b"hello", END], gate=gate)
    server = serve(http=HttpConfig(request_timeout_s=0.3), engine=engine)
    events = events_of(server.http.post(URL, json=chat(stream=True)))
    assert text_of(events[:-1]) == "he"
    assert events[-1]["error"]["code"] == "request_timeout"
    assert len(engine.aborted) == 1
    assert not engine.running


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("loading", "model_loading"),
        ("restarting", "worker_restarting"),
        ("crashed", "worker_restarting"),
        ("stopping", "shutting_down"),
    ],
)
def test_an_engine_that_cannot_serve_is_not_asked(server: Server, status: Any, code: str) -> None:
    server.engine.status = status
    assert_error(server.http.post(URL, json=chat()), 503, code)
    assert not server.preparer.requests


@pytest.mark.parametrize("stream", [False, True])
def test_without_room_nothing_is_prepared(serve: Serve, stream: bool) -> None:
    server = serve()
    server.engine.refuse_early = RateLimited()
    response = server.http.post(URL, json=chat(stream=stream))
    assert_error(response, 429, "rate_limit_exceeded")
    assert server.preparer.requests == []
