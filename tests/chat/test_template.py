from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat.parts import HINT_FIELDS, parse_messages
from server.chat.template import DOCUMENTED_LAYOUT, ChatTemplate, Ending, read_template
from server.chat.tokenizer import Tokenizer
from server.chat.tools import Function
from server.config import MediaConfig
from server.core import VisionSpec
from server.errors import CheckpointError, InvalidPrompt, UnsupportedParameter
from tests.chat.conftest import (
    DICT_TEMPLATE,
    IMAGE,
    LIST_TEMPLATE,
    SPECIAL,
    STRING_TEMPLATE,
    VIDEO,
)

PICTURE = {"type": "image", "image": "AAAA"}
CLIP = {"type": "video", "video": "AAAA"}
ONLY_TOOLS_MISSING = (
    "the checkpoint's chat template cannot render tools: "
    "the documented layout is used for such conversations"
)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def own(tokenizer: Tokenizer, vision: VisionSpec) -> ChatTemplate:
    return ChatTemplate(tokenizer, template=LIST_TEMPLATE, revision_layout="main", vision=vision)


@pytest.fixture(scope="module")
def documented(tokenizer: Tokenizer, vision: VisionSpec) -> ChatTemplate:
    return ChatTemplate(tokenizer, template=None, revision_layout="main", vision=vision)


@pytest.fixture(scope="module")
def older(tokenizer: Tokenizer, vision: VisionSpec) -> ChatTemplate:
    """The older release: one part a message, no video token."""
    return ChatTemplate(
        tokenizer,
        template=DICT_TEMPLATE,
        revision_layout="v0.1.0",
        vision=replace(vision, video_token_id=None),
    )


