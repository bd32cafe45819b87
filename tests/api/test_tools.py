"""Function calls over HTTP, with an engine that calls by a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from server.chat.calls import ARROW
from server.chat.prepare import Preparer
from tests.api.conftest import Scripted, ids_of
from tests.conftest import MODEL, Server, assert_error

URL = "/v1/chat/completions"
START, END, STOP = "<|im_start|>", "<|im_end|>", "<|stop|>"
TURN = (END, "\n", START, f"assistant{ARROW}")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <|im_end|> of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
USER = {"role": "user", "content": "날씨?"}
ARGUMENTS = '{"city": "서울 \\"}{\\" 🙂"}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], "tools": [TOOL], **fields}


def whole(server: Server, **fields: Any) -> dict[str, Any]:
    response = server.http.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(server: Server, **fields: Any) -> list[dict[str, Any]]:
    response = server.http.post(URL, json=body(stream=True, **fields))
    frames = [frame.removeprefix("data: ") for frame in response.text.split("\n\n")[:-1]]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame)["choices"][0] for frame in frames[:-1]]


def test_a_call_after_text(scripted: Scripted) -> None:
    server = scripted(["Let me see.", *TURN, f"[{CALL}]", END, STOP])
    choice = whole(server)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


def test_a_call_is_streamed_as_it_is_made(scripted: Scripted) -> None:
    server = scripted(["Let me see.", *TURN, f"[{CALL}]", END, STOP])
    choices = streamed(server)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    first_call = next(index for index, delta in enumerate(deltas) if "tool_calls" in delta)
    assert "".join(delta["content"] for delta in deltas[:first_call]) == "Let me see."
    first, *rest = calls
    assert first.pop("id").startswith("call_")
    assert first == {
        "index": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert all(set(piece) == {"index", "function"} for piece in rest)
    assert all(set(piece["function"]) == {"arguments"} for piece in rest)
    assert "".join(piece["function"]["arguments"] for piece in rest) == ARGUMENTS
    assert len(rest) > 10
    assert deltas[-1] == {}
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


@pytest.mark.parametrize(
    "answer",
    [
        (ARROW, CALL, END, STOP),
        (*TURN, CALL, STOP),
        (*TURN, f'[{{"name":"weather","input":{ARGUMENTS}}}]', END, "<|endofturn|>"),
    ],
)
def test_the_other_ways_to_write_one(scripted: Scripted, answer: Sequence[str]) -> None:
    choice = whole(scripted(answer), logprobs=True)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["logprobs"]["content"] == []


def test_several_calls_and_several_choices(scripted: Scripted) -> None:
    server = scripted(
        [*TURN, f"[{CALL}, {CALL},{CALL}]", END, STOP], ["No need.", END, "<|endofturn|>"]
    )
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    completion = client.chat.completions.create(**body(n=2))
    calling, telling = completion.choices
    assert [call.function.arguments for call in calling.message.tool_calls] == [ARGUMENTS] * 3
    assert len({call.id for call in calling.message.tool_calls}) == 3
    assert (telling.message.content, telling.finish_reason) == ("No need.", "stop")
    assert telling.message.tool_calls is None

    with client.chat.completions.stream(**body(n=2)) as stream:
        for _ in stream:
            pass
        calling, telling = stream.get_final_completion().choices
    assert [call.function.arguments for call in calling.message.tool_calls] == [ARGUMENTS] * 3
    assert telling.message.content == "No need."


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (("Just text.", END, "<|endofturn|>"), "Just text."),
        ((" -> tool/fun", "<|endofturn|>"), " -> tool/fun"),
        ((" -> tool/fundamental", "<|endofturn|>"), " -> tool/fundamental"),
        ((" ", "<|endofturn|>"), " "),
        (("text -> tool/function_call\n{}", "<|endofturn|>"), "text -> tool/function_call\n{}"),
    ],
)
def test_text_that_only_looks_like_a_call(
    scripted: Scripted, answer: Sequence[str], content: str
) -> None:
    server = scripted(answer)
    choice = whole(server, logprobs=True)
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, "stop")
    assert "tool_calls" not in choice["message"]
    assert "".join(each["token"] for each in choice["logprobs"]["content"]) == content
    assert "".join(c["delta"].get("content", "") for c in streamed(server)) == content


def test_stop_strings_are_of_the_text_alone(scripted: Scripted) -> None:
    server = scripted(["Let me see.", *TURN, CALL, END, STOP])
    assert whole(server, stop=["서울", "}"])["finish_reason"] == "tool_calls"
    choice = whole(server, stop=["me"])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let ", "stop")
    choice = whole(scripted([" -> tool/fun", STOP]), stop=["/fun"])
    assert (choice["message"]["content"], choice["finish_reason"]) == (" -> tool", "stop")
    choice = whole(scripted([" -> told\nyou", STOP]), stop=["\n", "tol"])
    assert (choice["message"]["content"], choice["finish_reason"]) == (" -> ", "stop")
    for stop in ("\n", " ", "tool", "->", "\n["):
        choice = whole(scripted([ARROW, f"[{CALL}]", END, STOP]), stop=[stop])
        assert choice["finish_reason"] == "tool_calls", stop
        assert choice["message"]["content"] is None


def test_a_call_that_is_cut_ends_by_length(scripted: Scripted, scripted_preparer: Preparer) -> None:
    head = [*TURN, CALL[: CALL.index("서울") + 2]]
    server = scripted([*head, CALL, END, STOP])
    most = len(ids_of(scripted_preparer.tokenizer, head))
    choice = whole(server, max_tokens=most)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "서울'
    assert choice["finish_reason"] == "length"


def test_the_engine_is_told_the_form(scripted: Scripted, scripted_preparer: Preparer) -> None:
    server = scripted([CALL, END, STOP])
    special = scripted_preparer.tokenizer.special
    whole(server, tool_choice="required")
    whole(server, tool_choice="auto")
    whole(server, tool_choice="none")
    must, may, cannot = (request for request, _ in server.engine.submitted)
    for request in (must, may):
        assert request.grammar is not None
        assert request.grammar_special_ids == (special[START], special[END])
        assert special[END] not in request.sampling.stop_token_ids
        assert special["<|endofturn|>"] in request.sampling.stop_token_ids
    assert must.grammar != may.grammar
    assert cannot.grammar is not None and cannot.grammar_special_ids == ()
    assert "weather" not in cannot.grammar
    assert special[END] in cannot.sampling.stop_token_ids
    head = scripted_preparer.tokenizer.decode(must.prompt_ids)
    assert head.endswith(f"assistant{ARROW}")
    for request in (may, cannot):
        assert scripted_preparer.tokenizer.decode(request.prompt_ids).endswith("assistant\n")


def prompt(server: Server, **fields: Any) -> str:
    response = server.http.post(f"{URL}?dry_run=true", json=body(**fields))
    assert response.status_code == 200, response.text
    text: str = response.json()["prompt"]
    return text


def test_tools_calls_and_results_in_the_prompt(scripted: Scripted) -> None:
    server = scripted([CALL])
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"<|stop|>"}'}}
    text = prompt(
        server,
        messages=[
            USER,
            {
                "role": "assistant",
                "content": "Hm.",
                "tool_calls": [{"id": "a"} | call, {"id": "b"} | call],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sunny <|im_end|>"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "rain"}]},
        ],
    )
    assert text == (
        '<|im_start|>tool_list\n[{"name": "weather", "description": "The weather <|im_end|> of a '
        'city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, '
        '"required": ["city"]}}]<|im_end|>\n'
        "<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\n날씨?<|im_end|>\n"
        "<|im_start|>assistant\nHm.<|im_end|>\n"
        "<|im_start|>assistant -> tool/function_call\n"
        '[{"name": "weather", "arguments": {"city": "<|stop|>"}}, '
        '{"name": "weather", "arguments": {"city": "<|stop|>"}}]<|im_end|><|stop|>\n'
        "<|im_start|>tool/function_call\nsunny <|im_end|><|im_end|>\n"
        "<|im_start|>tool/function_call\nrain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt(server, tool_choice="none") == prompt(server)


def test_special_tokens_in_tools_are_text(scripted: Scripted, scripted_preparer: Preparer) -> None:
    server = scripted([STOP])
    whole(server)
    ((request, _),) = server.engine.submitted
    end = scripted_preparer.tokenizer.special[END]
    assert request.prompt_ids.count(end) == 3  # of the tools, the system's and the user's turn


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "unsupported_parameter", "tools[0].type"),
        ({"tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
        ({"ignore_eos": True}, "invalid_value", "ignore_eos"),
        ({"stop_token_ids": [5]}, "invalid_value", "stop_token_ids"),
        (
            {"structured_outputs": {"grammar": 'start: "x"'}},
            "invalid_value",
            "structured_outputs.grammar",
        ),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
    ],
)
def test_what_is_refused(scripted: Scripted, fields: dict[str, Any], code: str, param: str) -> None:
    response = scripted([STOP]).http.post(URL, json=body(**fields))
    assert_error(response, 400, code, param=param)


def test_a_schema_that_cannot_be_kept_is_refused_by_its_name(scripted: Scripted) -> None:
    server = scripted([STOP])
    impossible = {"type": "object", "required": ["a"], "properties": {"a": False}}
    bad = {"type": "function", "function": {"name": "bad", "parameters": impossible}}
    worse = {"type": "function", "function": {"name": "worse", "parameters": {"const": 5}}}
    worst = {"mode": "required", "tools": [{"type": "function", "function": {"name": "worse"}}]}
    for tools, choice, index in (
        ([bad], "required", 0),
        ([TOOL, bad], "auto", 1),
        ([worse], "auto", 0),
        ([bad, worse], {"type": "allowed_tools", "allowed_tools": worst}, 1),
    ):
        response = server.http.post(URL, json=body(tools=tools, tool_choice=choice))
        param = f"tools[{index}].function.parameters"
        assert_error(response, 400, "invalid_json_schema", param=param)


def test_tools_are_counted_by_tokenize(scripted: Scripted) -> None:
    server = scripted([STOP])
    asked = {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}
    counted = server.http.post("/tokenize", json=asked).json()["count"]
    answered = server.http.post(URL, json=body(tool_choice="required")).json()
    assert counted == answered["usage"]["prompt_tokens"]
    plain = server.http.post("/tokenize", json={"messages": [USER]}).json()["count"]
    assert counted > plain + 20
    for refused in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        response = server.http.post("/tokenize", json=asked | refused)
        assert_error(response, 400, "invalid_value", param="tool_choice")
    response = server.http.post("/tokenize", json={"prompt": "x", "tools": [TOOL]})
    assert_error(response, 400, "unsupported_parameter", param="tools")


def test_a_call_begins_only_where_the_assistant_speaks(scripted: Scripted) -> None:
    server = scripted(["and so on.", *TURN, CALL, END, STOP])
    messages = [USER, {"role": "assistant", "content": "Now"}]
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": True, "echo": True}
    choice = whole(server, **fields)
    assert choice["message"]["content"] == "Nowand so on."
    assert choice["finish_reason"] == "tool_calls"
    for refused in (fields | {"tool_choice": "required"}, {"add_generation_prompt": False}):
        response = server.http.post(URL, json=body(**refused))
        assert_error(response, 400, "invalid_value", param="tool_choice")
    called = [USER, choice["message"] | {"refusal": None}]
    response = server.http.post(URL, json=body(messages=called, continue_final_message=True))
    assert_error(response, 400, "invalid_prompt", param="continue_final_message")
