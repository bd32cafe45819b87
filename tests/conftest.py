"""Servers on port 0: the real application over stand-ins, run by uvicorn as in production."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from server.api.models import ServedModel
from server.app import build_app
from server.chat.prepare import ChatRequest, Prepared, PromptUsage
from server.chat.tokenizer import Tokenizer, byte_symbols
from server.config import HttpConfig, MediaConfig
from server.core import GenerationRequest, SamplingParams
from server.grammar.prover import Prover
from server.media.store import FileStore
from server.telemetry.metrics import Metrics
from tests.fakes import FakeEngine

Result = TypeVar("Result")

MODEL = "fakes/tiny"
END = 256
"""The one special id of the byte tokenizer: the end of an answer."""


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, and `<|end|>`."""
    description = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": END,
                "content": "<|end|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": byte_symbols(),
            "merges": [],
        },
    }
    return Tokenizer(json.dumps(description))


class TextPreparer:
    """Stands in for `Preparer`: the prompt is the text of the last message, a token a byte.

    It waits `delay_s` before it answers, and raises `error` where there is one.
    """

    def __init__(self, *, delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.tokenizer: Tokenizer | None = None
        self.delay_s = delay_s
        self.error = error
        self.requests: list[ChatRequest] = []
        self.cancelled = 0

    async def prepare(
        self, request: ChatRequest, *, request_id: str, tenant: str, attachments: object = None
    ) -> Prepared:
        self.requests.append(request)
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        text: Any = request.prompt.content if request.prompt else request.messages[-1]["content"]  # type: ignore[index]
        ids = tuple(text.encode())
        sampling = SamplingParams(
            max_tokens=request.max_tokens or 1000,
            temperature=1.0 if request.temperature is None else request.temperature,
            stop_token_ids=() if request.ignore_eos else (END,),
            num_logprobs=request.num_logprobs,
        )
        return Prepared(
            request=GenerationRequest(
                request_id,
                tenant,
                ids,
                sampling,
                num_choices=request.num_choices,
                priority=request.priority,
            ),
            tiles=(),
            stop=request.stop,
            usage=PromptUsage(text_tokens=len(ids), image_tokens=0, video_tokens=0),
        )


class Server:
    """A running server, and the parts it was built from."""

    def __init__(self, app: FastAPI, uvicorn_server: uvicorn.Server, port: int) -> None:
        self.app = app
        self.engine: Any = app.state.engine
        self.preparer: Any = app.state.preparer
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.uvicorn = uvicorn_server
        self.loop: asyncio.AbstractEventLoop = app.state.test_loop

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` in the server's event loop."""
        self.loop.call_soon_threadsafe(function)

    def wait_for(self, work: Awaitable[Result], *, timeout_s: float = 10) -> Result:
        """The result of a coroutine run in the server's event loop."""

        async def awaited() -> Result:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(timeout_s)


def until(condition: Callable[[], object], *, timeout_s: float = 5.0) -> float:
    """Wait until `condition` holds; how long that took, in seconds."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, "the condition never came true"
        time.sleep(0.005)
    return time.monotonic() - started_s


@contextlib.contextmanager
def running(app: FastAPI, *, timeout_s: float = 10) -> Iterator[Server]:
    """The application behind uvicorn on a free port, in a thread of its own."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        app.state.test_loop = asyncio.get_running_loop()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), timeout_s=timeout_s)
    assert server.started, "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    served = Server(app, server, port)
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server did not stop"


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def build(byte_tokenizer: Tokenizer) -> Callable[..., FastAPI]:
    """Make an application: `build(engine=..., preparer=..., http=...)`, all of it optional."""

    def built(
        *,
        engine: Any = None,
        preparer: Any = None,
        http: HttpConfig | None = None,
        on_load_failure: Callable[[Exception], None] = lambda error: None,
        model: ServedModel | None = None,
        media: MediaConfig | None = None,
        files: FileStore | None = None,
        prover: Prover | None = None,
    ) -> FastAPI:
        preparer = preparer or TextPreparer()
        if preparer.tokenizer is None:
            preparer.tokenizer = byte_tokenizer
        return build_app(
            http or HttpConfig(),
            engine or FakeEngine([*b"hello", END]),
            preparer,
            model or ServedModel(MODEL, context_length=4096, created_s=1_700_000_000),
            metrics=Metrics(),
            on_load_failure=on_load_failure,
            media=media,
            files=files,
            prover=prover,
        )

    return built


@pytest.fixture
def serve(build: Callable[..., FastAPI]) -> Iterator[Serve]:
    """Start a server with the arguments of `build`."""
    with contextlib.ExitStack() as servers:
        yield lambda **parts: servers.enter_context(running(build(**parts)))


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server of one's own, whose engine answers "hello"."""
    return serve()


@pytest.fixture(scope="session")
def shared_server(build: Callable[..., FastAPI]) -> Iterator[Server]:
    """The same for tests that leave it as it was, so that they need not wait for one."""
    with running(build()) as served:
        yield served


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """The body of a chat request with one user message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def assert_error(
    response: httpx.Response, status: int, code: str, *, param: str | None = None
) -> dict[str, Any]:
    """The response is the contract's error, in every detail; its inner object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.headers["x-request-id"]
    if response.request.method == "HEAD":
        return {}
    return assert_error_body(response.content, response.headers, status, code, param=param)


TYPES = {
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "server_error",
    507: "server_error",
}


def assert_error_body(
    content: bytes, headers: Any, status: int, code: str, *, param: str | None
) -> dict[str, Any]:
    assert len(content) <= 4096
    body = json.loads(content.decode("utf-8"))
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert isinstance(error["message"], str) and error["message"]
    for leak in ("Traceback", "0x7", "site-packages", "/home", ".py", "pydantic", "Error("):
        assert leak not in error["message"]
    if status in (429, 503):
        assert 1 <= int(headers["retry-after"]) <= 60
        assert headers["x-should-retry"] in ("true", "false")
    return error
