from __future__ import annotations

from typing import Any, get_args

import pytest
from openai.types.chat import completion_create_params

from server.api.schemas import UNSUPPORTED, ChatCompletionRequest, parse_chat_request
from server.errors import InvalidRequest, UnknownParameter, UnsupportedParameter

LEAST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse(**fields: Any) -> ChatCompletionRequest:
    return parse_chat_request(LEAST | fields, is_strict=False).request


def refusal(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.message
    return caught.value.code, caught.value.param


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_not_honoured_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    for neutral in (None, *UNSUPPORTED[name]):
        parse(**{name: neutral})
    for value in ("something", 7, 0.5, ["x"], {"x": 1}):
        assert refusal(**{name: value}) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("modalities", []),
        ("service_tier", "flex"),
        ("best_of", 2),
        ("skip_special_tokens", False),
    ],
)
def test_values_that_ask_for_something(name: str, value: object) -> None:
    assert refusal(**{name: value}) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, "assistant"),
        ({"add_generation_prompt": True, "continue_final_message": False}, "assistant"),
        ({"add_generation_prompt": False}, "none"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "open"),
        ({"continue_final_message": True}, "open"),
    ],
)
def test_how_a_prompt_is_to_end(fields: dict[str, bool], ending: str) -> None:
    assert parse(**fields).to_chat_request().ending == ending


def test_nothing_is_begun_and_continued() -> None:
    both = {"add_generation_prompt": True, "continue_final_message": True}
    with pytest.raises(InvalidRequest, match="add_generation_prompt") as caught:
        parse(**both).to_chat_request()
    assert caught.value.param == "continue_final_message"
    for name in ("add_generation_prompt", "continue_final_message", "echo"):
        assert refusal(**{name: 1}) == ("invalid_type", name)


def test_a_salt_says_something_short() -> None:
    assert parse(cache_salt=None).to_chat_request().cache_salt == ""
    assert parse(cache_salt="가" * 170).to_chat_request().cache_salt == "가" * 170
    assert refusal(cache_salt="") == ("invalid_value", "cache_salt")
    assert refusal(cache_salt=1) == ("invalid_type", "cache_salt")
    assert refusal(cache_salt="가" * 171) == ("string_above_max_length", "cache_salt")


@pytest.mark.parametrize(("name", "value"), [("length_penalty", 1.0), ("min_new_tokens", -0.0)])
def test_neutral_numbers_may_be_written_as_floats(name: str, value: float) -> None:
    parse(**{name: value})


def test_every_field_of_the_openai_client_is_known() -> None:
    known = {
        name
        for kind in get_args(completion_create_params.CompletionCreateParams)
        for name in kind.__annotations__
    } | set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert {"model", "messages", "web_search_options"} <= known
    assert known <= {*ChatCompletionRequest.model_fields, *UNSUPPORTED}


def test_no_field_is_both_honoured_and_refused() -> None:
    assert not set(ChatCompletionRequest.model_fields) & set(UNSUPPORTED)


