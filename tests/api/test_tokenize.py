from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.chat.prepare import Preparer
from server.config import HttpConfig
from tests.api.demo import CONTEXT, demo_preparer
from tests.conftest import MODEL, Server, assert_error, running, until
from tests.fakes import FAKE_FACTS


@pytest.fixture(scope="module")
def server(build: Callable[..., FastAPI], preparer: Preparer) -> Iterator[Server]:
    with running(build(preparer=preparer)) as served:
        yield served


def tokenize(server: Server, **body: Any) -> Any:
    response = server.http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_becomes_its_ids(server: Server, preparer: Preparer) -> None:
    text = "A red circle, 빨간 원 <|im_end|>"
    ids = preparer.tokenizer.encode_text(text)
    expected = {"count": len(ids), "max_model_len": FAKE_FACTS.max_request_tokens, "tokens": ids}
    assert tokenize(server, model=MODEL, prompt=text) == expected
    assert tokenize(server, prompt=text, add_special_tokens=False, model=None) == expected
    assert not preparer.tokenizer.special_ids & set(ids)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=60))
def test_text_survives_the_way_there_and_back(server: Server, text: str) -> None:
    tokens = tokenize(server, prompt=text)["tokens"]
    response = server.http.post("/detokenize", json={"model": MODEL, "tokens": tokens})
    assert response.json() == {"prompt": text}


def test_a_conversation_is_counted_as_its_prompt(server: Server) -> None:
    messages = [{"role": "user", "content": "안녕 <|endofturn|>"}]
    counted = tokenize(server, model=MODEL, messages=messages)
    again = tokenize(server, messages=messages, add_generation_prompt=True)
    assert counted == again
    assert counted["count"] == len(counted["tokens"])
    tail = server.http.post("/detokenize", json={"tokens": counted["tokens"]}).json()["prompt"]
    assert "안녕 <|endofturn|>" in tail
    assert tail.endswith("assistant\n")


def test_special_tokens_are_no_text(server: Server, preparer: Preparer) -> None:
    special = list(preparer.tokenizer.special.values())
    ids = [*special, *preparer.tokenizer.encode_text("x"), *special]
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "x"}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_what_there_is_to_know_of_the_tokenizer(server: Server, preparer: Preparer) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert info["vocab_size"] == preparer.tokenizer.size
    assert info["special_tokens"] == preparer.tokenizer.special
    assert info["eos_token"] == "<|endofturn|>"
    assert info["special_tokens"][info["bos_token"]] == 0
    assert info["max_model_len"] == FAKE_FACTS.max_request_tokens
    size = info["vocab_size"]
    assert server.http.post("/detokenize", json={"tokens": [size - 1]}).status_code == 200


def test_a_text_longer_than_the_context_is_still_counted(server: Server) -> None:
    assert tokenize(server, prompt="a1" * CONTEXT)["count"] > CONTEXT


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "missing_required_parameter", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "missing_required_parameter", "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "invalid_type", "prompt"),
        (
            "/tokenize",
            {"prompt": "a", "add_special_tokens": 1},
            "invalid_type",
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "a" * (16 * CONTEXT + 1)}, "context_length_exceeded", "prompt"),
        (
            "/tokenize",
            {"prompt": "h", "chat_template": "x"},
            "unsupported_parameter",
            "chat_template",
        ),
        ("/tokenize", {"prompt": "a", "model": 1}, "invalid_type", "model"),
        ("/tokenize", {"messages": []}, "invalid_value", "messages"),
        ("/tokenize", {"messages": "hi"}, "invalid_type", "messages"),
        (
            "/tokenize",
            {
                "messages": [{"role": "user", "content": "a"}],
                "media_options": {"x": 1},
            },
            "unknown_parameter",
            "media_options.x",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [PICTURE]}], "continue_final_message": True},
            "invalid_prompt",
            "continue_final_message",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "unsupported_parameter",
            "add_special_tokens",
        ),
        (
            "/tokenize",
            {"prompt": "a", "add_generation_prompt": True},
            "unsupported_parameter",
            "add_generation_prompt",
        ),
        (
            "/tokenize",
            {
                "messages": [{"role": "user", "content": "a"}],
                "add_generation_prompt": True,
                "continue_final_message": True,
            },
            "invalid_value",
            "continue_final_message",
        ),
        (
            "/tokenize",
            {"prompt": "a", "continue_final_message": False},
            "unsupported_parameter",
            "continue_final_message",
        ),
        (
            "/tokenize",
            {"prompt": "a", "media_options": {}},
            "unsupported_parameter",
            "media_options",
        ),
        ("/detokenize", {}, "missing_required_parameter", "tokens"),
        ("/detokenize", {"tokens": "1"}, "invalid_type", "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, "invalid_type", "tokens[1]"),
        ("/detokenize", {"tokens": [1, True]}, "invalid_type", "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "invalid_value", "tokens[1]"),
        ("/detokenize", {"tokens": [2**40]}, "invalid_value", "tokens[0]"),
    ],
)
def test_refusals(server: Server, path: str, body: dict[str, Any], code: str, param: str) -> None:
    assert_error(server.http.post(path, json=body), 400, code, param=param)


