"""POST /v1/responses with scripted engines and the `openai` client, which judges every shape."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, get_type_hints

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import (
    Response,
    ResponseIncludable,
    ResponseStreamEvent,
    response_create_params,
)
from openai.types.responses.input_token_count_params import InputTokenCountParams
from pydantic import BaseModel, TypeAdapter

from server.api.response_fields import (
    RESPONSE_SHARED_FIELDS,
    RESPONSE_UNSUPPORTED,
    TOOL_FIELDS,
    ResponseFields,
    parse_response_request,
)
from server.api.response_words import ResponseWords
from server.api.sse import Answer
from server.chat.calls import CallPiece
from server.chat.prepare import Preparer
from server.chat.tokenizer import Delta, TokenChance
from server.config import HttpConfig
from server.errors import InvalidRequest, RateLimited, Unavailable
from tests.api.conftest import client_of
from tests.api.demo import CONTEXT
from tests.api.test_rate_limits import TIGHT, bearer, limits
from tests.conftest import END, MODEL, Serve, Server, TextPreparer, assert_error, running
from tests.fakes import FakeEngine

URL = "/v1/responses"
COUNT_URL = "/v1/responses/input_tokens"
LEAST: dict[str, Any] = {"model": MODEL, "input": "hi"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"


@pytest.fixture(scope="module")
def demo(build: Callable[..., FastAPI], preparer: Preparer) -> Iterator[Server]:
    """The demo's own template and tokenizer; the answer is always "hello"."""
    tokenizer = preparer.tokenizer
    answer = [*tokenizer.encode_text("hello"), tokenizer.special["<|endofturn|>"]]
    with running(build(engine=FakeEngine(answer), preparer=preparer)) as served:
        yield served


@pytest.fixture
def client(shared_server: Server) -> Iterator[openai.OpenAI]:
    with client_of(shared_server) as made:
        yield made


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a finished stream, each under its own name and number."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.content.endswith(b"\n\n")
    events = []
    for frame in response.content.decode("utf-8").split("\n\n")[:-1]:
        if frame.startswith("data: [DONE]"):
            events.append({"type": "[DONE]"})
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(events)
        events.append(event)
    return events


def post(server: Server, **fields: Any) -> Any:
    response = server.http.post(URL, json=LEAST | fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    return events_of(server.http.post(URL, json=LEAST | {"stream": True} | fields))


def same(response: dict[str, Any]) -> dict[str, Any]:
    """All of it but what differs between two responses."""
    text = json.dumps(response)
    for item in response["output"]:
        text = text.replace(item["id"], "ITEM")
    told: dict[str, Any] = json.loads(text)
    return told | {"id": None, "created_at": None, "completed_at": None}


def test_a_whole_response_has_every_field_of_openais(
    client: openai.OpenAI, shared_server: Server
) -> None:
    response = client.responses.create(
        model=MODEL, input="안녕", instructions="Be brief.", temperature=0.5, metadata={"a": "b"}
    )
    assert response.output_text == "hello"
    assert (response.status, response.error, response.incomplete_details) == (
        "completed",
        None,
        None,
    )
    (item,) = response.output
    assert item.type == "message" and item.status == "completed"
    assert response.id.startswith("resp_") and item.id.startswith("msg_")
    told = response.to_dict()
    assert set(told) == {*Response.model_fields, "store"}
    assert told["store"] is False
    assert (told["temperature"], told["top_p"]) == (0.5, 1.0)
    assert (told["instructions"], told["metadata"]) == ("Be brief.", {"a": "b"})
    assert told["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert (told["tools"], told["tool_choice"], told["truncation"]) == ([], "auto", "disabled")
    assert told["usage"] == {
        "input_tokens": 6,
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "text_tokens": 6,
            "image_tokens": 0,
            "video_tokens": 0,
        },
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }
    (request, _) = shared_server.engine.submitted[-1]
    assert request.request_id == response.id
    assert [message["role"] for message in shared_server.preparer.requests[-1].messages] == [
        "system",
        "user",
    ]


def test_a_streamed_response_ends_with_the_whole_one(shared_server: Server) -> None:
    events = stream(shared_server)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 5,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    for event in events:
        EVENT.validate_python(event)
    assert {event["response"]["status"] for event in events[:2]} == {"in_progress"}
    assert all(event["response"]["output"] == [] for event in events[:2])
    last = events[-1]["response"]
    assert events[-2]["item"] == last["output"][0]
    assert events[-3]["part"] == last["output"][0]["content"][0]
    assert len({event["response"]["id"] for event in (*events[:2], events[-1])}) == 1
    assert last["completed_at"] >= last["created_at"]
    assert same(last) == same(post(shared_server))


ANSWERS = ["The circle is red.", "빨간 원이 왼쪽에 있어요.", "a\u2028b\u0085c\r\nd\n\ne\u0000f", ""]


@pytest.mark.parametrize("fields", [{}, {"stop": "re"}, {"max_output_tokens": 5}], ids=str)
def test_streamed_equals_whole_whatever_is_said(serve: Serve, fields: dict[str, Any]) -> None:
    for answer in ANSWERS:
        server = serve(engine=FakeEngine([*answer.encode(), END]))
        whole = post(server, **fields)
        events = stream(server, **fields)
        assert same(events[-1]["response"]) == same(whole)
        pieces = [each["delta"] for each in events if each["type"].endswith("text.delta")]
        (item,) = whole["output"]
        assert "".join(pieces) == item["content"][0]["text"]
        is_cut = fields.get("max_output_tokens", 1000) < len(answer.encode())
        assert (whole["status"] == "incomplete") == is_cut
        assert item["status"] == whole["status"]


def test_what_is_cut_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "hel")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.completed_at is None
    with client.responses.stream(model=MODEL, input="hi", max_output_tokens=3) as events:
        last = list(events)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == "hel"


