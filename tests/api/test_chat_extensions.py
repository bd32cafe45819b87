"""Answers that go on with the last message, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from server.chat.prepare import Preparer
from tests.conftest import MODEL, Server, assert_error, running
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"
DRY = f"{URL}?dry_run=true"
HEAD = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server(build: Callable[..., FastAPI], preparer: Preparer) -> Iterator[Server]:
    """Whose engine goes on with " circle"."""
    end = preparer.facts.stop_token_ids[0]
    engine = FakeEngine([*preparer.tokenizer.encode_text(" circle"), end])
    with running(build(engine=engine, preparer=preparer)) as served:
        yield served


def body(said: Any = "A red", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": said}]
    return {"model": MODEL, "messages": messages, "temperature": 0, **fields}


def contents(server: Server, **fields: Any) -> list[str]:
    response = server.http.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def streamed(server: Server, **fields: Any) -> dict[int, list[dict[str, Any]]]:
    """The deltas of each choice."""
    response = server.http.post(URL, json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    frames = response.text.split("\n\n")[:-2]
    deltas: dict[int, list[dict[str, Any]]] = {}
    for frame in frames:
        for choice in json.loads(frame.removeprefix("data: "))["choices"]:
            deltas.setdefault(choice["index"], []).append(choice["delta"])
    return deltas


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, f"{HEAD}A red<|im_end|><|endofturn|>\n{HEAD}"),
        ({"add_generation_prompt": True}, f"{HEAD}A red<|im_end|><|endofturn|>\n{HEAD}"),
        ({"add_generation_prompt": False}, f"{HEAD}A red<|im_end|><|endofturn|>\n"),
        ({"continue_final_message": True}, f"{HEAD}A red"),
        ({"continue_final_message": True, "add_generation_prompt": False}, f"{HEAD}A red"),
        ({"continue_final_message": True, "said": "<|im_end|> "}, f"{HEAD}<|im_end|> "),
    ],
)
def test_where_a_prompt_ends(server: Server, fields: dict[str, Any], end: str) -> None:
    told = server.http.post(DRY, json=body(**fields)).json()
    assert told["prompt"].endswith(end)
    server.engine.submitted.clear()
    contents(server, **fields)
    ((request, _),) = server.engine.submitted
    assert len(request.prompt_ids) == told["usage"]["prompt_tokens"]
    counted = body(**fields)
    del counted["temperature"]
    tokens = server.http.post("/tokenize", json=counted).json()["tokens"]
    assert tokens == list(request.prompt_ids)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_an_answer_may_begin_with_what_it_continues(server: Server, num_choices: int) -> None:
    fields = {"continue_final_message": True, "n": num_choices}
    assert contents(server, **fields) == [" circle"] * num_choices
    assert contents(server, **fields, echo=True) == ["A red circle"] * num_choices
    deltas = streamed(server, **fields, echo=True)
    assert sorted(deltas) == list(range(num_choices))
    for own in deltas.values():
        assert own[:2] == [{"role": "assistant", "content": ""}, {"content": "A red"}]
        assert "".join(delta.get("content", "") for delta in own) == "A red circle"
    silent = streamed(server, **fields, echo=False)[0]
    assert "".join(delta.get("content", "") for delta in silent) == " circle"


def test_an_echo_is_no_part_of_what_was_generated(server: Server) -> None:
    fields = {"continue_final_message": True, "logprobs": True, "stop": ["red"]}
    answers = [
        server.http.post(URL, json=body(**fields, echo=echo)).json() for echo in (True, False)
    ]
    assert answers[0]["usage"] == answers[1]["usage"]
    (echoing,), (silent,) = (answer["choices"] for answer in answers)
    assert echoing["message"]["content"] == "A red circle"
    assert echoing["logprobs"] == silent["logprobs"]
    told = b"".join(bytes(token["bytes"]) for token in echoing["logprobs"]["content"])
    assert told == b" circle"


def test_parts_are_echoed_in_lines(server: Server) -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "red"}]
    fields = {"continue_final_message": True, "echo": True}
    assert contents(server, said=parts, **fields) == ["A\nred circle"]


def test_refusals(server: Server) -> None:
    both = body(continue_final_message=True, add_generation_prompt=True)
    of_user = {"messages": [{"role": "user", "content": "hi"}]}
    nothing = body(said=[], continue_final_message=True)
    for url in (URL, DRY):
        for asked, code, param in (
            (both, "invalid_value", "continue_final_message"),
            (nothing, "invalid_prompt", "continue_final_message"),
            (body(echo=True) | of_user, "invalid_value", "echo"),
            (body(cache_salt=""), "invalid_value", "cache_salt"),
        ):
            assert_error(server.http.post(url, json=asked), 400, code, param=param)


def test_a_salt_goes_to_the_engine(server: Server) -> None:
    server.engine.submitted.clear()
    contents(server, cache_salt="가")
    contents(server)
    completion = {"model": MODEL, "prompt": "a", "cache_salt": "b"}
    assert server.http.post("/v1/completions", json=completion).status_code == 200
    salts = [request.cache_salt for request, _ in server.engine.submitted]
    assert salts == ["가", "", "b"]