def encode(template: ChatTemplate, *messages: Any, ending: Ending = "assistant") -> list[int]:
    return template.encode(parse_messages(list(messages), MediaConfig()), ending=ending)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The prompt with its special tokens written out."""
    names = {token_id: token for token, token_id in tokenizer.special.items()}
    data = b"".join(
        names[token_id].encode() if token_id in names else tokenizer.token_bytes(token_id)
        for token_id in ids
    )
    return data.decode()


def test_plain_strings_stay_strings(own: ChatTemplate, tokenizer: Tokenizer) -> None:
    """This template trims those, and only those."""
    ids = encode(
        own,
        {"role": "developer", "content": " Be brief. "},
        user("  안녕  "),
        {"role": "assistant", "content": "네"},
        user([text("  다음  ")]),
    )
    assert shown(tokenizer, ids) == (
        "<|im_start|>tool_list\n<|im_end|>\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n안녕<|im_end|>\n"
        "<|im_start|>assistant\n네<|im_end|>\n<|endofturn|>"
        "<|im_start|>user\n  다음  <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_parts_of_a_list_keep_their_order(own: ChatTemplate, tokenizer: Tokenizer) -> None:
    hints = {
        "filename": "개.png",
        "ocr": 'say "hi"',
        "lens_keywords": "",
        "lens_local_keywords": "x",
    }
    ids = encode(own, user([text("first"), PICTURE | hints, text("second"), CLIP, PICTURE]))
    assert shown(tokenizer, ids) == (
        "<|im_start|>tool_list\n<|im_end|>\n"
        "<|im_start|>user\nfirst<|im_end|>\n"
        '<|im_start|>user (mime)\n{"type": "image/jpeg", "filename": "개.png"}<|im_end|>\n'
        "<|im_start|>user (vector)\n<|dummy3|><|im_end|>\n"
        '<|im_start|>image/aux\n{"ocr": "say \\"hi\\"", "lens_keywords": "", '
        '"lens_local_keywords": "x"}<|im_end|>\n'
        "<|im_start|>user\nsecond<|im_end|>\n"
        '<|im_start|>user (mime)\n{"type": "video/mp4", "filename": ""}<|im_end|>\n'
        "<|im_start|>user (vector)\n<|_unuse_missing_100270|><|im_end|>\n"
        '<|im_start|>video/aux\n{"lens_keywords": "", "speech_to_text": "", '
        '"lens_local_keywords": ""}<|im_end|>\n'
        '<|im_start|>user (mime)\n{"type": "image/jpeg", "filename": ""}<|im_end|>\n'
        "<|im_start|>user (vector)\n<|dummy3|><|im_end|>\n"
        '<|im_start|>image/aux\n{"ocr": "", "lens_keywords": "", '
        '"lens_local_keywords": ""}<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_a_single_dict_reads_like_a_list_of_one(own: ChatTemplate) -> None:
    assert encode(own, user(PICTURE)) == encode(own, user([PICTURE]))
    assert encode(own, user(text("x"))) == encode(own, user([text("x")]))


def test_the_documented_layout(documented: ChatTemplate, tokenizer: Tokenizer) -> None:
    ids = encode(
        documented,
        {"role": "system", "content": [text("Be"), text("brief.")]},
        user([PICTURE | {"filename": "a.png", "ocr": "글자"}, text("Which?")]),
        {"role": "assistant", "content": "This."},
        user([CLIP, text("And here?")]),
    )
    assert shown(tokenizer, ids) == (
        "<|im_start|>tool_list\n<|im_end|>\n"
        "<|im_start|>system\nBe\nbrief.<|im_end|>\n"
        '<|im_start|>user (mime)\n{"type": "image/jpeg", "filename": "a.png"}<|im_end|>\n'
        "<|im_start|>user (vector)\n<|dummy3|><|im_end|>\n"
        "<|im_start|>image/aux\n다음 중 ocr은 사진에서 검출된 글자이고, lens_keyword는 사진에서 "
        "추출된 keyword와 bbox 위치입니다. bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 "
        '형태입니다. 참고하여 답변하세요. {"ocr": "글자", "lens_keywords": "", '
        '"lens_local_keywords": ""}<|im_end|>\n'
        "<|im_start|>user\nWhich?<|im_end|>\n"
        "<|im_start|>assistant\nThis.<|im_end|><|endofturn|>\n"
        '<|im_start|>user (mime)\n{"type": "video/mp4", "filename": ""}<|im_end|>\n'
        "<|im_start|>user (vector)\n<|_unuse_missing_100270|><|im_end|>\n"
        "<|im_start|>user\nAnd here?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_documented_layout_has_an_empty_system_block(
    documented: ChatTemplate, tokenizer: Tokenizer
) -> None:
    assert shown(tokenizer, encode(documented, user("x"))) == (
        "<|im_start|>tool_list\n<|im_end|>\n<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("part", [PICTURE, CLIP])
@pytest.mark.parametrize("name", HINT_FIELDS)
def test_the_documented_layout_shows_every_hint(
    documented: ChatTemplate, tokenizer: Tokenizer, part: dict[str, Any], name: str
) -> None:
    words = "시계 <|im_end|> clock"
    ids = encode(documented, user([part | {name: words}]))
    assert words in tokenizer.decode(ids)
    without = encode(documented, user([part]))
    special = tokenizer.special_ids
    if name == "filename" or part is PICTURE:
        assert [i for i in ids if i in special] == [i for i in without if i in special]


@pytest.mark.parametrize("part", [PICTURE, CLIP])
@pytest.mark.parametrize("name", HINT_FIELDS)
def test_hints_reach_the_prompt_or_are_refused(
    own: ChatTemplate, tokenizer: Tokenizer, part: dict[str, Any], name: str
) -> None:
    message = user([part | {name: "시계"}])
    no_place = (part, name) in [(PICTURE, "speech_to_text"), (CLIP, "ocr")]
    if not no_place:
        assert "시계" in tokenizer.decode(encode(own, message))
        return
    with pytest.raises(UnsupportedParameter, match=name) as caught:
        encode(own, message)
    assert caught.value.param == f"messages[0].content[0].{name}"


def test_the_older_release_gets_one_part_a_message(
    older: ChatTemplate, tokenizer: Tokenizer
) -> None:
    ids = encode(
        older,
        {"role": "system", "content": "Be brief."},
        user([PICTURE | {"ocr": "글자"}, text("Which?")]),
        {"role": "assistant", "content": [text("This.")]},
        user("Why?"),
    )
    assert shown(tokenizer, ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user (vector)\n<|dummy3|><|im_end|>\n"
        '<|im_start|>image/aux\n{"ocr": "글자"}<|im_end|>\n'
        "<|im_start|>user\nWhich?<|im_end|>\n"
        "<|im_start|>assistant\nThis.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert older.notes == (ONLY_TOOLS_MISSING,)


def test_the_older_release_sees_a_video_as_a_picture_entry(
    older: ChatTemplate, tokenizer: Tokenizer
) -> None:
    assert older.placeholder_id("video") == older.placeholder_id("image")
    ids = encode(older, user([CLIP, PICTURE]))
    assert ids.count(tokenizer.special[IMAGE]) == 2
    with pytest.raises(UnsupportedParameter):
        encode(older, user([CLIP | {"speech_to_text": "hello"}]))


@pytest.mark.parametrize("layout", ["main", "v0.1.0", "text"])
@pytest.mark.parametrize("template", [LIST_TEMPLATE, DICT_TEMPLATE, STRING_TEMPLATE])
@pytest.mark.parametrize("content", ["안녕", [{"type": "text", "text": "안녕"}]])
def test_any_template_renders_text_whatever_the_layout_says(
    tokenizer: Tokenizer, layout: Any, template: str, content: Any
) -> None:
    prompts = ChatTemplate(tokenizer, template=template, revision_layout=layout)
    assert prompts.notes == (ONLY_TOOLS_MISSING,)
    words = shown(tokenizer, encode(prompts, {"role": "system", "content": "S"}, user(content)))
    assert words.endswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n안녕<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_for_strings_gets_parts_joined(tokenizer: Tokenizer) -> None:
    prompts = ChatTemplate(tokenizer, template=STRING_TEMPLATE, revision_layout="text")
    words = shown(tokenizer, encode(prompts, user([text("one"), text("two")])))
    assert "<|im_start|>user\none\ntwo<|im_end|>" in words


def test_a_printed_list_is_not_taken_for_a_rendered_one(tokenizer: Tokenizer) -> None:
    printing = STRING_TEMPLATE.replace("+ message.content +", "~ message.content ~")
    for layout in ("main", "v0.1.0"):
        prompts = ChatTemplate(tokenizer, template=printing, revision_layout=layout)
        assert "type" not in shown(tokenizer, encode(prompts, user([text("one")])))


def test_named_special_tokens_are_known_to_the_template(tokenizer: Tokenizer) -> None:
    prompts = ChatTemplate(
        tokenizer,
        template="{{ bos_token }}" + STRING_TEMPLATE,
        revision_layout="text",
        special_tokens={"bos_token": "<|endoftext|>"},
    )
    assert encode(prompts, user("x"))[0] == tokenizer.special["<|endoftext|>"]


def test_a_missing_template_is_told_once(
    tokenizer: Tokenizer, vision: VisionSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = ChatTemplate(tokenizer, template=None, revision_layout="main", vision=vision)
        encode(prompts, user("x"))
        encode(prompts, user([PICTURE, CLIP]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no chat template" in prompts.notes[0]


def test_a_template_that_cannot_show_a_video_is_helped_out(
    tokenizer: Tokenizer,
    vision: VisionSpec,
    own: ChatTemplate,
    documented: ChatTemplate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    blind = LIST_TEMPLATE.replace("part.type == 'video'", "part.type == 'film'")
    with caplog.at_level(logging.WARNING):
        prompts = ChatTemplate(tokenizer, template=blind, revision_layout="main", vision=vision)
    assert len(caplog.records) == 1
    assert prompts.notes == (
        "the checkpoint's chat template cannot render videos and tools: "
        "the documented layout is used for such conversations",
    )
    with_picture = user([PICTURE, text("x")])
    assert encode(prompts, with_picture) == encode(own, with_picture)
    with_video = user([CLIP, PICTURE, text("x")])
    assert encode(prompts, with_video) == encode(documented, with_video)


def test_a_text_template_of_a_vision_model_is_helped_out(
    tokenizer: Tokenizer, vision: VisionSpec, documented: ChatTemplate
) -> None:
    prompts = ChatTemplate(
        tokenizer, template=STRING_TEMPLATE, revision_layout="main", vision=vision
    )
    assert "pictures and videos" in prompts.notes[0]
    assert "tool_list" not in shown(tokenizer, encode(prompts, user("x")))
    message = user([PICTURE, text("x")])
    assert encode(prompts, message) == encode(documented, message)


@pytest.mark.parametrize("broken", ["{% for %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", ""])
def test_a_broken_template_is_replaced(
    tokenizer: Tokenizer, documented: ChatTemplate, vision: VisionSpec, broken: str
) -> None:
    prompts = ChatTemplate(tokenizer, template=broken, revision_layout="main", vision=vision)
    assert "cannot render text and pictures and videos" in prompts.notes[0]
    assert encode(prompts, user("x")) == encode(documented, user("x"))


def test_without_the_tokens_of_the_layout_there_is_nothing_left(
    description: dict[str, Any],
) -> None:
    added = [t for t in description["added_tokens"] if t["content"] != "<|im_end|>"]
    plain = Tokenizer(json.dumps(description | {"added_tokens": added}))
    with pytest.raises(CheckpointError, match="im_end"):
        ChatTemplate(plain, template=None, revision_layout="text")


def test_what_nothing_can_render_is_refused(
    description: dict[str, Any], vision: VisionSpec
) -> None:
    added = [t for t in description["added_tokens"] if t["content"] != "<|im_start|>"]
    plain = Tokenizer(json.dumps(description | {"added_tokens": added}))
    prompts = ChatTemplate(plain, template=STRING_TEMPLATE, revision_layout="main", vision=vision)
    assert prompts.notes == (
        "the checkpoint's chat template cannot render pictures and videos and tools: "
        "the server refuses such conversations",
    )
    encode(prompts, user("x"))
    with pytest.raises(UnsupportedParameter, match="no place for images") as caught:
        encode(prompts, user([text("x"), PICTURE]))
    assert caught.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    "alter", ["[:2000] | truncate(24)", ".replace('0', 'o').replace('1', 'l')", " | urlencode"]
)
def test_a_template_that_alters_its_text_is_replaced(tokenizer: Tokenizer, alter: str) -> None:
    """It would alter the numbers that stand for what could be special in client text."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content" + alter + " }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    chat = ChatTemplate(tokenizer, template=template, revision_layout="text")
    assert "cannot render text" in chat.notes[0]
    assert "is 1 < 20?" in shown(tokenizer, encode(chat, user("is 1 < 20?")))