def test_the_sdks_stream_puts_the_response_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi") as events:
        texts = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert texts == ["h", "he", "hel", "hell", "hello"]
    assert final.output_text == "hello"
    assert final.usage is not None and final.usage.output_tokens == 6


class Shape(BaseModel):
    sides: int


def test_the_sdk_parses_what_has_a_form(serve: Serve) -> None:
    server = serve(engine=FakeEngine([*b'{"sides":4}', END]))
    with client_of(server) as client:
        parsed = client.responses.parse(model=MODEL, input="hi", text_format=Shape)
        assert parsed.output_parsed == Shape(sides=4)
        told = parsed.to_dict()["text"]["format"]  # type: ignore[index]
        assert (told["type"], told["name"]) == ("json_schema", "Shape")
        with client.responses.stream(model=MODEL, input="hi", text_format=Shape) as events:
            assert events.get_final_response().output_parsed == Shape(sides=4)
    for request in server.preparer.requests:
        assert request.constraint is not None
        assert request.constraint.param == "text.format.schema"


def test_what_was_answered_can_be_sent_back(demo: Server) -> None:
    with client_of(demo) as client:
        first = client.responses.create(model=MODEL, input="hi")
        history: list[Any] = [{"role": "user", "content": "hi"}, *first.output]
        second = client.responses.create(
            model=MODEL, input=[*history, {"role": "user", "content": "Again."}]
        )
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Again."},
    ]
    tokens = demo.http.post("/tokenize", json={"messages": chat}).json()["count"]
    assert second.usage is not None and second.usage.input_tokens == tokens


@pytest.mark.parametrize("num_top", [None, 0, 2])
def test_logprobs_are_told_where_they_are_included(server: Server, num_top: int | None) -> None:
    fields = {"include": [LOGPROBS]} | ({} if num_top is None else {"top_logprobs": num_top})
    (item,) = post(server, **fields)["output"]
    told = item["content"][0]["logprobs"]
    assert [each["token"] for each in told] == list("hello")
    assert [len(each["top_logprobs"]) for each in told] == [num_top or 0] * 5
    assert told[0]["bytes"] == [104] and told[0]["logprob"] == -1.04
    events = stream(server, **fields)
    pieces = [each["logprobs"] for each in events if each["type"].endswith("text.delta")]
    assert pieces == [[each] for each in told]
    done = next(each for each in events if each["type"].endswith("text.done"))
    assert done["logprobs"] == told
    (without,) = post(server)["output"]
    assert without["content"][0]["logprobs"] == []


# What is refused ----------------------------------------------------------------------------------


