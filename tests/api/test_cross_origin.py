"""Browsers' requests from other origins: who may ask, who may read, and nobody by default."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI

from server.config import HttpConfig
from tests.conftest import Serve, Server, TextPreparer, assert_error, chat, running

URL = "/v1/chat/completions"
PAGE, OTHER = "https://app.example.com", "https://evil.example.com"
KEY = "key-of-alice"
KEYS = {"alice": {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "requests_per_minute": 60}}


@pytest.fixture(scope="module")
def named(build: Callable[..., FastAPI]) -> Iterator[Server]:
    """One origin may call, with a key."""
    http = HttpConfig(cors_origins=(PAGE, "http://localhost:3000"), api_keys=KEYS)
    with running(build(http=http)) as served:
        yield served


@pytest.fixture(scope="module")
def anyone(build: Callable[..., FastAPI]) -> Iterator[Server]:
    with running(build(http=HttpConfig(cors_origins=("*",)))) as served:
        yield served


def preflight(server: Server, origin: str, path: str = URL, asked: str = "") -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    if asked:
        headers["access-control-request-headers"] = asked
    return server.http.options(path, headers=headers)


def words(response: httpx.Response, header: str) -> set[str]:
    return {word.strip().lower() for word in response.headers.get(header, "").split(",")}


def cross_origin_headers(response: httpx.Response) -> list[str]:
    return [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", [URL, "/v1/models", "/health", "/nope"])
def test_a_preflight_of_an_allowed_page_needs_no_key(named: Server, path: str) -> None:
    asked = "Authorization, content-type,x-stainless-os, X-Stainless-Lang, x-evil, x-stainless-@"
    answer = preflight(named, PAGE, path, asked)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert words(answer, "access-control-allow-methods") == {"get", "post", "delete"}
    allowed = words(answer, "access-control-allow-headers")
    assert allowed >= {"authorization", "content-type", "x-request-id"}
    assert allowed >= {"x-stainless-os", "x-stainless-lang"}
    assert not allowed & {"x-evil", "x-stainless-@", "*", "cookie"}
    assert int(answer.headers["access-control-max-age"]) > 0
    assert "access-control-allow-credentials" not in answer.headers
    assert "origin" in words(answer, "vary")
    assert answer.headers["x-request-id"]
    assert not any(name.startswith("x-ratelimit") for name in answer.headers)


@pytest.mark.parametrize(
    "origin", [OTHER, "null", "https://app.example.com.evil.com", "http://app.example.com",
               "https://app.example.com:8443", "HTTPS://APP.EXAMPLE.COM", "*"]
)  # fmt: skip
def test_other_origins_are_told_nothing(named: Server, origin: str) -> None:
    refused = preflight(named, origin)
    assert_error(refused, 405, "method_not_allowed")
    answered = named.http.get(
        "/v1/models", headers={"origin": origin, "authorization": f"Bearer {KEY}"}
    )
    assert answered.status_code == 200  # the browser keeps it from the page
    for response in (refused, answered):
        assert cross_origin_headers(response) == []
        assert "origin" in words(response, "vary")


def test_an_options_request_that_is_no_preflight_is_refused(named: Server) -> None:
    for headers in ({}, {"origin": PAGE}, {"access-control-request-method": "POST"}):
        response = named.http.options(URL, headers=headers)
        assert_error(response, 405, "method_not_allowed")


@pytest.mark.parametrize("stream", [False, True])
def test_an_allowed_page_may_read_answers_and_their_headers(named: Server, stream: bool) -> None:
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    answer = named.http.post(URL, json=chat(stream=stream), headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    exposed = words(answer, "access-control-expose-headers")
    ours = {name for name in answer.headers if name.startswith(("x-r", "openai-", "retry"))}
    assert ours >= {"x-request-id", "openai-processing-ms", "x-ratelimit-remaining-requests"}
    assert exposed >= ours | {"retry-after", "x-should-retry", "x-ratelimit-reset-tokens"}
    assert "access-control-allow-credentials" not in answer.headers


def test_an_allowed_page_may_read_errors_from_whichever_layer(
    build: Callable[..., FastAPI],
) -> None:
    http = HttpConfig(cors_origins=(PAGE,), api_keys=KEYS, max_body_bytes=1000)
    broken = TextPreparer(error=ZeroDivisionError())
    with running(build(http=http, preparer=broken)) as server:
        client, origin = server.http, {"origin": PAGE}
        key = origin | {"authorization": f"Bearer {KEY}"}
        errors = [
            client.get("/v1/models", headers=origin | {"x-long": "a" * 17_000}),
            client.get("/v1/models", headers=origin),
            client.post(URL, content=b" " * 2000, headers=key),
            client.post(URL, json=chat(n=0), headers=key),
            client.get("/nope", headers=key),
            client.put(URL, headers=key),
            client.post(URL, json=chat(), headers=key),
        ]
        assert [each.status_code for each in errors] == [431, 401, 413, 400, 404, 405, 500]
        while (limited := client.get("/v1/models", headers=key)).status_code == 200:
            pass
        assert_error(limited, 429, "rate_limit_exceeded")
        server.app.state.lifecycle.is_draining = True
        draining = client.get("/v1/models", headers=key)
        assert_error(draining, 503, "shutting_down")
        for each in (*errors, limited, draining):
            assert each.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in words(each, "access-control-expose-headers")


def test_a_request_without_an_origin_is_nobodys_page(named: Server, anyone: Server) -> None:
    for server in (named, anyone):
        answer = server.http.get("/health")
        assert answer.status_code == 200
        assert cross_origin_headers(answer) == []
        assert "origin" in words(answer, "vary")


def test_any_origin_where_the_settings_say_so(anyone: Server) -> None:
    for origin in (PAGE, OTHER, "null"):
        assert preflight(anyone, origin).status_code == 204
        answer = anyone.http.post(URL, json=chat(), headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in answer.headers


def test_by_default_there_is_no_such_thing(serve: Serve) -> None:
    server = serve()
    assert_error(preflight(server, PAGE), 405, "method_not_allowed")
    for response in (
        preflight(server, PAGE),
        server.http.post(URL, json=chat(), headers={"origin": PAGE}),
        server.http.get("/nope", headers={"origin": PAGE}),
    ):
        assert cross_origin_headers(response) == []
        assert "vary" not in response.headers