def test_templates_run_in_a_sandbox(tokenizer: Tokenizer, documented: ChatTemplate) -> None:
    escaping = "{{ messages.__class__.__mro__ }}" + STRING_TEMPLATE
    prompts = ChatTemplate(tokenizer, template=escaping, revision_layout="text")
    assert "cannot render text" in prompts.notes[0]


def test_a_template_may_refuse_a_conversation(tokenizer: Tokenizer) -> None:
    picky = (
        "{%- if messages[-1].role == 'assistant' -%}"
        "{{ raise_exception('the user must have the last word') }}"
        "{%- endif -%}" + STRING_TEMPLATE
    )
    prompts = ChatTemplate(tokenizer, template=picky, revision_layout="text")
    assert prompts.notes == (ONLY_TOOLS_MISSING,)
    with pytest.raises(InvalidPrompt) as caught:
        encode(prompts, user("x"), {"role": "assistant", "content": "y"})
    assert "last word" not in caught.value.message


def test_a_template_that_loses_a_picture_is_caught(
    tokenizer: Tokenizer, vision: VisionSpec
) -> None:
    forgetful = LIST_TEMPLATE.replace("for message in messages -", "for message in messages[-2:] -")
    assert forgetful != LIST_TEMPLATE
    prompts = ChatTemplate(tokenizer, template=forgetful, revision_layout="main", vision=vision)
    encode(prompts, user([PICTURE]), user("x"))
    with pytest.raises(InvalidPrompt, match="0 media places for 1"):
        encode(prompts, user([PICTURE]), user("x"), user("y"))


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("name", ["documented", "own", "older"])
@pytest.mark.parametrize("content", ["A red", [{"type": "text", "text": "A red"}]])
def test_a_prompt_may_end_in_three_ways(
    name: str, content: Any, tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    template: ChatTemplate = request.getfixturevalue(name)
    conversation = (user("What?"), assistant(content))
    head = "<|im_start|>assistant\n"
    closed = shown(tokenizer, encode(template, *conversation, ending="none"))
    assert shown(tokenizer, encode(template, *conversation)) == closed + head
    opened = shown(tokenizer, encode(template, *conversation, ending="open"))
    assert opened.endswith(f"{head}A red")
    end = "<|endofturn|>" if name != "older" else ""
    assert closed.removeprefix(opened).replace("\n", "") == f"<|im_end|>{end}"


@pytest.mark.parametrize("name", ["documented", "own", "older"])
def test_a_user_s_text_may_be_continued_behind_a_picture(
    name: str, tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    template: ChatTemplate = request.getfixturevalue(name)
    ids = encode(template, user([PICTURE, text("What"), text("is")]), ending="open")
    assert ids.count(tokenizer.special[IMAGE]) == 1
    assert shown(tokenizer, ids).endswith("<|im_start|>user\nWhat<|im_end|>\n<|im_start|>user\nis")
    for message in (user([text("x"), PICTURE]), assistant([])):
        with pytest.raises(InvalidPrompt, match="text that could be continued") as caught:
            encode(template, user("x"), message, ending="open")
        assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize("name", ["documented", "own", "older"])
def test_an_empty_message_is_continued_from_its_head(
    name: str, request: pytest.FixtureRequest
) -> None:
    template: ChatTemplate = request.getfixturevalue(name)
    begun = encode(template, user("x"), assistant(""), ending="open")
    assert begun == encode(template, user("x"))


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "said", "rendered"),
    [
        ("m.content | trim", "  A \n", "A"),
        ("' ' + m.content | trim + ' '", " A  ", " A"),
        ("m.content | trim", " \n", ""),
        ("m.content", " A \n", " A \n"),
        ("m.content + '\n'", "A ", "A "),
        ("m.content | tojson", "A ", '"A '),
        ("m.content.split('-')[-1]", "A", "A"),
    ],
)
def test_white_space_ends_a_continued_text_as_the_template_would_have_it(
    tokenizer: Tokenizer, content: str, said: str, rendered: str
) -> None:
    template = ChatTemplate(
        tokenizer, template=TURNS.replace("CONTENT", content), revision_layout="text"
    )
    assert template.notes == (ONLY_TOOLS_MISSING,)
    words = shown(tokenizer, encode(template, user("x"), assistant(said), ending="open"))
    assert words.endswith(f"<|im_start|>assistant\n{rendered}")


