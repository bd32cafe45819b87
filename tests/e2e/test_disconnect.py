"""Clients that leave, over real sockets, at every stage of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import END, Serve, Server, TextPreparer, chat, until
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"


def connected(server: Server, body: dict[str, Any], *, sent: float = 1.0) -> socket.socket:
    """A connection on which a part of a chat request was sent."""
    content = json.dumps(body).encode()
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(head.encode() + content[: round(len(content) * sent)])
    return connection


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


Leave = Callable[[socket.socket], None]
LEAVES = pytest.mark.parametrize("leave", [close, reset, half_close])
STREAMS = pytest.mark.parametrize("stream", [True, False])


def gated(num_tokens: int) -> FakeEngine:
    """An engine that stops for ever after some tokens."""
    return FakeEngine([*b"hello", END], gate=asyncio.Semaphore(num_tokens))


@LEAVES
@STREAMS
@pytest.mark.parametrize("num_tokens", [0, 2], ids=["waiting", "answering"])
def test_a_client_that_leaves_while_the_engine_works_frees_it(
    serve: Serve, leave: Leave, stream: bool, num_tokens: int
) -> None:
    server = serve(engine=gated(num_tokens))
    with connected(server, chat(stream=stream)) as connection:
        until(lambda: server.engine.running)
        if stream and num_tokens:
            assert b"hello"[:1] in connection.recv(65536)
        leave(connection)
        assert until(lambda: server.engine.aborted) < 1
    assert not server.engine.running
    assert len(server.engine.aborted) == 1


@LEAVES
@STREAMS
def test_a_client_that_leaves_while_its_request_is_prepared(
    serve: Serve, leave: Leave, stream: bool
) -> None:
    server = serve(preparer=TextPreparer(delay_s=60))
    with connected(server, chat(stream=stream)) as connection:
        until(lambda: server.preparer.requests)
        leave(connection)
        assert until(lambda: server.preparer.cancelled) < 1
    assert not server.engine.submitted


@LEAVES
def test_a_client_that_leaves_while_it_sends(
    serve: Serve, leave: Leave, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = serve()
    with connected(server, chat(), sent=0.5) as connection:
        until(lambda: server.app.state.lifecycle.num_running == 1)
        leave(connection)
        assert until(lambda: server.app.state.lifecycle.num_running == 0) < 1
    assert not server.preparer.requests
    assert logged_status(caplog) == 499


def logged_status(caplog: pytest.LogCaptureFixture) -> int:
    lines = [each.getMessage() for each in caplog.records if each.name == "server.access"]
    (line,) = (json.loads(line) for line in lines if '"gone"' in line)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    return int(line["status"])


@STREAMS
def test_a_client_that_left_is_logged_as_such(
    serve: Serve, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = serve(engine=gated(2))
    with connected(server, chat(stream=stream)):
        until(lambda: server.engine.running)
    until(lambda: server.app.state.lifecycle.num_running == 0)
    assert logged_status(caplog) == 499


def test_many_clients_that_leave_leave_nothing_behind(serve: Serve) -> None:
    server = serve(engine=gated(0))
    for index in range(40):
        with connected(server, chat(stream=index % 2 == 0)) as connection:
            if index % 4:  # the others leave whenever it happens to be
                until(lambda: server.engine.running)
            leave = (close, reset, half_close)[index % 3]
            leave(connection)
            until(lambda: server.app.state.lifecycle.num_running == 0)
    assert not server.engine.running
    assert len(server.engine.aborted) == len(server.engine.submitted) >= 30


def test_the_neighbours_of_a_client_that_leaves_get_their_answer(serve: Serve) -> None:
    server = serve(engine=FakeEngine(lambda request, choice: [*bytes(request.prompt_ids), END]))
    with connected(server, chat("a", stream=True)):
        pass
    response = server.http.post(URL, json=chat("echo"))
    assert response.json()["choices"][0]["message"]["content"] == "echo"
