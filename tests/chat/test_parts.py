from __future__ import annotations

from typing import Any

import pytest

from server.chat.options import MediaOptions
from server.chat.parts import (
    HINT_FIELDS,
    PART_TYPES,
    Call,
    Hints,
    MediaPart,
    Message,
    TextPart,
    parse_messages,
)
from server.config import MediaConfig
from server.errors import InvalidRequest

LIMITS = MediaConfig()
P = "messages[0].content"


def parse(*messages: Any) -> tuple[Message, ...]:
    return parse_messages(list(messages), LIMITS)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def media(kind: Any, *, detail: Any = None, param: str, path: str = f"{P}[0]", **more: Any) -> Any:
    more = {"sources": ("AAAA",), "options": MediaOptions(detail=detail), **more}
    return MediaPart(kind, param=param, path=path, **more)


PARTS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "text", "text": "안녕"}, TextPart("안녕")),
    (
        {"type": "image_url", "image_url": {"url": "AAAA"}},
        media("image", param=f"{P}[0].image_url.url"),
    ),
    (
        {"type": "image_url", "image_url": {"url": "AAAA", "detail": "low"}},
        media("image", detail="low", param=f"{P}[0].image_url.url"),
    ),
    (
        {"type": "image_url", "image_url": {"url": "AAAA", "detail": None}},
        media("image", param=f"{P}[0].image_url.url"),
    ),
    ({"type": "image_url", "image_url": "AAAA"}, media("image", param=f"{P}[0].image_url")),
    (
        {"type": "video_url", "video_url": {"url": "AAAA"}},
        media("video", param=f"{P}[0].video_url.url"),
    ),
    ({"type": "video_url", "video_url": "AAAA"}, media("video", param=f"{P}[0].video_url")),
    ({"type": "image", "image": "AAAA"}, media("image", param=f"{P}[0].image")),
    (
        {"type": "image_url", "image_url": {"url": "AAAA", "detail": "auto"}},
        media("image", detail="auto", param=f"{P}[0].image_url.url"),
    ),
    ({"type": "video", "video": "AAAA"}, media("video", param=f"{P}[0].video")),
    (
        {"type": "video", "video": ["AAAA", "BBBB"]},
        media("video", sources=("AAAA", "BBBB"), is_list=True, param=f"{P}[0].video"),
    ),
    (
        {"type": "file", "file": {"file_id": "AAAA"}},
        media("image", is_kind_known=False, param=f"{P}[0].file.file_id"),
    ),
    (
        {"type": "file", "file": {"file_data": "AAAA", "filename": "사진.png"}},
        media(
            "image",
            is_kind_known=False,
            hints=Hints(filename="사진.png"),
            param=f"{P}[0].file.file_data",
        ),
    ),
    ({"type": "input_text", "text": "안녕"}, TextPart("안녕")),
    (
        {"type": "input_image", "image_url": "AAAA", "detail": "high"},
        media("image", detail="high", param=f"{P}[0].image_url"),
    ),
    ({"type": "input_image", "file_id": "AAAA"}, media("image", param=f"{P}[0].file_id")),
    (
        {"type": "input_file", "file_id": "AAAA"},
        media("image", is_kind_known=False, param=f"{P}[0].file_id"),
    ),
    (
        {"type": "input_file", "file_url": "AAAA"},
        media("image", is_kind_known=False, param=f"{P}[0].file_url"),
    ),
    (
        {"type": "input_file", "file_data": "AAAA", "filename": "a.mp4"},
        media(
            "image",
            is_kind_known=False,
            hints=Hints(filename="a.mp4"),
            param=f"{P}[0].file_data",
        ),
    ),
]


def test_every_part_type_is_tried_here() -> None:
    assert {value["type"] for value, _ in PARTS} == set(PART_TYPES)


@pytest.mark.parametrize(("value", "part"), PARTS)
def test_parts(value: dict[str, Any], part: Any) -> None:
    content = [value, {"type": "text", "text": "What is it?"}]
    assert parse(user(content)) == (Message("user", (part, TextPart("What is it?"))),)


@pytest.mark.parametrize("value", [value for value, _ in PARTS if "text" not in value])
def test_every_medium_takes_every_hint(value: dict[str, Any]) -> None:
    hints = {name: f"about {name}" for name in HINT_FIELDS}
    (message,) = parse(user([value | hints]))
    assert message.media[0].hints == Hints(**hints)
    (message,) = parse(user([value | dict.fromkeys(HINT_FIELDS, None)]))
    assert message.media[0].hints == Hints()


def test_a_single_part_may_stand_alone() -> None:
    (message,) = parse(user({"type": "image", "image": "AAAA"}))
    assert message.content == (media("image", param=f"{P}.image", path=P),)