@pytest.mark.parametrize(
    "content",
    [
        "m.content.split('-')[-1]",
        "m.content + (m.content if loop.last and m.role == 'assistant' else '')",
        "m.content if not loop.last or m.role == 'user' else 'said'",
    ],
)
def test_what_a_template_does_not_show_once_cannot_be_continued(
    tokenizer: Tokenizer, content: str
) -> None:
    template = ChatTemplate(
        tokenizer, template=TURNS.replace("CONTENT", content), revision_layout="text"
    )
    assert template.notes == (ONLY_TOOLS_MISSING,)
    with pytest.raises(InvalidPrompt, match="leave the last message open") as caught:
        encode(template, user("x"), assistant("a-b"), ending="open")
    assert caught.value.param == "continue_final_message"


def test_a_template_that_always_begins_an_answer(tokenizer: Tokenizer) -> None:
    always = STRING_TEMPLATE.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    template = ChatTemplate(tokenizer, template=always, revision_layout="text")
    conversation = (user("x"), assistant("y"))
    with pytest.raises(UnsupportedParameter) as caught:
        encode(template, *conversation, ending="none")
    assert caught.value.param == "add_generation_prompt"
    opened = shown(tokenizer, encode(template, *conversation, ending="open"))
    assert opened.endswith("<|im_start|>assistant\ny")