def test_only_so_many_prompts_wait_to_be_encoded(
    build: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.chat.prepare.MAX_ENCODES_WAITING", 1)
    begun, gate = threading.Event(), threading.Event()
    preparer = demo_preparer()
    encode = preparer.tokenizer.encode_prompt

    def slowly(text: str) -> list[int]:
        begun.set()
        assert gate.wait(10)
        return encode(text)

    preparer.tokenizer.encode_prompt = slowly  # type: ignore[method-assign]
    with running(build(preparer=preparer)) as server, ThreadPoolExecutor(2) as clients:
        url, body = f"{server.url}/tokenize", {"prompt": "a"}
        answers = [clients.submit(httpx.post, url, json=body, timeout=20) for _ in range(2)]
        assert begun.wait(10)
        until(lambda: server.app.state.lifecycle.num_running == 2)
        try:
            refused = server.http.post("/tokenize", json=body)
        finally:
            gate.set()
        assert_error(refused, 503, "server_is_overloaded")
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert server.http.post("/tokenize", json=body).status_code == 200
    preparer.close()


def test_one_key_s_prompts_make_room_for_another_s(
    build: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.chat.prepare.MAX_ENCODES_WAITING", 2)
    begun, gate = threading.Event(), threading.Event()
    preparer = demo_preparer()
    encode = preparer.tokenizer.encode_prompt

    def slowly(text: str) -> list[int]:
        begun.set()
        assert gate.wait(10)
        return encode(text)

    preparer.tokenizer.encode_prompt = slowly  # type: ignore[method-assign]
    http = HttpConfig(api_keys={key: sha256(key.encode()).hexdigest() for key in ("busy", "calm")})
    with running(build(preparer=preparer, http=http)) as server, ThreadPoolExecutor(4) as clients:

        def send(key: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            url, body = f"{server.url}/tokenize", {"prompt": "a"}
            return httpx.post(url, json=body, headers=headers, timeout=20)

        busy = [clients.submit(send, "busy") for _ in range(3)]
        assert begun.wait(10)
        until(lambda: server.app.state.lifecycle.num_running == 3)
        calm = clients.submit(send, "calm")
        try:
            until(lambda: any(answer.done() for answer in busy))
        finally:
            gate.set()
        assert calm.result().status_code == 200
        refused = [answer.result() for answer in busy if answer.result().status_code != 200]
        assert len(refused) == 1
        assert_error(refused[0], 429, "rate_limit_exceeded")
    preparer.close()


def test_another_model_is_not_found(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
        response = server.http.post(path, json=body | {"model": "gpt-4o"})
        assert_error(response, 404, "model_not_found", param="model")


def test_what_nobody_knows_is_counted_and_what_generates_nothing_has_no_dry_run(
    server: Server,
) -> None:
    assert server.http.post("/tokenize", json={"prompt": "h", "x": 1}).status_code == 200
    assert server.http.post("/detokenize", json={"tokens": [1], "x": 1}).status_code == 200
    for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/responses"):
        response = server.http.post(f"{path}?dry_run=true", json={})
        assert_error(response, 400, "unsupported_parameter", param="dry_run")
