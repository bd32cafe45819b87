"""What a key may use: buckets against a clock of our own, the rest through a real server."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.api.rate_limits import Allowance, RateLimits, TokenBucket, duration
from server.config import ApiKey, HttpConfig
from server.errors import InvalidRequest, RateLimited, Unavailable
from server.telemetry.metrics import Metrics
from tests.conftest import (
    END,
    MODEL,
    Serve,
    Server,
    assert_error,
    chat,
    running,
    until,
)
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"
TIGHT, FREE = "key-with-limits", "key-without"
PER_MINUTE = [
    f"x-ratelimit-{what}-{of}"
    for of in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
]


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def limits(**values: int) -> HttpConfig:
    """Two keys: one with these limits, one without any."""
    return HttpConfig(api_keys={"tight": {"sha256": sha256(TIGHT), **values}, "free": sha256(FREE)})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: Server, key: str = TIGHT, text: str = "hi", **fields: Any) -> httpx.Response:
    return server.http.post(URL, json=chat(text, **fields), headers=bearer(key))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# Buckets ------------------------------------------------------------------------------------------

steps = st.lists(st.tuples(st.floats(0, 200), st.integers(1, 300)), max_size=60)


@given(per_minute=st.integers(1, 10_000), steps=steps)
def test_nobody_gets_more_than_a_minutes_worth_and_the_rate(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    taken: list[tuple[float, int]] = []
    for pause_s, count in steps:
        clock.now_s += pause_s
        if count <= per_minute and not bucket.wait_s(count):
            bucket.take(count)
            taken.append((clock.now_s, count))
    for first in range(len(taken)):
        total = 0
        for now_s, count in taken[first:]:
            total += count
            allowed = per_minute + per_minute / 60 * (now_s - taken[first][0])
            assert total <= allowed * (1 + 1e-9) + 1e-3


@given(per_minute=st.integers(1, 10_000), steps=steps, wanted=st.integers(1, 20_000))
def test_who_waits_as_told_is_let_in_and_not_before(
    per_minute: int, steps: list[tuple[float, int]], wanted: int
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    for pause_s, count in steps:
        clock.now_s += pause_s
        bucket.take(count)
        assert 0 <= bucket.remaining <= per_minute
    wait_s = bucket.wait_s(wanted)
    if wait_s > 0.01:
        clock.now_s += wait_s * 0.99
        assert bucket.wait_s(wanted) > 0
        clock.now_s += wait_s * 0.01
    else:
        clock.now_s += wait_s
    assert bucket.wait_s(wanted) == 0
    clock.now_s += bucket.full_in_s
    assert bucket.remaining == per_minute


def test_a_debt_is_paid_before_anything_is_there() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(90)
    assert (bucket.remaining, bucket.wait_s(1), bucket.full_in_s) == (0, 31, 90)
    clock.now_s += 30.5
    assert (bucket.remaining, bucket.wait_s(1)) == (0, 0.5)
    clock.now_s += 1000
    assert (bucket.remaining, bucket.wait_s(60), bucket.full_in_s) == (60, 0, 0)
    assert bucket.wait_s(10**6) == 0  # more than there can ever be: when it is full


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (1e-9, "0s"),
        (0.0165, "17ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (6.2, "7s"),
        (59.5, "1m0s"),
        (360, "6m0s"),
        (3725, "1h2m5s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(seconds=st.floats(0, 1e6))
def test_a_duration_is_never_shorter_than_the_wait(seconds: float) -> None:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    text, told_s, digits = duration(seconds), 0.0, ""
    if text.endswith("ms"):
        told_s = int(text[:-2]) / 1000
    else:
        for character in text:
            if character.isdigit():
                digits += character
            else:
                told_s += int(digits) * units[character]
                digits = ""
    assert seconds - 1e-5 <= told_s <= math.ceil(seconds) + 1e-5


# An allowance -------------------------------------------------------------------------------------


def refusal_s(attempt: Callable[[], None]) -> int | None:
    """The wait that a refusal tells of; None where there is no refusal."""
    try:
        attempt()
    except RateLimited as error:
        return error.retry_after_s
    return None


def test_a_refused_request_counts_for_nothing() -> None:
    clock, metrics = Clock(), Metrics()
    allowance = Allowance(metrics, clock, requests_per_minute=2, max_concurrent=2)
    allowance.enter(needs_tokens=True)
    allowance.enter(needs_tokens=True)
    for _ in range(3):
        assert refusal_s(lambda: allowance.enter(needs_tokens=True)) == 1  # concurrency
    allowance.leave()
    for _ in range(3):
        assert refusal_s(lambda: allowance.enter(needs_tokens=True)) == 30
    clock.now_s += 30
    allowance.enter(needs_tokens=True)
    text = metrics.text().decode()
    assert 'hcx_requests_rejected_total{reason="key_concurrent"} 3.0' in text
    assert 'hcx_requests_rejected_total{reason="key_requests_per_minute"} 3.0' in text


def test_a_debt_of_tokens_refuses_only_what_needs_some() -> None:
    clock, metrics = Clock(), Metrics()
    allowance = Allowance(metrics, clock, tokens_per_minute=600)
    assert refusal_s(lambda: allowance.check_tokens(600)) is None
    allowance.take_tokens(590)
    assert refusal_s(lambda: allowance.enter(needs_tokens=True)) is None
    assert refusal_s(lambda: allowance.check_tokens(30)) == 2
    allowance.take_tokens(60)
    assert refusal_s(lambda: allowance.enter(needs_tokens=False)) is None
    assert refusal_s(lambda: allowance.enter(needs_tokens=True)) == 6
    clock.now_s += 5.2
    assert refusal_s(lambda: allowance.enter(needs_tokens=True)) is None
    assert 'reason="key_tokens_per_minute"} 2.0' in metrics.text().decode()


async def test_the_layer_lets_in_again_what_its_refusal_promised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError("nothing is to be received")

    clock = Clock()
    keys = {"tight": ApiKey(sha256=sha256(TIGHT), requests_per_minute=2)}
    layer = RateLimits(app, api_keys=keys, metrics=Metrics(), clock=clock)

    async def answer() -> tuple[int, dict[bytes, bytes]]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/x", "state": {"tenant": "tight"}}
        await layer(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])

    assert [(await answer())[0] for _ in range(3)] == [204, 204, 429]
    status, headers = await answer()
    assert (status, headers[b"retry-after"]) == (429, b"30")
    assert headers[b"x-ratelimit-reset-requests"] == b"1m0s"
    clock.now_s += 29
    assert (await answer())[0] == 429
    clock.now_s += 1
    status, headers = await answer()
    assert (status, headers[b"x-ratelimit-remaining-requests"]) == (204, b"0")
    assert headers[b"x-ratelimit-reset-requests"] == b"1m0s"


# Through a server ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_a_minute(build: Callable[..., FastAPI]) -> Iterator[Server]:
    with running(build(http=limits(requests_per_minute=2, tokens_per_minute=100_000))) as served:
        yield served


def client(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_the_openai_client_reads_the_headers_and_meets_its_rate_limit_error(
    two_a_minute: Server,
) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with client(two_a_minute, TIGHT) as tight, client(two_a_minute, FREE) as free:
        for left in ("1", "0"):
            answer = tight.chat.completions.with_raw_response.create(model=MODEL, messages=messages)
            assert answer.parse().choices[0].message.content == "hello"
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert re.fullmatch(r"\d\ds|1m0s", answer.headers["x-ratelimit-reset-requests"])
            assert int(answer.headers["openai-processing-ms"]) >= 0
        with pytest.raises(openai.RateLimitError) as caught:
            tight.chat.completions.create(model=MODEL, messages=messages)
        assert caught.value.code == "rate_limit_exceeded"
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 30
        assert headers["x-should-retry"] == "true"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-request-id"] == caught.value.request_id

        for _ in range(4):  # the other key is none the poorer, and told of nothing
            answer = free.chat.completions.with_raw_response.create(model=MODEL, messages=messages)
            assert not any(name.startswith("x-ratelimit") for name in answer.headers)
            assert int(answer.headers["openai-processing-ms"]) >= 0

    counted = two_a_minute.app.state.metrics.text().decode()
    assert 'hcx_requests_rejected_total{reason="key_requests_per_minute"} 1.0' in counted
    refused = two_a_minute.http.get("/v1/models", headers=bearer(TIGHT))
    assert_error(refused, 429, "rate_limit_exceeded")  # whatever the path
    assert all(name in refused.headers for name in PER_MINUTE)
    for path in ("/health", "/ready"):
        free_of_charge = two_a_minute.http.get(path, headers=bearer(TIGHT))
        assert free_of_charge.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in free_of_charge.headers)


def test_errors_tell_what_is_left_too(serve: Serve) -> None:
    server = serve(http=limits(requests_per_minute=10))
    headers = bearer(TIGHT)
    answers = [
        server.http.get("/nope", headers=headers),
        server.http.get(URL, headers=headers),
        server.http.post(URL, json=chat(n=100), headers=headers),
        server.http.post(URL, content=b"{", headers=headers),
        server.http.post(URL, json=chat(), headers=headers | {"content-encoding": "gzip"}),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 415, 415]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["9", "8", "7", "6", "5"]
    assert not any("tokens" in name for name in answers[0].headers)
    unknown = server.http.get("/nope", headers=bearer("nobody"))
    assert_error(unknown, 401, "invalid_api_key")
    assert not any(name.startswith("x-ratelimit") for name in unknown.headers)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_and_answer_are_charged(serve: Serve, stream: bool) -> None:
    server = serve(http=limits(tokens_per_minute=1000))
    text = "x" * 594
    first = ask(server, text=text, stream=stream)
    assert first.status_code == 200
    # 594 and six tokens; when a stream begins, it has not come to the last of them.
    left = int(first.headers["x-ratelimit-remaining-tokens"])
    assert 400 <= left <= 450
    models = server.http.get("/v1/models", headers=bearer(TIGHT))
    assert 400 <= int(models.headers["x-ratelimit-remaining-tokens"]) <= 450
    assert models.headers["x-ratelimit-limit-tokens"] == "1000"

    second = ask(server, text=text, stream=stream)
    error = assert_error(second, 429, "rate_limit_exceeded")
    assert "1000 tokens a minute" in error["message"]
    assert 3 <= int(second.headers["retry-after"]) <= 12  # 194 tokens at 1000 a minute
    assert len(server.engine.submitted) == 1
    assert ask(server, text="short").status_code == 200  # for which there are enough
    assert ask(server, FREE, text=text).status_code == 200


def test_a_streams_tokens_are_owed_and_then_refused(serve: Serve) -> None:
    """All that was generated is charged by the end of the stream, though none of it was there."""
    engine = FakeEngine([*b"word " * 30, END])
    server = serve(engine=engine, http=limits(tokens_per_minute=100))
    streamed = ask(server, stream=True)
    assert streamed.text.rstrip().endswith("data: [DONE]")
    models = server.http.get("/v1/models", headers=bearer(TIGHT))
    assert models.status_code == 200  # costs none, so none need be there
    assert models.headers["x-ratelimit-remaining-tokens"] == "0"
    refused = ask(server)
    assert_error(refused, 429, "rate_limit_exceeded")
    # 153 used of 100: 53 and one more at 100 a minute.
    assert 20 <= int(refused.headers["retry-after"]) <= 33
    assert len(engine.submitted) == 1


def test_who_leaves_owes_what_was_generated_until_then(serve: Serve) -> None:
    engine = FakeEngine(b"word " * 30, gate=asyncio.Semaphore(20))
    server = serve(engine=engine, http=limits(tokens_per_minute=10))
    body = chat(stream=True)
    with server.http.stream("POST", URL, json=body, headers=bearer(TIGHT)) as stream:
        lines = (line for line in stream.iter_lines() if line)
        for _ in range(20):
            next(lines)
    until(lambda: engine.aborted)
    refused = ask(server)
    assert_error(refused, 429, "rate_limit_exceeded")
    # At least 2 and 18 of 10 were used: ten and one more at ten a minute.
    assert int(refused.headers["retry-after"]) >= 45


def test_the_choices_of_a_request_are_charged_and_its_prompt_once(serve: Serve) -> None:
    server = serve(http=limits(tokens_per_minute=60))
    answer = ask(server, text="x" * 20, n=3)  # 20 and three times six
    assert answer.json()["usage"]["total_tokens"] == 38
    assert 22 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 30


def test_what_the_engine_does_not_take_costs_no_tokens(serve: Serve) -> None:
    server = serve(engine=FakeEngine(refuse=Unavailable()), http=limits(tokens_per_minute=100))
    refused = ask(server, text="x" * 90)
    assert_error(refused, 503, "server_is_overloaded")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "100"
    server.preparer.error = InvalidRequest("no")
    assert ask(server, text="x" * 90).headers["x-ratelimit-remaining-tokens"] == "100"


def test_a_prompt_beyond_a_minutes_worth_needs_all_of_it(serve: Serve) -> None:
    server = serve(http=limits(tokens_per_minute=50))
    assert ask(server, text="x" * 70).status_code == 200
    refused = ask(server, text="x")
    assert_error(refused, 429, "rate_limit_exceeded")
    assert 20 <= int(refused.headers["retry-after"]) <= 34


@pytest.mark.parametrize("leaves", [False, True])
def test_a_request_counts_while_it_is_in_progress(serve: Serve, leaves: bool) -> None:
    gate = asyncio.Semaphore(1)
    server = serve(engine=FakeEngine([*b"hello", END], gate=gate), http=limits(max_concurrent=1))
    body = chat(stream=True)
    with server.http.stream("POST", URL, json=body, headers=bearer(TIGHT)) as stream:
        assert stream.status_code == 200
        refused = ask(server)
        error = assert_error(refused, 429, "rate_limit_exceeded")
        assert "in progress" in error["message"]
        assert refused.headers["retry-after"] == "1"
        assert not any(name.startswith("x-ratelimit") for name in refused.headers)
        assert server.http.get("/v1/models", headers=bearer(TIGHT)).status_code == 429
        assert server.http.get("/v1/models", headers=bearer(FREE)).status_code == 200
        if not leaves:
            for _ in range(5):
                server.call(gate.release)
            assert stream.read().rstrip().endswith(b"data: [DONE]")
    until(lambda: server.http.get("/v1/models", headers=bearer(TIGHT)).status_code == 200)


def test_raw_prompts_are_charged_too(serve: Serve) -> None:
    server = serve(http=limits(tokens_per_minute=60))
    body = {"model": MODEL, "prompt": ["x" * 20, "y" * 20]}
    answer = server.http.post("/v1/completions", json=body, headers=bearer(TIGHT))
    assert answer.status_code == 200, answer.text
    used = answer.json()["usage"]["total_tokens"]
    assert used > 40
    refused = server.http.post("/v1/completions", json=body, headers=bearer(TIGHT))
    assert_error(refused, 429, "rate_limit_exceeded")