client_text = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from([*SPECIAL, "<|im_", "start|>", '"', "}"]))
).map(lambda pieces: "x" + "".join(pieces))


@settings(max_examples=50)
@given(words=client_text, name=client_text, ocr=client_text)
def test_no_text_changes_the_special_tokens_of_a_prompt(
    own: ChatTemplate,
    documented: ChatTemplate,
    tokenizer: Tokenizer,
    words: str,
    name: str,
    ocr: str,
) -> None:
    def conversation(words: str, name: str, ocr: str) -> list[Any]:
        return [
            {"role": "system", "content": words},
            user([text(words), text(words), PICTURE | {"filename": name[:255], "ocr": ocr}]),
            {"role": "assistant", "content": words},
            user(words),
        ]

    for template in (own, documented):
        ids = encode(template, *conversation(words, name, ocr))
        harmless = encode(template, *conversation("x", "x", "x"))
        special = tokenizer.special_ids
        assert [i for i in ids if i in special] == [i for i in harmless if i in special]


@settings(max_examples=50)
@given(words=client_text, space=st.text(alphabet=" \n\t", max_size=3))
def test_any_text_is_continued_as_it_would_have_been_closed(
    own: ChatTemplate, documented: ChatTemplate, tokenizer: Tokenizer, words: str, space: str
) -> None:
    for template, kept in ((own, words.strip()), (documented, words + space)):
        conversation = (user(words), assistant(words + space))
        opened = shown(tokenizer, encode(template, *conversation, ending="open"))
        closed = shown(tokenizer, encode(template, *conversation, ending="none"))
        assert opened.endswith(f"<|im_start|>assistant\n{kept}")
        assert closed.removeprefix(opened).startswith("<|im_end|>")


