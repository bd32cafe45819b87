from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx

from server.app import drain
from server.config import HttpConfig
from server.errors import CheckpointError
from tests.conftest import END, Serve, assert_error, chat, until
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"


class SlowEngine(FakeEngine):
    """Loads until it is told how that went."""

    def __init__(self) -> None:
        super().__init__([*b"hello", END], status="loading", facts=None)
        self.loaded = asyncio.Event()
        self.failure: Exception | None = None

    async def start(self) -> None:
        await self.loaded.wait()
        if self.failure is not None:
            raise self.failure
        self.status = "ready"


def test_the_server_answers_while_the_model_loads(serve: Serve) -> None:
    server = serve(engine=SlowEngine())
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/v1/models").status_code == 200
    for response in (server.http.get("/ready"), server.http.post(URL, json=chat())):
        assert_error(response, 503, "model_loading")
    server.call(server.engine.loaded.set)
    until(lambda: server.http.get("/ready").status_code == 200)
    assert server.http.post(URL, json=chat()).status_code == 200


def test_a_model_that_cannot_be_loaded_is_reported(serve: Serve) -> None:
    failures: list[Exception] = []
    server = serve(engine=SlowEngine(), on_load_failure=failures.append)
    server.engine.failure = CheckpointError("no weights")
    server.call(server.engine.loaded.set)
    until(lambda: failures)
    assert failures == [server.engine.failure]
    assert_error(server.http.get("/ready"), 503, "model_loading")


def test_the_engine_stops_with_the_application(serve: Serve) -> None:
    server = serve()
    server.uvicorn.should_exit = True
    until(lambda: server.engine.status == "stopping")


def test_the_engine_stops_even_if_it_never_finished_loading(serve: Serve) -> None:
    server = serve(engine=SlowEngine())
    server.uvicorn.should_exit = True
    until(lambda: server.engine.status == "stopping")


def in_background(work: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[str]]:
    """A thread that does the work, and where the text of its response will be."""
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(work().text))
    thread.start()
    return thread, texts


def test_a_drain_refuses_what_is_new_and_finishes_what_runs(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    server = serve(engine=FakeEngine([*b"hello", END], gate=gate))
    thread, texts = in_background(
        lambda: httpx.post(server.url + URL, json=chat(stream=True), timeout=20)
    )
    until(lambda: server.engine.submitted)
    draining = asyncio.run_coroutine_threadsafe(drain(server.app), server.loop)
    until(lambda: server.http.get("/ready").status_code == 503)
    refused = server.http.post(URL, json=chat())
    assert_error(refused, 503, "shutting_down")
    assert refused.headers["connection"] == "close"
    assert server.http.get("/health").status_code == 200
    assert not draining.done()
    for _ in range(6):
        server.call(gate.release)
    thread.join(10)
    draining.result(10)
    assert texts[0].endswith("data: [DONE]\n\n")
    assert '"finish_reason":"stop"' in texts[0]
    assert "error" not in texts[0]
    assert server.engine.status == "ready"


def test_what_still_runs_after_the_drain_time_is_told(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    engine = FakeEngine([*b"hello", END], gate=gate)
    server = serve(engine=engine, http=HttpConfig(drain_timeout_s=1))
    streamed, streamed_texts = in_background(
        lambda: httpx.post(server.url + URL, json=chat(stream=True), timeout=20)
    )
    until(lambda: gate.locked())
    whole, whole_texts = in_background(
        lambda: httpx.post(server.url + URL, json=chat(), timeout=20)
    )
    until(lambda: len(engine.submitted) == 2)
    asyncio.run_coroutine_threadsafe(drain(server.app), server.loop).result(10)
    streamed.join(10)
    whole.join(10)
    assert '"code":"shutting_down"' in streamed_texts[0]
    assert streamed_texts[0].endswith("data: [DONE]\n\n")
    assert '"code":"shutting_down"' in whole_texts[0]


def test_a_drain_of_an_idle_server_takes_no_time(serve: Serve) -> None:
    server = serve()
    server.http.post(URL, json=chat())
    asyncio.run_coroutine_threadsafe(drain(server.app), server.loop).result(1)