WRONG_TYPES: dict[str, list[object]] = {
    "model": [1, True, ["m"], {}],
    "messages": [1, "hi", True, {"role": "user"}],
    "max_tokens": [True, "1", 1.5, [1], {}],
    "max_completion_tokens": [False, "1", 0.5, [1]],
    "temperature": [True, "1", [1], {}],
    "top_p": [True, "1", [1]],
    "top_k": [True, "1", 1.5],
    "repetition_penalty": [True, "1"],
    "stop": [1, True, {}],
    "seed": [True, "1", 1.5],
    "min_p": [True, "0", [0]],
    "presence_penalty": [True, "0"],
    "frequency_penalty": [True, "0"],
    "logit_bias": [True, [], "5"],
    "stop_token_ids": [True, 5, {}],
    "min_tokens": [True, "1", 1.5],
    "ignore_eos": [0, 1, "true", []],
    "n": [True, "1", 1.5, [1]],
    "logprobs": [0, 1, 5, "true"],
    "top_logprobs": [True, False, "5", 1.5],
    "priority": [True, "1", 0.5, [1]],
    "stream": [0, 1, "true", []],
    "stream_options": [True, "usage", []],
    "user": [1, True, ["u"]],
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_values_of_another_type_are_refused(name: str) -> None:
    for value in WRONG_TYPES[name]:
        assert refusal(**{name: value}) == ("invalid_type", name), value


OUT_OF_RANGE: dict[str, list[object]] = {
    "max_tokens": [0, -1, -(2**63), 1e300],
    "max_completion_tokens": [0, -1],
    "temperature": [-0.1, -5e-324, 2.0000001, 3, 1e308],
    "top_p": [0, -0.0, -0.5, 1.0000001, 2],
    "top_k": [-2, 2**31, 2**63],
    "repetition_penalty": [0, -1, 0.001, 101, 1e308],
    "seed": [2**63, 2**64 - 1],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, 1e308],
    "frequency_penalty": [-2.1, 2.1],
    "min_tokens": [-1, 1e300],
    "n": [0, -1, 9, 2**63],
    "top_logprobs": [-1, 21],
    "priority": [-(2**31) - 1, 2**31, 2**63, -1e300],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused(name: str) -> None:
    for value in OUT_OF_RANGE[name]:
        assert refusal(**{name: value}) == ("invalid_value", name), value


IN_RANGE: dict[str, list[tuple[object, object]]] = {
    "max_tokens": [(1, 1), (1.0, 1), (2**31, 2**31)],
    "temperature": [(0, 0.0), (-0.0, 0.0), (2, 2.0), (5e-324, 5e-324), (1.0, 1.0)],
    "top_p": [(1, 1.0), (5e-324, 5e-324)],
    "top_k": [(-1, 0), (0, 0), (1, 1), (40.0, 40)],
    "repetition_penalty": [(1, 1.0), (0.01, 0.01), (100, 100.0)],
    "stop": [("x", ("x",)), (["a", "b"], ("a", "b")), ([], ()), (["<|im_end|>"], ("<|im_end|>",))],
    "seed": [(-(2**63), -(2**63)), (2**63 - 1, 2**63 - 1), (0, 0), (7.0, 7)],
    "min_p": [(0, 0.0), (1, 1.0), (0.05, 0.05)],
    "presence_penalty": [(-2, -2.0), (0, 0.0), (2, 2.0)],
    "frequency_penalty": [(-2, -2.0), (2, 2.0)],
    "logit_bias": [({}, ()), ({"5": 1, "0": -100.0}, ((5, 1), (0, -100.0)))],
    "stop_token_ids": [([], ()), ([7, 8.0], (7, 8))],
    "min_tokens": [(0, 0), (3.0, 3)],
    "ignore_eos": [(True, True), (False, False)],
    "priority": [(0, 0), (-(2**31), -(2**31)), (2**31 - 1, 2**31 - 1), (-5.0, -5)],
}


@pytest.mark.parametrize("name", IN_RANGE)
def test_values_in_range_reach_the_conversation(name: str) -> None:
    for value, expected in IN_RANGE[name]:
        converted = getattr(parse(**{name: value}).to_chat_request(), name)
        assert (type(converted), converted) == (type(expected), expected)
    missing = getattr(parse().to_chat_request(), name)
    assert getattr(parse(**{name: None}).to_chat_request(), name) == missing


@pytest.mark.parametrize("name", ["model", "messages"])
def test_required_fields(name: str) -> None:
    body = {key: value for key, value in LEAST.items() if key != name}
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(body, is_strict=False)
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", name)


@pytest.mark.parametrize(
    ("stop", "code", "param"),
    [
        ("", "invalid_value", "stop"),
        ([""], "invalid_value", "stop[0]"),
        (["a", 1], "invalid_type", "stop[1]"),
        (["a"] * 5, "array_above_max_length", "stop"),
        ("x" * 257, "string_above_max_length", "stop"),
        (["a", "x" * 257], "string_above_max_length", "stop[1]"),
        ([["a"]], "invalid_type", "stop[0]"),
    ],
)
def test_stop_strings(stop: object, code: str, param: str) -> None:
    assert refusal(stop=stop) == (code, param)


def test_choices_and_logprobs_reach_the_conversation() -> None:
    for fields, num_choices, num_logprobs in (
        ({}, 1, None),
        ({"n": None, "logprobs": None, "top_logprobs": None}, 1, None),
        ({"n": 1, "logprobs": False, "top_logprobs": 0}, 1, None),
        ({"n": 8.0, "logprobs": True}, 8, 0),
        ({"n": 2, "logprobs": True, "top_logprobs": 20}, 2, 20),
    ):
        asked = parse(**fields).to_chat_request()
        assert (asked.num_choices, asked.num_logprobs) == (num_choices, num_logprobs), fields


@pytest.mark.parametrize("logprobs", [None, False])
def test_the_likeliest_are_told_only_with_logprobs(logprobs: bool | None) -> None:
    assert refusal(logprobs=logprobs, top_logprobs=1) == ("invalid_value", "top_logprobs")


def test_both_limits_may_be_given_only_if_they_agree() -> None:
    both = parse(max_tokens=5, max_completion_tokens=5)
    assert both.to_chat_request().max_tokens == 5
    assert parse(max_completion_tokens=7).to_chat_request().max_tokens == 7
    assert refusal(max_tokens=5, max_completion_tokens=6) == ("invalid_value", "max_tokens")


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"include_usage": 1}, "invalid_type", "stream_options.include_usage"),
        ({"include_obfuscation": "no"}, "invalid_type", "stream_options.include_obfuscation"),
        (
            {"continuous_usage_stats": True},
            "unsupported_parameter",
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_stream_options(options: object, code: str, param: str) -> None:
    assert refusal(stream=True, stream_options=options) == (code, param)


@pytest.mark.parametrize("key", [" 5", "5_0", "1.5", "-1", "+1", "05", "٥", "", "5" * 30])
def test_keys_of_a_bias_are_canonical_integers(key: str) -> None:
    assert refusal(logit_bias={key: 1}) == ("invalid_value", "logit_bias")


def test_limits_of_biases_and_stop_ids() -> None:
    assert refusal(logit_bias={"5": 101}) == ("invalid_value", "logit_bias.5")
    assert refusal(logit_bias={"5": "1"}) == ("invalid_type", "logit_bias.5")
    many = {str(number): 0 for number in range(1025)}
    assert refusal(logit_bias=many) == ("array_above_max_length", "logit_bias")
    assert refusal(stop_token_ids=[0] * 65) == ("array_above_max_length", "stop_token_ids")
    assert refusal(stop_token_ids=[1, -1]) == ("invalid_value", "stop_token_ids[1]")


def test_an_unknown_stream_option_is_counted_or_refused() -> None:
    options = {"include_usage": True, "foo": 1}
    body = {"model": "m", "messages": [], "stream": True, "stream_options": options}
    parsed = parse_chat_request(body, is_strict=False)
    assert parsed.num_unknown == 1 and parsed.request.include_usage
    with pytest.raises(UnknownParameter) as raised:
        parse_chat_request(body, is_strict=True)
    assert raised.value.param == "stream_options.foo"


def test_stream_options_need_a_stream() -> None:
    for stream in ({}, {"stream": False}, {"stream": None}):
        code_and_param = refusal(stream_options={"include_usage": True}, **stream)
        assert code_and_param == ("invalid_value", "stream_options")
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage
    for options in (None, {}, {"include_usage": False}, {"include_obfuscation": True}):
        assert not parse(stream=True, stream_options=options).include_usage


def test_user_is_a_short_hint() -> None:
    parse(user="u" * 512)
    assert refusal(user="원" * 171) == ("string_above_max_length", "user")


def test_hints_are_accepted_within_their_limits() -> None:
    for name in ("safety_identifier", "prompt_cache_key"):
        parse(**{name: "u" * 512})
        assert refusal(**{name: "원" * 171}) == ("string_above_max_length", name)
        assert refusal(**{name: 1}) == ("invalid_type", name)
    parse(metadata={f"{number:064d}": "v" * 512 for number in range(16)})
    for metadata, code, param in (
        ({str(number): "" for number in range(17)}, "array_above_max_length", "metadata"),
        ({"k" * 65: "v"}, "string_above_max_length", "metadata"),
        ({"k": "v" * 513}, "string_above_max_length", "metadata.k"),
        ({"k": 1}, "invalid_type", "metadata.k"),
        (["k"], "invalid_type", "metadata"),
    ):
        assert refusal(metadata=metadata) == (code, param)


def test_there_is_one_service_tier() -> None:
    assert parse().answered_tier is None
    for tier in ("auto", "default"):
        assert parse(service_tier=tier).answered_tier == "default"
    for tier in ("flex", "priority", "scale", ""):
        assert refusal(service_tier=tier) == ("unsupported_parameter", "service_tier")
    assert refusal(service_tier=1) == ("invalid_type", "service_tier")


def test_fields_nobody_knows_are_counted_or_refused() -> None:
    body = LEAST | {"frobnicate": 1, "flux\n": None}
    assert parse_chat_request(body, is_strict=False).num_unknown == 2
    assert parse_chat_request(LEAST, is_strict=True).num_unknown == 0
    with pytest.raises(UnknownParameter) as caught:
        parse_chat_request(body, is_strict=True)
    assert caught.value.param == "frobnicate"
    with pytest.raises(UnsupportedParameter):
        parse_chat_request(LEAST | {"best_of": 2}, is_strict=True)


def test_messages_never_repeat_long_input() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(LEAST | {"x" * 10_000: 1}, is_strict=True)
    assert len(caught.value.message) < 200
    assert len(caught.value.param or "") <= 64
    with pytest.raises(InvalidRequest) as caught:
        parse(temperature="hot" * 10_000)
    assert "hot" not in caught.value.message
