"""Function calls in /v1/responses, by an engine that calls by a script."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.chat.calls import ARROW
from tests.api.conftest import Scripted, client_of
from tests.conftest import MODEL, assert_error

URL = "/v1/responses"
END, START, STOP = "<|im_end|>", "<|im_start|>", "<|stop|>"
TURN = (END, "\n", START, f"assistant{ARROW}")
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '{"name": "weather", "arguments": {"city": "서울"}}'


def test_calls_are_items_of_the_output(scripted: Scripted) -> None:
    server = scripted(["Let me see.", *TURN, f"[{CALL}, {CALL}]", END, STOP])
    with client_of(server) as client:
        response = client.responses.create(model=MODEL, input="날씨?", tools=[TOOL])
        with client.responses.stream(model=MODEL, input="날씨?", tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
    for each in (response, streamed):
        assert each.status == "completed"
        message, first, second = each.output
        assert message.type == "message" and each.output_text == "Let me see."
        for call in (first, second):
            assert call.type == "function_call" and call.name == "weather"
            assert json.loads(call.arguments) == {"city": "서울"}
        assert first.call_id != second.call_id  # type: ignore[union-attr]
    assert kinds.count("response.function_call_arguments.done") == 2
    assert kinds.count("response.function_call_arguments.delta") > 10
    assert kinds[-1] == "response.completed"


def test_results_go_back_as_items(scripted: Scripted) -> None:
    server = scripted([CALL, END, STOP])
    with client_of(server) as client:
        tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
        first = client.responses.create(model=MODEL, input="날씨?", **tools)
        (call,) = first.output
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        items: Any = [{"role": "user", "content": "날씨?"}, *first.output, result]
        client.responses.create(model=MODEL, input=items, tools=[TOOL])
    (must, _), (told, _) = server.engine.submitted
    decode = server.preparer.tokenizer.decode
    assert decode(must.prompt_ids).endswith(f"assistant{ARROW}")
    assert f"assistant{ARROW}[{CALL}]\ntool/function_call\nsunny\n" in decode(told.prompt_ids)


@pytest.mark.parametrize(
    ("choice", "is_called"),
    [
        ("auto", False),
        ("none", False),
        ({"type": "function", "name": "weather"}, True),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            True,
        ),
    ],
)
def test_the_choice_is_kept(scripted: Scripted, choice: Any, is_called: bool) -> None:
    server = scripted([CALL, END, STOP] if is_called else ["No.", END])
    body = {"model": MODEL, "input": "x", "tools": [TOOL], "tool_choice": choice}
    response = server.http.post(URL, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["tool_choice"] == choice
    assert response.json()["tools"] == [TOOL]
    ((request, _),) = server.engine.submitted
    text = server.preparer.tokenizer.decode(request.prompt_ids)
    assert text.endswith(ARROW) is is_called


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (
            {"tools": [TOOL | {"parameters": {"type": "string"}}]},
            "invalid_json_schema",
            "tools[0].parameters",
        ),
        ({"tools": [TOOL | {"name": "a b"}]}, "invalid_value", "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools[1].name"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "invalid_value", "tool_choice.name"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}},
            "invalid_value",
            "tool_choice.mode",
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                }
            },
            "invalid_value",
            "tool_choice.tools[0].name",
        ),
    ],
)
def test_faults_are_told_where_the_caller_made_them(
    scripted: Scripted, fields: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "input": "x", "tools": [TOOL]} | fields
    assert_error(scripted([STOP]).http.post(URL, json=body), 400, code, param=param)
