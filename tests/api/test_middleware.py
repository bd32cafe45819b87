from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.config import HttpConfig
from tests.conftest import (
    Serve,
    Server,
    TextPreparer,
    assert_error,
    assert_error_body,
    chat,
    running,
    until,
)

URL = "/v1/chat/completions"
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob-\u00e9"}
WITH_KEYS = HttpConfig(
    api_keys={name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
)


def raw(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to exactly these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    while len(body) < int(headers["content-length"]):
        piece = connection.recv(65536)
        assert piece, "the connection ended within the body"
        body += piece
    return int(status.split()[1]), headers, body


@pytest.fixture(scope="module")
def locked(build: Callable[..., FastAPI]) -> Iterator[Server]:
    with running(build(http=WITH_KEYS)) as served:
        yield served


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"])
@pytest.mark.parametrize(
    "path", [URL, "/v1/models", "/v1/models/fakes/tiny", "/", "/nope", "/docs", "/openapi.json"]
)
def test_every_route_needs_a_key(locked: Server, method: str, path: str) -> None:
    wrong: list[dict[bytes, bytes]] = [
        {},
        bearer("wrong"),
        bearer("alice"),
        bearer(WITH_KEYS.api_keys["alice"].sha256),
        {b"authorization": KEYS["alice"].encode()},
        {b"authorization": b"Basic " + KEYS["alice"].encode()},
        {b"authorization": b"Bearer"},
        {b"x-api-key": KEYS["alice"].encode()},
    ]
    bodies = set()
    for headers in wrong:
        response = locked.http.request(method, path, headers=headers)
        assert_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        bodies.add(response.content)
    assert len(bodies) == 1
    for key in KEYS.values():
        response = locked.http.request(method, path, headers=bearer(key), json=chat())
        assert response.status_code in (200, 404, 405)
    assert locked.http.request(method, f"{path}?api_key={KEYS['alice']}").status_code == 401


def test_one_key_is_not_enough_when_two_headers_carry_one(locked: Server) -> None:
    key = KEYS["alice"].encode()
    twice = b"Authorization: Bearer " + key + b"\r\nAuthorization: Bearer wrong\r\n"
    status, _, _ = raw(locked, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + twice + b"\r\n")
    assert status == 401


@pytest.mark.parametrize(
    "target",
    [
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health%2f..%2fv1/models",
        "/health;/v1/models",
        "/health/",
        "//health",
        "/HEALTH",
        "/ready/../v1/models",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/MODELS",
        "/v1/%6dodels",
        "/v1%2Fmodels",
        "/./v1/models",
        "http://127.0.0.1/v1/models",
        "http://127.0.0.1/health",
        "/v1/models?/health",
        "/v1/models#/health",
        "*",
    ],
)
@pytest.mark.parametrize("host", ["x", "127.0.0.1/health?", "/health", "health"])
def test_no_spelling_of_a_path_goes_round_the_key(locked: Server, target: str, host: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    status, headers, body = raw(locked, request)
    assert status in (400, 401)
    if status == 401:
        assert_error_body(body, headers, 401, "invalid_api_key", param=None)


def test_health_and_readiness_need_no_key(locked: Server) -> None:
    for path in ("/health", "/ready", "/%68ealth", "/health?x=1"):
        assert locked.http.get(path).status_code == 200


def test_the_key_decides_whose_request_it_is(serve: Serve) -> None:
    locked = serve(http=WITH_KEYS)
    for key in KEYS.values():
        assert locked.http.post(URL, json=chat(), headers=bearer(key)).status_code == 200
    assert [request.tenant for request, _ in locked.engine.submitted] == ["alice", "bob"]


def test_without_keys_everyone_is_one_tenant(server: Server) -> None:
    for headers in ({}, bearer("anything")):
        assert server.http.post(URL, json=chat(), headers=headers).status_code == 200
    assert {request.tenant for request, _ in server.engine.submitted} == {""}


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("path", [URL, "/health", "/nope"])
@pytest.mark.parametrize("has_keys", [True, False])
def test_methods_that_no_route_has(
    locked: Server, server: Server, method: str, path: str, has_keys: bool
) -> None:
    asked = locked if has_keys else server
    if method == "CONNECT":
        request = f"CONNECT {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        status, headers, body = raw(asked, request)
        assert status == 405
        assert_error_body(body, headers, 405, "method_not_allowed", param=None)
    else:
        response = asked.http.request(method, path)
        assert_error(response, 405, "method_not_allowed")
        headers = dict(response.headers)
    allowed = {"/health": "GET, HEAD", URL: "GET, HEAD, POST, DELETE" if has_keys else "POST"}
    assert headers["allow"] == allowed.get(path, "GET, HEAD, POST, DELETE")
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", URL, "POST"),
        ("PUT", URL, "POST"),
        ("HEAD", URL, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/fakes/tiny", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/ready", "GET, HEAD"),
        ("OPTIONS", URL, "POST"),
        ("TRACE", "/v1/models", "GET, HEAD"),
    ],
)
def test_the_wrong_method_is_told_the_right_one(
    shared_server: Server, method: str, path: str, allow: str
) -> None:
    response = shared_server.http.request(method, path)
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/fakes/tiny"])
def test_head_is_get_without_the_body(shared_server: Server, path: str) -> None:
    whole, head = shared_server.http.get(path), shared_server.http.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == whole.headers[name]
    assert_error(shared_server.http.head("/nope"), 404, "unknown_url")


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat/completions/", "/v1/chat//completions", "/docs/", "/redoc"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_routes(shared_server: Server, method: str, path: str) -> None:
    assert_error(shared_server.http.request(method, path), 404, "unknown_url")


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
@pytest.mark.parametrize(
    "headers",
    [
        {f"x-{index}": "a" * 8000 for index in range(5)},
        {"x-long": "a" * 17_000},
        {f"x-{index}": "a" for index in range(101)},
    ],
    ids=["in all", "one line", "number"],
)
def test_large_headers_are_refused(
    shared_server: Server, path: str, headers: dict[str, str]
) -> None:
    response = shared_server.http.get(path, headers=headers)
    assert_error(response, 431, "headers_too_large")
    assert response.headers["connection"] == "close"


def test_ordinary_headers_are_not_large(shared_server: Server) -> None:
    headers = {f"x-{index}": "a" * 300 for index in range(90)}
    assert shared_server.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/jsonp",
        "application/json-patch+json",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "application/x-www-form-urlencoded",
    ],
)
def test_other_content_types_are_refused(shared_server: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = shared_server.http.post(URL, content=json.dumps(chat()), headers=headers)
    assert_error(response, 415, "unsupported_content_type")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'],
)
def test_json_may_say_that_it_is_utf8(shared_server: Server, content_type: str) -> None:
    headers = {"content-type": content_type}
    assert (
        shared_server.http.post(URL, content=json.dumps(chat()), headers=headers).status_code == 200
    )


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "x"])
def test_encoded_bodies_are_refused(shared_server: Server, encoding: str) -> None:
    headers = {"content-encoding": encoding}
    response = shared_server.http.post(URL, json=chat(), headers=headers)
    assert_error(response, 415, "unsupported_content_type")


