from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params

from server.api.schemas import (
    COMPLETION_UNSUPPORTED,
    SHARED_FIELDS,
    CompletionFields,
    parse_completion_request,
)
from server.chat.prepare import Preparer
from server.core import GenerationRequest
from server.errors import InvalidRequest, RateLimited, Unavailable
from tests.api.demo import CONTEXT, demo_preparer
from tests.api.test_chat import events_of
from tests.conftest import MODEL, Serve, Server, assert_error, running, until
from tests.fakes import FakeEngine

URL = "/v1/completions"
LEAST: dict[str, Any] = {"model": MODEL, "prompt": "x"}


@pytest.fixture(scope="module")
def preparer() -> Iterator[Preparer]:
    prepared = demo_preparer()
    yield prepared
    prepared.close()


def ids_of(preparer: Preparer, text: str) -> list[int]:
    return preparer.tokenizer.encode_text(text)


@pytest.fixture(scope="module")
def end(preparer: Preparer) -> int:
    return preparer.tokenizer.special["<|endofturn|>"]


def echoing(preparer: Preparer, end: int) -> Callable[[GenerationRequest, int], list[int]]:
    """Answers that tell whose they are: the prompt's last id, the choice as a digit, an end."""

    def answer(request: GenerationRequest, choice: int) -> list[int]:
        return [request.prompt_ids[-1], *ids_of(preparer, str(choice)), end]

    return answer


@pytest.fixture(scope="module")
def server(build: Callable[..., FastAPI], preparer: Preparer, end: int) -> Iterator[Server]:
    engine = FakeEngine(echoing(preparer, end))
    with running(build(engine=engine, preparer=preparer)) as served:
        yield served


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20
    ) as made:
        yield made