def refusal(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_response_request(LEAST | fields, is_strict=False).request.to_chat_request()
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(
    "name",
    [
        *("background", "conversation", "max_tool_calls", "previous_response_id", "prompt"),
        *("store", "messages", "max_tokens", "response_format", "moderation"),
        "context_management",
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    assert refusal(**{name: [1]}) == ("unsupported_parameter", name)
    assert refusal(**{name: True}) == ("unsupported_parameter", name)
    parse_response_request(LEAST | {name: None}, is_strict=True)


NEUTRAL: dict[str, Any] = {
    "store": False,
    "background": False,
    "truncation": "disabled",
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "include": [],
    "reasoning": {"effort": "none", "summary": None},
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "top_logprobs": 0,
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "service_tier": "auto",
    "metadata": {},
    "context_management": [],
}


def test_what_asks_for_nothing_is_accepted(server: Server) -> None:
    told = post(server, **NEUTRAL)
    assert told["service_tier"] == "default"
    assert (told["user"], told["prompt_cache_key"]) == ("u", "k")
    streamed = stream(server, stream_options={"include_obfuscation": True}, **NEUTRAL)
    assert same(streamed[-1]["response"]) == same(told)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"store": True}, "unsupported_parameter", "store"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"reasoning": {"effort": "low"}}, "unsupported_parameter", "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "unsupported_parameter", "reasoning.summary"),
        ({"reasoning": "low"}, "invalid_type", "reasoning"),
        ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
        ({"text": {"verbosity": 1}}, "invalid_type", "text.verbosity"),
        ({"text": {"form": 1}}, "unknown_parameter", "text.form"),
        ({"text": []}, "invalid_type", "text"),
        ({"text": {"format": []}}, "invalid_type", "text.format"),
        ({"text": {"format": {}}}, "missing_required_parameter", "text.format.type"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
        (
            {"text": {"format": {"type": "json_object", "schema": {}}}},
            "invalid_value",
            "text.format.schema",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}}}},
            "missing_required_parameter",
            "text.format.name",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        (
            {"text": {"format": {"type": "json_schema", "json_schema": {}}}},
            "unknown_parameter",
            "text.format.json_schema",
        ),
        (
            {
                "text": {"format": {"type": "json_object"}},
                "structured_outputs": {"regex": "x"},
            },
            "invalid_value",
            "structured_outputs",
        ),
        ({"include": ["reasoning.encrypted_content"]}, "unsupported_parameter", "include[0]"),
        ({"include": [LOGPROBS, "poem"]}, "invalid_value", "include[1]"),
        ({"include": LOGPROBS}, "invalid_type", "include"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 21, "include": [LOGPROBS]}, "invalid_value", "top_logprobs"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": "1"}, "invalid_type", "max_output_tokens"),
        ({"instructions": ["x"]}, "invalid_type", "instructions"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"metadata": {"k" * 65: ""}}, "string_above_max_length", "metadata"),
        ({"service_tier": "flex"}, "unsupported_parameter", "service_tier"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "unsupported_parameter",
            "stream_options.include_usage",
        ),
        ({"input": None}, "missing_required_parameter", "input"),
        ({"model": None}, "invalid_type", "model"),
    ],
    ids=str,
)
def test_faults_are_refused_where_they_are(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal(**fields) == (code, param)


def test_fields_nobody_knows_are_counted_or_refused(serve: Serve) -> None:
    assert parse_response_request(LEAST | {"flux": 1}, is_strict=False).num_unknown == 1
    strict = serve(http=HttpConfig(strict=True))
    response = strict.http.post(URL, json=LEAST | {"flux": 1})
    assert_error(response, 400, "unknown_parameter", param="flux")


def test_every_field_that_openai_knows_is_honoured_or_refused_by_name() -> None:
    honoured = {*RESPONSE_SHARED_FIELDS, *TOOL_FIELDS, *ResponseFields.model_fields}
    known = honoured | {*RESPONSE_UNSUPPORTED}
    openais = {
        *get_type_hints(response_create_params.ResponseCreateParamsBase),
        *get_type_hints(InputTokenCountParams),
    }
    assert {"input", "stream_options", "personality"} < openais
    assert openais - known == set()
    for name in get_args(ResponseIncludable):
        code, _ = ("", "") if name == LOGPROBS else refusal(include=[name])
        assert code == ("" if name == LOGPROBS else "unsupported_parameter")


def test_our_own_sampling_fields_reach_the_engine(demo: Server) -> None:
    post(demo, top_k=5, min_p=0.1, seed=7, stop=["x"], presence_penalty=0.5, priority=3)
    (request, _) = demo.engine.submitted[-1]
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (5, 0.1, 7)
    assert (sampling.presence_penalty, request.priority) == (0.5, 3)


@pytest.mark.parametrize("url", [URL, COUNT_URL])
@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        ([{"role": "user", "content": " "}], "invalid_value", "input[0].content"),
        ("  ", "invalid_value", "input"),
        (
            [
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": [{"type": "input_image", "image_url": ""}]},
            ],
            "invalid_value",
            "input[1].content[0].image_url",
        ),
        (
            [{"role": "system", "content": [{"type": "input_image", "image_url": "http://x"}]}],
            "invalid_value",
            "input[0].content[0]",
        ),
        (
            [
                {"role": "user", "content": "x"},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"},
            ],
            "invalid_value",
            "input[1].arguments",
        ),
        (
            [{"type": "function_call_output", "call_id": "1", "output": "x"}],
            "invalid_value",
            "input[0].call_id",
        ),
        ("x " * 200, "context_length_exceeded", "input"),
    ],
)
def test_what_a_chat_refuses_is_refused_at_the_callers_place(
    demo: Server, url: str, value: Any, code: str, param: str
) -> None:
    for instructions in (None, "Be brief."):
        body = LEAST | {"input": value, "instructions": instructions}
        assert_error(demo.http.post(url, json=body), 400, code, param=param)