def test_roles() -> None:
    roles = ("system", "developer", "user", "assistant")
    messages = parse(*({"role": role, "content": "x"} for role in roles))
    assert [message.role for message in messages] == ["system", "system", "user", "assistant"]
    assert all(message.content == "x" for message in messages)


@pytest.mark.parametrize("content", ["", [], None, " \n"])
def test_an_assistant_may_have_said_nothing(content: Any) -> None:
    parse({"role": "assistant", "content": content}, user("go on"))


@pytest.mark.parametrize("content", ["", [], " \n", [{"type": "text", "text": "\t"}]])
def test_only_users_must_say_something(content: Any) -> None:
    parse({"role": "system", "content": content}, user("x"))
    assert_refused(user(content), "invalid_value", P)
    picture = {"type": "image", "image": "AAAA"}
    parse(user([picture, *content] if isinstance(content, list) else [picture]))


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    """What OpenAI's SDK sends back when it repeats an answer."""
    repeated: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert parse(repeated, user("y"))[0] == Message("assistant", "x")


def call(**function: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": function}


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


C = "messages[0].tool_calls[0]"
CALL = call(name="f", arguments='{"x": [1, "서울"]}')


def test_calls_and_their_results() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "r"}]}
    asked, answered = parse(calling(CALL | {"index": 0}), result | {"name": "f"})
    made = Call("a", "f", {"x": [1, "서울"]})
    assert asked == Message("assistant", "", (made,))
    assert answered == Message("tool", (TextPart("r"),), call=made)
    with pytest.raises(InvalidRequest) as caught:
        parse(calling(CALL), result | {"name": "g"})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "messages[1].name")


@pytest.mark.parametrize("arguments", [None, "", " ", "{}"])
def test_a_call_without_arguments(arguments: str | None) -> None:
    (message,) = parse(calling(call(name="f", arguments=arguments)))
    assert message.calls == (Call("a", "f", {}),)