def post(server: Server, **fields: Any) -> Any:
    response = server.http.post(URL, json=LEAST | fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_is_answered_as_it_stands(
    client: openai.OpenAI, server: Server, preparer: Preparer
) -> None:
    completion = client.completions.create(model=MODEL, prompt="One, two <|im_end|>", seed=3)
    request, tiles = server.engine.submitted[-1]
    assert list(request.prompt_ids) == ids_of(preparer, "One, two <|im_end|>")
    assert not preparer.tokenizer.special_ids & set(request.prompt_ids)
    assert tiles == ()
    assert request.sampling.max_tokens == 16
    assert request.sampling.seed == 3
    assert request.sampling.num_logprobs is request.sampling.num_prompt_logprobs is None
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (
        0,
        ">0",
        "stop",
        None,
    )
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(request.prompt_ids)
    assert completion.usage.completion_tokens == 3


def test_all_four_forms_of_a_prompt(server: Server, preparer: Preparer) -> None:
    first, second = ids_of(preparer, "a red circle"), ids_of(preparer, "two squares")
    for prompt, expected in (
        ("a red circle", [first]),
        (["a red circle", "two squares"], [first, second]),
        (first, [first]),
        ([float(each) for each in first], [first]),
        ([first, second], [first, second]),
    ):
        before = len(server.engine.submitted)
        post(server, prompt=prompt)
        requests = [request for request, _ in server.engine.submitted[before:]]
        assert [list(request.prompt_ids) for request in requests] == expected
        assert len({request.request_id for request in requests}) == len(expected)


def test_choices_are_numbered_prompt_by_prompt(
    client: openai.OpenAI, server: Server, preparer: Preparer
) -> None:
    prompts = ["x a", "x b", "x c"]
    whole = client.completions.create(model=MODEL, prompt=prompts, n=2)
    texts = ["a0", "a1", "b0", "b1", "c0", "c1"]
    shown = [choice.text.strip() for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert shown == texts
    assert whole.usage is not None
    lengths = [len(ids_of(preparer, prompt)) for prompt in prompts]
    assert whole.usage.prompt_tokens == sum(lengths)
    assert whole.usage.completion_tokens == 6 * 3

    streamed = dict.fromkeys(range(6), "")
    ends: dict[int, str] = {}
    *chunks, last = client.completions.create(
        model=MODEL, prompt=prompts, n=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in ends
        streamed[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert [streamed[index].strip() for index in range(6)] == texts
    assert set(ends.values()) == {"stop"} and len(ends) == 6
    assert last.choices == [] and last.usage == whole.usage


def test_the_echo_comes_before_the_answer(server: Server, preparer: Preparer) -> None:
    text = "빨간 원 <|im_start|> x"
    for prompt in (text, ids_of(preparer, text)):
        (choice,) = post(server, prompt=prompt, echo=True)["choices"]
        assert choice["text"] == f"{text}x0"
        events = events_of(
            server.http.post(URL, json=LEAST | {"prompt": prompt, "echo": True, "stream": True})
        )
        pieces = [event["choices"][0] for event in events]
        assert pieces[0]["text"].startswith(text)
        assert "".join(piece["text"] for piece in pieces) == f"{text}x0"


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_log_probabilities_in_their_older_form(
    server: Server, preparer: Preparer, end: int, num_top: int
) -> None:
    """The token that ends an answer is told too: whoever drops the last one counts on it."""
    tokenizer = preparer.tokenizer
    ids = ids_of(preparer, "원 a")
    (choice,) = post(server, prompt="원 a", echo=True, logprobs=num_top)["choices"]
    told = choice["logprobs"]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    all_ids = [*ids, ids[-1], *ids_of(preparer, "0"), end]
    assert told["token_logprobs"] == [None, *(-each / 100 for each in all_ids[1:])]
    assert told["top_logprobs"][0] is None
    assert told["tokens"][-1] == "<|endofturn|>"
    assert told["text_offset"][-1] == len(choice["text"])
    for token, logprob, top in list(
        zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    )[1:]:
        assert token in top  # the token itself is always among them
        assert 1 <= len(top) <= num_top + 1
        assert num_top or top == {token: logprob}
    for token_id, token, offset in list(
        zip(all_ids, told["tokens"], told["text_offset"], strict=True)
    )[:-1]:
        raw = tokenizer.token_bytes(token_id)
        if token.startswith("bytes:"):
            shown = bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
            assert shown == raw
            with pytest.raises(UnicodeDecodeError):
                raw.decode()
        else:
            assert choice["text"][offset : offset + len(token)] == token == raw.decode()
    without = post(server, prompt="원 a", logprobs=num_top)["choices"][0]["logprobs"]
    assert without["tokens"] == told["tokens"][len(ids) :]
    assert without["text_offset"] == [
        offset - len("원 a") for offset in told["text_offset"][len(ids) :]
    ]


@pytest.mark.parametrize("fields", [{}, {"stop": "0"}, {"max_tokens": 0}, {"max_tokens": 1}])
def test_streamed_log_probabilities_are_those_of_the_whole(
    server: Server, fields: dict[str, Any]
) -> None:
    asked = {"prompt": ["a 원", "b c d"], "n": 2, "echo": True, "logprobs": 2, **fields}
    whole = post(server, **asked)
    joined: list[dict[str, Any]] = [
        {"text": "", "logprobs": {}, "finish_reason": None} for _ in range(4)
    ]
    *events, last = events_of(
        server.http.post(
            URL,
            json=LEAST | asked | {"stream": True, "stream_options": {"include_usage": True}},
        )
    )
    for event in events:
        (piece,) = event["choices"]
        choice = joined[piece["index"]]
        choice["text"] += piece["text"]
        for name, values in piece["logprobs"].items():
            choice["logprobs"].setdefault(name, []).extend(values)
        choice["finish_reason"] = piece["finish_reason"]
    for index, choice in enumerate(whole["choices"]):
        assert joined[index] | {"index": index} == choice
    assert last["usage"] == whole["usage"]


def test_an_echo_waits_for_what_is_told_of_its_prompt(serve: Serve, preparer: Preparer) -> None:
    """Whichever choice comes first: the engine tells of a prompt with the first of them only."""

    class Reversed(FakeEngine):
        def _script(self, request: GenerationRequest, choice: int) -> Any:
            events = super()._script(request, choice)
            if choice:
                return events
            late = events[-1]
            told = events[0].prompt_logprobs
            return [type(late)(late.request_id, late.token_id, "length", prompt_logprobs=told)]

        async def _answer(self, request: GenerationRequest, mailbox: Any) -> None:
            for choice in reversed(range(request.num_choices)):
                for event in self._script(request, choice):
                    mailbox.put_nowait(event)
            self.running.pop(request.request_id, None)

    server = serve(engine=Reversed(ids_of(preparer, "b")), preparer=preparer)
    asked = {"prompt": "a x", "n": 2, "echo": True, "logprobs": 0, "stream": True}
    pieces = [event["choices"][0] for event in events_of(server.http.post(URL, json=LEAST | asked))]
    firsts = {piece["index"]: piece for piece in reversed(pieces)}
    for index in (0, 1):
        assert firsts[index]["text"].startswith("a x")
        assert firsts[index]["logprobs"]["token_logprobs"][0] is None


def test_a_prompt_may_be_scored_alone(server: Server, preparer: Preparer) -> None:
    """Nothing is left of the token that the engine has to make for it."""
    body = post(server, prompt="a red circle", echo=True, logprobs=1, max_tokens=0)
    (choice,) = body["choices"]
    ids = ids_of(preparer, "a red circle")
    assert choice["text"] == "a red circle"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, *(-each / 100 for each in ids[1:])]
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == len(ids)
    assert server.engine.submitted[-1][0].sampling.max_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_find_no_room_wait_for_their_siblings(
    serve: Serve, preparer: Preparer, end: int, stream: bool
) -> None:
    class Narrow(FakeEngine):
        async def submit(self, request: GenerationRequest, tiles: Any) -> Any:
            if len(self.running) >= 2:
                raise RateLimited()
            return await super().submit(request, tiles)

    engine = Narrow(echoing(preparer, end), gate=asyncio.Semaphore(10_000))
    server = serve(engine=engine, preparer=preparer)
    prompts = [f"x {letter}" for letter in "abcdefgh"]
    asked = LEAST | {"prompt": prompts, "stream": stream}
    response = server.http.post(URL, json=asked)
    texts = dict.fromkeys(range(8), "")
    bodies = events_of(response) if stream else [response.json()]
    for choice in itertools.chain.from_iterable(body["choices"] for body in bodies):
        texts[choice["index"]] += choice["text"]
    assert [text.strip() for text in texts.values()] == [f"{letter}0" for letter in "abcdefgh"]


@pytest.mark.parametrize("error", [RateLimited(), Unavailable()], ids=lambda error: error.code)
def test_without_any_room_the_request_is_refused(
    serve: Serve, preparer: Preparer, error: Any
) -> None:
    server = serve(engine=FakeEngine([5], refuse=error), preparer=preparer)
    for stream in (False, True):
        response = server.http.post(URL, json=LEAST | {"prompt": ["a", "b"], "stream": stream})
        assert_error(response, error.status, error.code)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_every_prompt(
    serve: Serve, preparer: Preparer, stream: bool
) -> None:
    engine = FakeEngine([5] * 9, gate=asyncio.Semaphore(1))
    server = serve(engine=engine, preparer=preparer)
    body = LEAST | {"prompt": ["a", "b", "c"], "stream": stream}
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        list(client.with_options(timeout=0.5).completions.create(**body))
    until(lambda: len(engine.aborted) == 3)
    until(lambda: not engine.running)


def test_an_error_of_one_prompt_ends_them_all(serve: Serve, preparer: Preparer) -> None:
    engine = FakeEngine(ids_of(preparer, "a"), error_code="internal_error")
    server = serve(engine=engine, preparer=preparer)
    body = LEAST | {"prompt": ["a", "b"]}
    assert_error(server.http.post(URL, json=body), 500, "internal_error")
    *_, last = events_of(server.http.post(URL, json=body | {"stream": True}))
    assert last["error"]["code"] == "internal_error"


def test_an_answer_cut_off_is_an_error_even_where_none_was_wanted(
    serve: Serve, preparer: Preparer
) -> None:
    server = serve(engine=FakeEngine([5], finish_reason="abort"), preparer=preparer)
    for fields in ({"max_tokens": 0, "echo": True}, {"max_tokens": 5}):
        assert_error(server.http.post(URL, json=LEAST | fields), 500, "internal_error")


def test_what_is_wrong_with_a_prompt_is_named(server: Server, preparer: Preparer) -> None:
    spec = preparer.facts.vision
    assert spec is not None
    size = preparer.tokenizer.size
    for prompt, code, param in (
        ("", "invalid_value", "prompt"),
        ([], "invalid_value", "prompt"),
        ([[]], "invalid_value", "prompt[0]"),
        (["a", ""], "invalid_value", "prompt[1]"),
        (5, "invalid_type", "prompt"),
        (True, "invalid_type", "prompt"),
        ({"a": 1}, "invalid_type", "prompt"),
        ([7, "a"], "invalid_type", "prompt[1]"),
        (["a", 7], "invalid_type", "prompt[1]"),
        ([[7], "a"], "invalid_type", "prompt[1]"),
        ([7, True], "invalid_type", "prompt[1]"),
        ([7, 1.5], "invalid_type", "prompt[1]"),
        ([[7], [7, None]], "invalid_type", "prompt[1][1]"),
        ([-1], "invalid_value", "prompt[0]"),
        ([7, size], "invalid_value", "prompt[1]"),
        ([[7], [2**63]], "invalid_value", "prompt[1][0]"),
        ([7, spec.image_token_id], "invalid_value", "prompt[1]"),
        ([spec.video_token_id], "invalid_value", "prompt[0]"),
        (["a"] * 65, "array_above_max_length", "prompt"),
        ([7] * CONTEXT, "context_length_exceeded", "prompt"),
        ([7] * (CONTEXT - 15), "context_length_exceeded", "prompt"),
        ("a" * 16 * CONTEXT + "a", "context_length_exceeded", "prompt"),
    ):
        response = server.http.post(URL, json=LEAST | {"prompt": prompt})
        assert_error(response, 400, code, param=param)
    assert_error(
        server.http.post(URL, json={"model": MODEL}),
        400,
        "missing_required_parameter",
        param="prompt",
    )
    response = server.http.post(URL, json=LEAST | {"model": "gpt-3"})
    assert_error(response, 404, "model_not_found", param="model")


def refusal(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion_request(LEAST | fields, is_strict=False)
    return caught.value.code, caught.value.param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@given(prompt=JSON)
def test_a_prompt_is_taken_apart_or_refused_by_its_place(prompt: Any) -> None:
    """Whatever it is; and what is taken is what was sent, in its order."""
    try:
        parsed = parse_completion_request(LEAST | {"prompt": prompt}, is_strict=True)
    except InvalidRequest as error:
        assert error.param is not None and error.param.startswith("prompt")
        return
    contents = [each.content for each in parsed.request.prompts]
    assert contents in ([prompt], prompt)
    assert all(isinstance(each, str | list) for each in contents)


def test_numbers_of_a_completion() -> None:
    for fields, code, param in (
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"logprobs": -1}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"echo": 1}, "invalid_type", "echo"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"n": 9}, "invalid_value", "n"),
        ({"n": 3, "prompt": ["a"] * 43}, "invalid_value", "n"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"messages": []}, "unsupported_parameter", "messages"),
        ({"add_special_tokens": False}, "unsupported_parameter", "add_special_tokens"),
        ({"add_generation_prompt": True}, "unsupported_parameter", "add_generation_prompt"),
        ({"continue_final_message": True}, "unsupported_parameter", "continue_final_message"),
        ({"cache_salt": ""}, "invalid_value", "cache_salt"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        ({"stop": [""]}, "invalid_value", "stop[0]"),
    ):
        assert refusal(**fields) == (code, param), fields
    parse_completion_request(LEAST | {"n": 2, "prompt": ["a"] * 64}, is_strict=True)
    neutral = {"best_of": 1, "suffix": "", "max_tokens": None, "logprobs": None, "echo": False}
    neutral |= {"add_generation_prompt": False, "continue_final_message": False}
    parse_completion_request(LEAST | neutral, is_strict=True)


def test_every_field_of_the_openai_client_is_known() -> None:
    known = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    honoured = {*SHARED_FIELDS, *CompletionFields.model_fields}
    assert {"model", "prompt", "best_of"} <= known
    assert known <= honoured | set(COMPLETION_UNSUPPORTED)
    assert not honoured & set(COMPLETION_UNSUPPORTED)