def test_another_model_is_not_found(server: Server) -> None:
    for url in (URL, COUNT_URL):
        response = server.http.post(url, json=LEAST | {"model": "gpt-4o"})
        assert_error(response, 404, "model_not_found", param="model")
    assert not server.preparer.requests


# When things go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("error", [Unavailable(), RateLimited(), ZeroDivisionError("0x7fff")])
def test_a_failure_before_the_first_token_is_a_plain_error(
    serve: Serve, is_streamed: bool, error: Exception
) -> None:
    status = getattr(error, "status", 500)
    code = getattr(error, "code", "internal_error")
    asked = LEAST | {"stream": is_streamed}
    server = serve(preparer=TextPreparer(error=error))
    assert_error(server.http.post(URL, json=asked), status, code)
    server = serve(engine=FakeEngine([], error_code="worker_restarting"))
    assert_error(server.http.post(URL, json=asked), 503, "worker_restarting")


def test_a_failure_in_a_stream_is_one_frame_that_every_client_understands(serve: Serve) -> None:
    server = serve(engine=FakeEngine(list(b"half"), error_code="worker_restarting"))
    *events, error, done = stream(server)
    assert "".join(each.get("delta", "") for each in events) == "half"
    assert done == {"type": "[DONE]"}
    assert (error["type"], error["code"]) == ("error", "worker_restarting")
    assert error["error"]["code"] == "worker_restarting"
    assert error["error"]["message"] == error["message"]
    EVENT.validate_python(error)
    with client_of(server) as client:
        seen = []
        with pytest.raises(openai.APIError) as caught:
            for event in client.responses.create(model=MODEL, input="hi", stream=True):
                seen.append(event.type)
        assert caught.value.code == "worker_restarting"
        assert seen.count("response.output_text.delta") == 4
        with (
            pytest.raises(openai.APIError, match="restarting"),
            client.responses.stream(model=MODEL, input="hi") as helper,
        ):
            helper.get_final_response()
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model=MODEL, input="hi")


def test_a_response_beyond_its_time_is_ended(serve: Serve) -> None:
    slow = serve(http=HttpConfig(request_timeout_s=0.2), preparer=TextPreparer(delay_s=60))
    for fields in ({}, {"stream": True}):
        response = slow.http.post(URL, json=LEAST | fields)
        assert_error(response, 504, "request_timeout")
    assert_error(slow.http.post(COUNT_URL, json=LEAST), 504, "request_timeout")
    assert slow.preparer.cancelled == 3
    engine = FakeEngine([*b"hello", END], gate=asyncio.Semaphore(2))
    server = serve(http=HttpConfig(request_timeout_s=0.3), engine=engine)
    *_, error, _ = stream(server)
    assert error["error"]["code"] == "request_timeout"
    assert len(engine.aborted) == 1 and not engine.running


@pytest.mark.parametrize("url", [URL, COUNT_URL])
def test_without_an_engine_or_room_nothing_is_prepared(serve: Serve, url: str) -> None:
    server = serve()
    server.engine.refuse_early = RateLimited()
    assert_error(server.http.post(url, json=LEAST), 429, "rate_limit_exceeded")
    server.engine.status = "loading"
    assert_error(server.http.post(url, json=LEAST), 503, "model_loading")
    assert server.preparer.requests == []


# Counted and charged ------------------------------------------------------------------------------