def assert_refused(message: Any, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(message)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("hello", "invalid_type", "messages[0]"),
        (None, "invalid_type", "messages[0]"),
        ({"content": "x"}, "missing_required_parameter", "messages[0].role"),
        ({"role": None, "content": "x"}, "missing_required_parameter", "messages[0].role"),
        ({"role": 1, "content": "x"}, "invalid_type", "messages[0].role"),
        ({"role": "wizard", "content": "x"}, "invalid_value", "messages[0].role"),
        (
            {"role": "tool", "content": "x"},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            {"role": "tool", "content": "x", "tool_call_id": "a"},
            "invalid_value",
            "messages[0].tool_call_id",
        ),
        (user("x") | {"tool_call_id": "a"}, "unsupported_parameter", "messages[0].tool_call_id"),
        (user("x") | {"tool_calls": [CALL]}, "unsupported_parameter", "messages[0].tool_calls"),
        ({"role": "function", "content": "x"}, "unsupported_parameter", "messages[0].role"),
        ({"role": "user"}, "missing_required_parameter", P),
        ({"role": "system", "content": None}, "missing_required_parameter", P),
        (user(1), "invalid_type", P),
        (user(True), "invalid_type", P),
        (user("\ud800"), "invalid_value", P),
        (user("x") | {"name": "Bob"}, "unsupported_parameter", "messages[0].name"),
        (calling(5), "invalid_type", f"{C}"),
        (calling(CALL | {"function": None}), "missing_required_parameter", f"{C}.function"),
        (calling(CALL | {"id": None}), "missing_required_parameter", f"{C}.id"),
        (calling(CALL | {"type": "custom"}), "unsupported_parameter", f"{C}.type"),
        (
            calling(CALL | {"type": "custom", "custom": {}}),
            "unsupported_parameter",
            f"{C}.type",
        ),
        (calling(CALL | {"index": {}}), "invalid_type", f"{C}.index"),
        (calling(CALL, CALL), "invalid_value", "messages[0].tool_calls[1].id"),
        (calling(CALL | {"colour": "red"}), "unknown_parameter", f"{C}.colour"),
        (calling(call()), "missing_required_parameter", f"{C}.function.name"),
        (calling(call(name="f", x=1)), "unknown_parameter", f"{C}.function.x"),
        (calling(call(name="f", arguments={})), "invalid_type", f"{C}.function.arguments"),
        *(
            (calling(call(name="f", arguments=each)), "invalid_value", f"{C}.function.arguments")
            for each in (
                "[]",
                "5",
                "{",
                "{} {}",
                '{"a":1,"a":2}',
                '{"a": NaN}',
                '{"a": 1e999}',
                '{"a": "\\ud800"}',
            )
        ),
        (
            calling(call(name="f", arguments="[" * 100_000)),
            "invalid_value",
            f"{C}.function.arguments",
        ),
        (user("x") | {"colour": "red"}, "unknown_parameter", "messages[0].colour"),
        (user([1]), "invalid_type", f"{P}[0]"),
        (user([{"text": "x"}]), "missing_required_parameter", f"{P}[0].type"),
        (user([{"type": ["text"], "text": "x"}]), "invalid_type", f"{P}[0].type"),
        (user([{"type": "poem", "text": "x"}]), "invalid_value", f"{P}[0].type"),
        (user([{"type": "input_audio"}]), "unsupported_parameter", f"{P}[0].type"),
        (user([{"type": "text"}]), "missing_required_parameter", f"{P}[0].text"),
        (user([{"type": "text", "text": 1}]), "invalid_type", f"{P}[0].text"),
        (user([{"type": "text", "text": "\udfff"}]), "invalid_value", f"{P}[0].text"),
        (user([{"type": "text", "text": "x", "bold": 1}]), "unknown_parameter", f"{P}[0].bold"),
        (user([{"type": "text", "text": "x", "ocr": "y"}]), "unknown_parameter", f"{P}[0].ocr"),
        (
            user([{"type": "text", "text": "x"}, {"type": "image_url"}]),
            "missing_required_parameter",
            f"{P}[1].image_url",
        ),
        (
            user([{"type": "image_url", "image_url": {}}]),
            "missing_required_parameter",
            f"{P}[0].image_url.url",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": 1}}]),
            "invalid_type",
            f"{P}[0].image_url.url",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": ""}}]),
            "invalid_value",
            f"{P}[0].image_url.url",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": "AAAA", "detail": "best"}}]),
            "invalid_value",
            f"{P}[0].image_url.detail",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": "AAAA", "detail": 1}}]),
            "invalid_type",
            f"{P}[0].image_url.detail",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": "AAAA", "size": 1}}]),
            "unknown_parameter",
            f"{P}[0].image_url.size",
        ),
        (
            user([{"type": "video_url", "video_url": {"url": "AAAA", "detail": "low"}}]),
            "unknown_parameter",
            f"{P}[0].video_url.detail",
        ),
        (
            user([{"type": "image", "image_url": "AAAA"}]),
            "unknown_parameter",
            f"{P}[0].image_url",
        ),
        (user({"type": "image"}), "missing_required_parameter", f"{P}.image"),
        (user([{"type": "image", "image": "AAAA", "ocr": 5}]), "invalid_type", f"{P}[0].ocr"),
        (
            user([{"type": "image", "image": "AAAA", "filename": "x" * 256}]),
            "string_above_max_length",
            f"{P}[0].filename",
        ),
        (
            user([{"type": "video", "video": "AAAA", "speech_to_text": "x" * 16_385}]),
            "string_above_max_length",
            f"{P}[0].speech_to_text",
        ),
        (
            {"role": "assistant", "content": [{"type": "image", "image": "AAAA"}]},
            "invalid_value",
            f"{P}[0]",
        ),
        (
            {"role": "system", "content": {"type": "video", "video": "AAAA"}},
            "invalid_value",
            P,
        ),
    ],
)
def test_refusals_name_the_place(message: Any, code: str, param: str) -> None:
    assert_refused(message, code, param)


def test_names_of_clients_are_cut_and_escaped() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(user("x") | {"\x00" * 1000: 1})
    assert "\x00" not in f"{caught.value.message}{caught.value.param}"
    assert len(f"{caught.value.message}{caught.value.param}") < 250


def refusal(messages: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(messages, LIMITS)
    return caught.value.code, caught.value.param


def test_limits() -> None:
    text, picture = {"type": "text", "text": "x"}, {"type": "image", "image": "AAAA"}
    clip = {"type": "video", "video": "AAAA"}
    assert refusal([]) == ("invalid_value", "messages")
    assert refusal("hello") == ("invalid_type", "messages")

    assert len(parse_messages([user("x")] * 1024, LIMITS)) == 1024
    assert refusal([user("x")] * 1025) == ("array_above_max_length", "messages")

    parse(user([text] * 128), user([text] * 128))
    too_many_parts = [user([text] * 128), user([text] * 129)]
    assert refusal(too_many_parts) == ("array_above_max_length", "messages[1].content")

    parse(user([picture] * 8), user([picture] * 8))
    too_many_pictures = [user([picture] * 8), user([text, *[picture] * 9])]
    assert refusal(too_many_pictures) == ("array_above_max_length", "messages[1].content[9]")

    parse(user([clip] * 2))
    assert refusal([user([clip] * 3)]) == ("array_above_max_length", f"{P}[2]")


def test_sources_stay_out_of_representations() -> None:
    """They would fill logs with other people's pictures."""
    assert "AAAA" not in repr(parse(user([{"type": "image", "image": "AAAA"}])))
