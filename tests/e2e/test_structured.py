"""Answers of a wanted form, through the real server and the real client: always valid at "stop"."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.e2e.conftest import RunningServer, serving


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]
    is_large: bool
    sides: list[Literal[3, 4]] | None


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tmp_path_factory.mktemp("structured")) as server:
        yield server


def complete(demo: RunningServer, **fields: Any) -> tuple[str, str]:
    """Text and finish reason of an answer; streamed where that is asked for."""
    answer: Any = demo.client.chat.completions.create(
        model=demo.model,
        messages=[{"role": "user", "content": "Describe a shape."}],
        **({"temperature": 1, "seed": 5, "max_tokens": 200} | fields),
    )
    if not fields.get("stream"):
        return answer.choices[0].message.content, answer.choices[0].finish_reason
    choices = [chunk.choices[0] for chunk in answer if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason


def test_a_pydantic_model_is_parsed(demo: RunningServer) -> None:
    for temperature in (0, 1, 2):
        completion = demo.client.chat.completions.parse(
            model=demo.model,
            messages=[{"role": "user", "content": "Describe a shape."}],
            response_format=Shape,
            temperature=temperature,
            max_tokens=300,
            seed=1,
        )
        choice = completion.choices[0]
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Shape)
        assert re.search(r"[:,] ", choice.message.content or "") is None


FORMS: dict[str, dict[str, Any]] = {
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "Shape", "schema": Shape.model_json_schema()},
        }
    },
    "json": {"structured_outputs": {"json": Shape.model_json_schema()}},
    "regex": {"structured_outputs": {"regex": r"\d{3}/[가-힣]{2}"}},
    "choice": {"structured_outputs": {"choice": ['예"', "아니오\n", "a/b"]}},
    "grammar": {"structured_outputs": {"grammar": 'start: "<" /[a-c]{1,5}/ ">"'}},
}


def is_kept(form: str, text: str) -> bool:
    match form:
        case "json_object":
            return isinstance(json.loads(text), dict)
        case "json_schema" | "json":
            return bool(Shape.model_validate_json(text))
        case "regex":
            return re.fullmatch(r"\d{3}/[가-힣]{2}", text) is not None
        case "choice":
            return text in FORMS["choice"]["structured_outputs"]["choice"]
    return re.fullmatch(r"<[a-c]{1,5}>", text) is not None


@pytest.mark.parametrize("form", FORMS)
def test_streamed_and_whole_answers_keep_their_form(demo: RunningServer, form: str) -> None:
    most = {"max_tokens": 60} if form == "json_object" else {}  # it may go on for ever
    whole = complete(demo, extra_body=FORMS[form], **most)
    assert complete(demo, extra_body=FORMS[form], stream=True, **most) == whole
    text, reason = whole
    if form != "json_object":
        assert reason == "stop"
    assert reason == "length" or is_kept(form, text)
    cut, reason = complete(demo, extra_body=FORMS[form], max_tokens=1)
    assert reason == "length" and text.startswith(cut)


def test_each_choice_goes_its_own_way(demo: RunningServer) -> None:
    completion = demo.client.chat.completions.create(
        model=demo.model,
        messages=[{"role": "user", "content": "?"}],
        n=8,
        temperature=2,
        seed=3,
        max_tokens=100,
        logprobs=True,
        presence_penalty=1,
        logit_bias={"0": 100},  # an end may be wished for, but comes only where it may
        extra_body=FORMS["grammar"],
    )
    texts = [choice.message.content or "" for choice in completion.choices]
    assert len(set(texts)) > 2
    for choice, text in zip(completion.choices, texts, strict=True):
        assert choice.finish_reason == "stop" and is_kept("grammar", text)
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(each.token for each in choice.logprobs.content) == text


def test_a_neighbour_without_a_form_says_what_it_says_alone(demo: RunningServer) -> None:
    question = "What is in the picture?"
    alone = demo.ask(question)
    with ThreadPoolExecutor(4) as threads:
        bound = [threads.submit(complete, demo, extra_body=FORMS["json_schema"]) for _ in range(3)]
        free = [threads.submit(demo.ask, question) for _ in range(3)]
        assert {each.result() for each in free} == {alone}
        assert {each.result()[1] for each in bound} == {"stop"}


def test_a_stop_string_cuts_as_ever(demo: RunningServer) -> None:
    text, reason = complete(demo, extra_body=FORMS["json_schema"], stop='"count"')
    assert (text[-1], reason) == (",", "stop")


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"stop_token_ids": [7]}])
def test_where_it_ends_the_form_says_alone(demo: RunningServer, field: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(demo, extra_body=FORMS["regex"] | field)
    assert caught.value.param == next(iter(field))


HARD = {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(3, 26)]}


def test_what_cannot_be_used_is_a_400_and_the_next_works(demo: RunningServer) -> None:
    """The hard one is killed for its time."""
    bad: list[dict[str, Any]] = [HARD, {"type": "array", "uniqueItems": True}, {"enum": []}]
    for schema in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            complete(demo, extra_body={"structured_outputs": {"json": schema}})
        assert caught.value.code == "invalid_json_schema"
        assert caught.value.param == "structured_outputs.json"
    text, _ = complete(demo, extra_body={"structured_outputs": {"json": {"const": "무지개"}}})
    assert text == '"무지개"'


MANY_WAYS = "\n".join(
    [
        "start: /[ab]{90}/ many",
        "many: " + " | ".join(f'x{number}? "y"' for number in range(2000)),
        *[f'x{number}: "z{number}"' for number in range(2000)],
    ]
)
"""Too many ways to go on, which nobody finds out before the first 90 characters have been said."""


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_turns_out_too_complex_is_told_as_such(
    demo: RunningServer, stream: bool
) -> None:
    with pytest.raises(openai.APIError) as caught:
        complete(demo, stream=stream, extra_body={"structured_outputs": {"grammar": MANY_WAYS}})
    assert caught.value.code == "invalid_json_schema"
    assert "too complex to be followed" in caught.value.message
    assert stream or isinstance(caught.value, openai.BadRequestError)


def test_a_thousand_members_may_each_be_missing(demo: RunningServer) -> None:
    properties = {f"p{number}": {"type": "boolean"} for number in range(1000)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    text, reason = complete(demo, extra_body={"structured_outputs": {"json": schema}})
    assert reason == "length" or json.loads(text).keys() <= properties.keys()


def test_the_names_of_special_tokens_are_text_in_a_form_too(demo: RunningServer) -> None:
    schema = {
        "type": "object",
        "properties": {"<|im_start|>": {"const": "<|im_end|>"}},
        "required": ["<|im_start|>"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    expected = '{"<|im_start|>":"<|im_end|>"}'
    assert complete(demo, response_format=form) == (expected, "stop")
    choices = {"structured_outputs": {"choice": ["<|endofturn|>"]}}
    assert complete(demo, extra_body=choices) == ("<|endofturn|>", "stop")


def deep(num_rules: int) -> dict[str, Any]:
    """A chain of rules, over which the library recurses."""
    rules = "\n".join(f"r{index}: r{index + 1}" for index in range(num_rules))
    grammar = f'start: ((((((((((r0))))))))))\n{rules}\nr{num_rules}: "a"'
    return {"structured_outputs": {"grammar": grammar}}


@pytest.mark.parametrize("num_rules", [500, 2_600, 2_667, 2_690, 3_800])
def test_what_passes_the_proof_is_no_danger_to_the_engine(
    demo: RunningServer, num_rules: int
) -> None:
    """At depths where the stack of a process ends, and of a thread."""
    for _ in range(3):
        try:
            assert complete(demo, extra_body=deep(num_rules)) == ("a", "stop")
        except openai.BadRequestError as error:
            assert error.code == "invalid_json_schema"
    assert demo.metrics()["hcx_engine_restarts_total"] == 0


def test_a_form_with_ever_more_readings_is_ended_and_its_neighbours_go_on(
    demo: RunningServer,
) -> None:
    ambiguous = {"structured_outputs": {"grammar": "start: s\ns: s s s | s s | /[a-z ]/"}}
    question = "What is in the picture?"
    alone = demo.ask(question)
    with ThreadPoolExecutor(1) as threads:
        fields = {"extra_body": ambiguous | {"min_tokens": 1500}, "temperature": 1.5}
        hard = threads.submit(complete, demo, max_tokens=1600, **fields)
        assert demo.ask(question) == alone
        with pytest.raises(openai.BadRequestError) as caught:
            hard.result(timeout=120)
    assert caught.value.code == "invalid_json_schema"