def test_input_tokens_are_counted_and_nothing_is_generated(demo: Server) -> None:
    before = len(demo.engine.submitted)
    asked: dict[str, Any] = {"model": MODEL, "input": "안녕", "instructions": "Be brief."}
    with client_of(demo) as client:
        counted = client.responses.input_tokens.count(**asked)
        assert len(demo.engine.submitted) == before
        response = client.responses.create(**asked)
    assert counted.to_dict() == {
        "object": "response.input_tokens",
        "input_tokens": counted.input_tokens,
    }
    assert response.usage is not None
    assert 10 < counted.input_tokens == response.usage.input_tokens < CONTEXT
    streamed = demo.http.post(COUNT_URL, json=asked | {"stream": True})
    assert streamed.json()["input_tokens"] == counted.input_tokens


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_response_costs_what_a_chat_does_and_a_count_no_tokens(
    serve: Serve, is_streamed: bool
) -> None:
    server = serve(http=limits(tokens_per_minute=1000))

    def left(response: httpx.Response) -> int:
        assert response.status_code == 200, response.text
        return int(response.headers["x-ratelimit-remaining-tokens"])

    def models() -> int:
        return left(server.http.get("/v1/models", headers=bearer(TIGHT)))

    assert models() == 1000
    server.http.post(COUNT_URL, json=LEAST, headers=bearer(TIGHT))
    assert models() == 1000
    body = LEAST | {"input": "x" * 500, "stream": is_streamed}
    server.http.post(URL, json=body, headers=bearer(TIGHT))
    assert 494 <= models() <= 494 + 200  # what has come back since then is little
    beyond = server.http.post(URL, json=LEAST | {"input": "x" * 900}, headers=bearer(TIGHT))
    assert_error(beyond, 429, "rate_limit_exceeded")
    counted = server.app.state.metrics.text().decode()
    assert 'reason="stop"} 1.0' in counted


# Words --------------------------------------------------------------------------------------------


async def worded(
    preparer: TextPreparer, deltas: Sequence[Delta], **fields: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer of these deltas, and the same as a whole."""
    asked = parse_response_request(LEAST | fields, is_strict=True).request
    prepared = await preparer.prepare(asked.to_chat_request(), request_id="x", tenant="")

    async def generated() -> Any:
        for delta in deltas:
            yield delta

    def words() -> ResponseWords:
        return ResponseWords(asked, prepared, id="resp_1", created_s=1)

    answer, streamed = Answer(prepared.usage, generated()), words()
    (all_deltas,) = await answer.choices()
    events = [*streamed.opening()]
    events += itertools.chain.from_iterable(map(streamed.events, all_deltas))
    events.append(streamed.closing(answer))
    for number, event in enumerate(events):
        EVENT.validate_python(event | {"sequence_number": number})
    return events, words().whole(all_deltas, answer)


def call(index: int, *pieces: str) -> list[Delta]:
    head = CallPiece(index, f"call_{index}", f"f{index}")
    rest = (CallPiece(index, arguments=piece) for piece in pieces)
    return [Delta("", None, 1, calls=(piece,)) for piece in (head, *rest)]


async def test_calls_are_items_of_their_own_after_the_text() -> None:
    deltas = [
        Delta("Let me ", None, 1),
        Delta("see.", None, 1),
        *call(0, '{"a"', ":1}"),
        *call(1),
        Delta("", "stop", 1),
    ]
    events, whole = await worded(TextPreparer(), deltas)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", *["function_call_arguments.delta"] * 2),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    output = whole["output"]
    assert same(events[-1]["response"]) == same(whole)
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[0]["content"][0]["text"] == "Let me see."
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[1:]] == [
        ("call_0", "f0", '{"a":1}'),
        ("call_1", "f1", ""),
    ]
    assert {item["status"] for item in output} == {"completed"}
    assert all(item["id"].startswith("fc_") for item in output[1:])
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places) and set(places) == {0, 1, 2}
    back = parse_response_request(LEAST | {"input": output}, is_strict=True).request
    (message,) = back.to_chat_request().messages
    assert isinstance(message, dict) and len(message["tool_calls"]) == 2


async def test_a_call_that_was_cut_is_incomplete_and_alone() -> None:
    deltas = [*call(0, '{"a"'), Delta("", "length", 1)]
    events, whole = await worded(TextPreparer(), deltas)
    (item,) = whole["output"]
    assert (item["type"], item["status"], whole["status"]) == (
        "function_call",
        "incomplete",
        "incomplete",
    )
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["arguments"] == '{"a"'


async def test_logprobs_without_a_text_are_told_with_the_message() -> None:
    chance = TokenChance("\ufffd", b"\xed", -math.inf)
    deltas = [Delta("a", None, 1), Delta("", "length", 1, chances=(chance,))]
    events, whole = await worded(TextPreparer(), deltas, include=[LOGPROBS])
    told = whole["output"][0]["content"][0]["logprobs"]
    assert told == [{"token": "\ufffd", "logprob": -9999.0, "bytes": [0xED], "top_logprobs": []}]
    assert [e["logprobs"] for e in events if e["type"].endswith("text.delta")] == [[]]
    assert [e["logprobs"] for e in events if e["type"].endswith("text.done")] == [told]
