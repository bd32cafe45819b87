"""A request that is not answered: what is told of it, and that nothing happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.chat.prepare import Preparer
from tests.api.demo import CONTEXT, demo_preparer
from tests.conftest import MODEL, Serve, Server, assert_error

URL = "/v1/chat/completions?dry_run=true"


@pytest.fixture
def preparer() -> Iterator[Preparer]:
    prepared = demo_preparer()
    yield prepared
    prepared.close()


@pytest.fixture
def server(serve: Serve, preparer: Preparer) -> Server:
    served = serve(preparer=preparer)
    served.app.state.preparer.tokenizer = demo_preparer().tokenizer
    return served


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "안녕 <|im_end|>"}]
    return {"model": MODEL, "messages": messages, **fields}


def test_the_prompt_its_tokens_and_the_values_that_hold(server: Server) -> None:
    fields = {"temperature": 0.25, "max_tokens": 7, "stop": ["x"], "n": 2, "logit_bias": {"5": 1}}
    response = server.http.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    told = response.json()
    assert told["object"] == "chat.completion.dry_run"
    assert "<|im_start|>user\n안녕 <|im_end|><|im_end|>" in told["prompt"]
    assert told["prompt"].endswith("<|im_start|>assistant\n")
    tokens = told["usage"]["prompt_tokens"]
    assert told["usage"]["prompt_tokens_details"]["text_tokens"] == tokens > 10
    assert told["usage"]["media"] == []
    assert told["context"]["left_tokens"] == told["context"]["max_model_len"] - tokens
    sampling = told["sampling"]
    assert (sampling["temperature"], sampling["max_tokens"]) == (0.25, 7)
    assert sampling["top_p"] == 1.0
    assert sampling["logit_bias"] == {"5": 1.0}
    assert (told["n"], told["stop"]) == (2, ["x"])
    assert server.engine.submitted == []


def test_a_stream_is_told_at_once(server: Server) -> None:
    assert server.http.post(URL, json=body(stream=True)).json()["n"] == 1


def test_what_would_be_refused_is_refused(server: Server) -> None:
    long = body() | {"messages": [{"role": "user", "content": "x " * CONTEXT}]}
    assert_error(server.http.post(URL, json=long), 400, "context_length_exceeded", param="messages")
    assert_error(server.http.post(URL, json=body(n=99)), 400, "invalid_value", param="n")


@pytest.mark.parametrize("value", ["", "1", "True", "yes"])
def test_it_is_true_or_false(server: Server, value: str) -> None:
    url = f"/v1/chat/completions?dry_run={value}"
    assert_error(server.http.post(url, json=body()), 400, "invalid_value", param="dry_run")
    answered = server.http.post("/v1/chat/completions?dry_run=false", json=body())
    assert answered.json()["object"] == "chat.completion"