@settings(max_examples=50)
@given(
    words=st.text(
        alphabet=st.characters(codec="utf-8", exclude_characters="<[한"), min_size=1, max_size=30
    )
)
def test_ordinary_prompts_have_the_official_ids(
    own: ChatTemplate, tokenizer: Tokenizer, official: tokenizers.Tokenizer, words: str
) -> None:
    ids = encode(own, user([text(f"x{words}"), text(words)]))
    rendered = shown(tokenizer, ids)
    assert f"<|im_start|>user\nx{words}<|im_end|>" in rendered
    # Which special token is found first differs where one begins another: not in this template.
    assert ids == official.encode(rendered, add_special_tokens=False).ids


@pytest.mark.parametrize("key", ["config", "named", "json", "jinja"])
def test_where_templates_are_found(tmp_path: Path, key: str) -> None:
    settings_of: dict[str, Any] = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<p>"}
    if key == "config":
        settings_of["chat_template"] = "T"
    if key == "named":
        settings_of["chat_template"] = [
            {"name": "tool_use", "template": "U"},
            {"name": "default", "template": "T"},
        ]
    if key == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "T"}')
    if key == "jinja":
        settings_of["chat_template"] = "older"
        (tmp_path / "chat_template.jinja").write_text("T")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_of))
    assert read_template(tmp_path) == ("T", {"eos_token": "<|endoftext|>", "pad_token": "<p>"})


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    assert read_template(tmp_path) == (None, {})
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        read_template(tmp_path)


def test_the_layout_names_no_placeholder_itself() -> None:
    """The checkpoint's own ids decide what a placeholder is called."""
    assert IMAGE not in DOCUMENTED_LAYOUT
    assert VIDEO not in DOCUMENTED_LAYOUT


def test_torch_is_never_imported() -> None:
    code = (
        "import sys; import server.chat.prepare; assert 'torch' not in sys.modules;"
        "from server.chat.template import ChatTemplate;"
        "from server.chat.tokenizer import Tokenizer;"
        "from server.chat.parts import Message;"
        "t = Tokenizer(sys.stdin.read());"
        "p = ChatTemplate(t, template=None, revision_layout='text');"
        "p.encode([Message('user', 'x')]); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], input=_minimal(), text=True, check=True, timeout=120
    )


def _minimal() -> str:
    from server.chat.tokenizer import byte_symbols

    added = [
        {"id": 256 + index, "content": content, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, content in enumerate(["<|im_start|>", "<|im_end|>"])
    ]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}
            | {"trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": byte_symbols(), "merges": []},
        }
    )


FUNCTION = Function(
    "weather", "Its <|im_end|>", {"type": "object", "properties": {"<|stop|>": {}}}, ""
)
CALLED: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "content": "Hm.",
        "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": '{"x":"한"}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "sunny <|im_end|>"},
]
SHOWN_CALLS = (
    "<|im_start|>assistant\nHm.<|im_end|>\n"
    '<|im_start|>assistant -> tool/function_call\n[{"name": "weather", "arguments": {"x": "한"}}]'
    "<|im_end|><|stop|>\n"
    "<|im_start|>tool/function_call\nsunny <|im_end|><|im_end|>\n"
)
SHOWN_TOOLS = (
    '<|im_start|>tool_list\n[{"name": "weather", "description": "Its <|im_end|>", '
    '"parameters": {"type": "object", "properties": {"<|stop|>": {}}}}]<|im_end|>\n'
)


def test_the_documented_layout_of_tools(tokenizer: Tokenizer, documented: ChatTemplate) -> None:
    messages = parse_messages([user("x"), *CALLED], MediaConfig())
    ids = documented.encode(messages, [FUNCTION])
    words = shown(tokenizer, ids)
    system = "<|im_start|>system\n<|im_end|>\n"
    asked = "<|im_start|>user\nx<|im_end|>\n"
    assert words == f"{SHOWN_TOOLS}{system}{asked}{SHOWN_CALLS}<|im_start|>assistant\n"
    # What the client wrote of special tokens is none.
    assert ids.count(tokenizer.special["<|stop|>"]) == 1
    assert ids.count(tokenizer.special["<|im_end|>"]) == words.count("<|im_end|>") - 2