def test_a_second_encoding_counts_too(shared_server: Server) -> None:
    headers = [("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]
    headers.append(("Content-Type", "application/json"))
    response = shared_server.http.post(URL, content=b"{}", headers=headers)
    assert_error(response, 415, "unsupported_content_type")


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": NaN}', b'{"a":1,"a":2}', b"\xff"])
def test_broken_json(shared_server: Server, body: bytes) -> None:
    response = shared_server.http.post(
        URL, content=body, headers={"content-type": "application/json"}
    )
    param = "model" if b"NaN" in body else None
    assert_error(response, 400, "invalid_json", param=param)


LIMIT = HttpConfig(max_body_bytes=1000)


def test_a_body_may_be_as_long_as_the_limit(serve: Serve) -> None:
    server = serve(http=LIMIT)
    body = json.dumps(chat()).encode()
    for length, status in ((1000, 200), (1001, 413)):
        content = body + b" " * (length - len(body))
        headers = {"content-type": "application/json"}
        response = server.http.post(URL, content=content, headers=headers)
        assert response.status_code == status
        chunked = server.http.post(URL, content=iter([content]), headers=headers)
        assert chunked.status_code == status
        for each in (response, chunked):
            if status == 413:
                assert_error(each, 413, "request_too_large")
                assert each.headers["connection"] == "close"


def test_a_client_that_sends_too_much_still_reads_the_answer(serve: Serve) -> None:
    server = serve(http=LIMIT)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for framing in (b"Content-Length: 5000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head + framing)
            piece = b" " * 100_000
            if b"chunked" in framing:
                piece = b"186a0\r\n" + piece + b"\r\n"
            for _ in range(50):
                connection.sendall(piece)
            if b"chunked" in framing:
                connection.sendall(b"0\r\n\r\n")
            status, headers, body = read_answer(connection)
            assert_error_body(body, headers, status, "request_too_large", param=None)
            assert headers["connection"] == "close"
            assert connection.recv(1) == b""


def test_a_client_that_announces_too_much_is_refused_before_it_sends(serve: Serve) -> None:
    server = serve(http=LIMIT)
    started_s = time.monotonic()
    status, _, _ = raw(
        server,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        b"Content-Type: application/json\r\nContent-Length: 99999999999999999999\r\n\r\n",
    )
    assert status == 413
    assert time.monotonic() - started_s < 1


def test_a_body_that_does_not_arrive_is_not_waited_for(serve: Serve) -> None:
    server = serve(http=HttpConfig(receive_timeout_s=0.3))
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for rest in ("Content-Length: 1000\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        started_s = time.monotonic()
        status, headers, body = raw(server, (head + rest).encode())
        assert time.monotonic() - started_s < 5
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "request_receive_timeout"
    assert server.http.post(URL, json=chat()).status_code == 200


def test_a_slow_answer_is_not_a_slow_body(serve: Serve) -> None:
    server = serve(http=HttpConfig(receive_timeout_s=0.2), preparer=TextPreparer(delay_s=0.6))
    assert server.http.post(URL, json=chat()).status_code == 200


def test_a_refused_sender_still_reads_the_answer(locked: Server) -> None:
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as connection:
        connection.sendall(head.encode())
        for _ in range(300):
            connection.sendall(b"x" * 100_000)
        assert read_answer(connection)[0] == 401


def test_every_answer_has_an_id(shared_server: Server) -> None:
    for path in ("/health", "/v1/models", "/nope"):
        ids = {shared_server.http.get(path).headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2
    for wanted in ("a", "A-b.c_9", "x" * 128):
        answer = shared_server.http.get("/health", headers={"x-request-id": wanted})
        assert answer.headers["x-request-id"] == wanted
    for unwanted in ("", "x" * 129, "a b", "a;b", "é", "a/b"):
        headers = {b"x-request-id": unwanted.encode()}
        answer = shared_server.http.get("/health", headers=headers)
        assert answer.headers["x-request-id"] not in ("", unwanted)


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_says_how_long_it_took_to_begin(serve: Serve, stream: bool) -> None:
    server = serve(preparer=TextPreparer(delay_s=0.3))
    answer = server.http.post(URL, json=chat(stream=stream))
    assert int(answer.headers["openai-processing-ms"]) >= 300
    for path in ("/health", "/v1/models", "/nope"):
        assert server.http.get(path).headers["openai-processing-ms"].isdigit()


def test_a_streams_answer_has_the_id_too(shared_server: Server) -> None:
    headers = {"x-request-id": "mine"}
    response = shared_server.http.post(URL, json=chat(stream=True), headers=headers)
    assert response.headers["x-request-id"] == "mine"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def access_lines(log: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What was logged so far of the requests of a test, whose ids begin with "logged"."""
    lines = [json.loads(each.getMessage()) for each in log.records if each.name == "server.access"]
    return [line for line in lines if line["request_id"].startswith("logged")]


def test_one_line_is_logged_for_each_request(serve: Serve, log: pytest.LogCaptureFixture) -> None:
    server = serve(http=WITH_KEYS)
    headers = bearer(KEYS["bob"]) | {b"x-request-id": b"logged-1"}
    server.http.post(URL + "?secret=canary1", json=chat("canary2", user="canary3"), headers=headers)
    server.http.get("/health")
    server.http.get("/ready")
    headers = {b"x-request-id": b"logged-2"}
    server.http.get("/no%E2%80%A8%0A%1B[31m" + "x" * 500, headers=headers)
    until(lambda: len(access_lines(log)) == 2)
    first, second = access_lines(log)
    assert first.pop("duration_ms") > 0
    assert first == {
        "event": "request",
        "request_id": "logged-1",
        "tenant": "bob",
        "method": "POST",
        "path": URL,
        "status": 200,
    }
    assert (second["status"], second["tenant"], len(second["path"])) == (401, "", 128)
    written = "".join(each.getMessage() for each in log.records if each.name.startswith("server"))
    assert written.isascii() and written.isprintable()
    digests = [key.sha256 for key in WITH_KEYS.api_keys.values()]
    for secret in ("canary", *KEYS.values(), *digests):
        assert secret not in written


def test_fields_nobody_knows_are_counted_in_the_log(
    serve: Serve, log: pytest.LogCaptureFixture
) -> None:
    server = serve()
    headers = {"x-request-id": "logged"}
    assert server.http.post(URL, json=chat(frob=1, flux=2), headers=headers).status_code == 200
    until(lambda: access_lines(log))
    assert access_lines(log)[0]["num_unknown_parameters"] == 2
    strict = serve(http=HttpConfig(strict=True))
    answer = strict.http.post(URL, json=chat(frob=1))
    assert_error(answer, 400, "unknown_parameter", param="frob")


def test_a_fault_of_ours_is_logged_and_not_told(
    serve: Serve, log: pytest.LogCaptureFixture
) -> None:
    server = serve(preparer=TextPreparer(error=ZeroDivisionError("canary")))
    answer = server.http.post(URL, json=chat())
    assert_error(answer, 500, "internal_error")
    assert "canary" not in answer.text
    failure = next(each for each in log.records if each.name == "server.api.middleware")
    assert failure.exc_info is not None and failure.exc_info[0] is ZeroDivisionError
    assert server.http.get("/health").status_code == 200


def test_websockets_are_refused(locked: Server) -> None:
    request = (
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    status, _, _ = raw(locked, request)
    assert status == 401


async def test_a_websocket_scope_is_closed_at_once(locked: Server) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is to be received")

    await locked.app({"type": "websocket", "path": "/health", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_big_bodies_do_not_hold_up_the_others(shared_server: Server) -> None:
    """Parsing happens in a thread, so the health of the server is told meanwhile."""
    body = json.dumps(chat(documents=[], frob=[["x" * 10] * 10] * 60_000)).encode()
    slowest_s = 0.0
    answers: list[httpx.Response] = []

    def post() -> None:
        headers = {"content-type": "application/json"}
        answers.append(
            httpx.post(shared_server.url + URL, content=body, headers=headers, timeout=60)
        )

    posting = threading.Thread(target=post)
    posting.start()
    while posting.is_alive():
        started_s = time.monotonic()
        assert shared_server.http.get("/health").status_code == 200
        slowest_s = max(slowest_s, time.monotonic() - started_s)
        time.sleep(0.01)
    assert answers[0].status_code == 200, answers[0].text
    assert slowest_s < 0.5