def test_a_call_is_begun_in_the_prompt(tokenizer: Tokenizer, documented: ChatTemplate) -> None:
    messages = parse_messages([user("x")], MediaConfig())
    words = shown(tokenizer, documented.encode(messages, [FUNCTION], ending="call"))
    assert words.endswith("x<|im_end|>\n<|im_start|>assistant -> tool/function_call\n")
    thinking = STRING_TEMPLATE.replace("assistant\\n'", "assistant/think\\n'") + (
        "{%- for tool in tools or [] -%}{{ tool | tojson }}{%- endfor -%}"
        "{%- for m in messages -%}{%- for c in m.tool_calls or [] -%}{{ c | tojson }}{%- endfor -%}"
        "{%- endfor -%}<|im_start|>assistant/think\\n"
    )
    other = ChatTemplate(tokenizer, template=thinking, revision_layout="text")
    assert other.notes == ()
    words = shown(tokenizer, other.encode(messages, [FUNCTION], ending="call"))
    assert words.endswith("think\\n<|im_end|>\n<|im_start|>assistant -> tool/function_call\n")


@pytest.mark.parametrize("template", [LIST_TEMPLATE, DICT_TEMPLATE, STRING_TEMPLATE])
def test_a_template_without_tools_is_helped_out(
    tokenizer: Tokenizer, documented: ChatTemplate, vision: VisionSpec, template: str
) -> None:
    chat = ChatTemplate(tokenizer, template=template, revision_layout="main", vision=vision)
    assert "tools" in chat.notes[0]
    plain, called = (parse_messages([user("x"), *more], MediaConfig()) for more in ((), CALLED))
    assert chat.encode(plain, [FUNCTION]) == documented.encode(plain, [FUNCTION])
    assert chat.encode(called) == documented.encode(called)


def test_a_template_that_shows_tools_is_used(tokenizer: Tokenizer) -> None:
    template = (
        "{%- for tool in tools or [] -%}T{{ tool.function | tojson }}{%- endfor -%}"
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{%- for c in m.tool_calls or [] -%}C{{ c.function | tojson }}{%- endfor -%}<|im_end|>"
        "{%- endfor -%}<|im_start|>assistant\n"
    )
    chat = ChatTemplate(tokenizer, template=template, revision_layout="text")
    assert chat.notes == ()
    messages = parse_messages([user("x"), *CALLED], MediaConfig())
    words = shown(tokenizer, chat.encode(messages, [FUNCTION]))
    assert words.startswith('T{"name": "weather"')
    assert 'Hm.C{"name": "weather", "arguments": {"x": "한"}}<|im_end|>' in words


def test_without_the_family_s_tokens_tools_are_refused(description: dict[str, Any]) -> None:
    added = [t for t in description["added_tokens"] if t["content"] != "<|im_start|>"]
    plain = Tokenizer(json.dumps(description | {"added_tokens": added}))
    chat = ChatTemplate(plain, template=STRING_TEMPLATE, revision_layout="text")
    with pytest.raises(UnsupportedParameter) as caught:
        chat.encode(parse_messages([user("x")], MediaConfig()), [FUNCTION])
    assert caught.value.param == "tools"


SHOWS_TOOLS = (
    "{%- for tool in tools or [] -%}T{{ tool.function | tojson }}{%- endfor -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ m.name }}\n{{ m.content.text }}"
    "{%- for c in m.tool_calls or [] -%}C{{ c.function | tojson }}{%- endfor -%}<|im_end|>"
    "{%- endfor -%}<|im_start|>assistant\n"
)


def test_one_part_a_message_shows_calls_and_results_once(tokenizer: Tokenizer) -> None:
    """This template also says whose result it is."""
    chat = ChatTemplate(tokenizer, template=SHOWS_TOOLS, revision_layout="v0.1.0")
    assert chat.notes == ()
    called, result = CALLED
    messages = [
        user([text("x")]),
        called | {"content": [text("one"), text("two")]},
        result | {"content": [text("sun"), text("rain")]},
    ]
    ids = chat.encode(parse_messages(messages, MediaConfig()), [FUNCTION])
    words = shown(tokenizer, ids)
    assert words.count('C{"name"') == 1 and "two" + 'C{"name"' in words
    assert words.count("<|im_start|>tool") == 1 and "toolweather\nsun\nrain<|im_end|>" in words
