from __future__ import annotations

import json

import jinja2
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from server.chat.disguise import Disguise
from server.chat.tokenizer import Tokenizer
from tests.chat.conftest import IM_END, IM_START, SPECIAL

client_text = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*SPECIAL, "<", ">", "<|", "|>", "[", "im_start", " ", "\n", '"', "\\"]),
    ),
    max_size=8,
).map("".join)


def encode(tokenizer: Tokenizer, template: str, *texts: str) -> list[int]:
    """What a template that prints {0}, {1} ... becomes."""
    disguise = Disguise(tokenizer)
    nonce = disguise.new_nonce()
    hidden = [disguise.hide(text, nonce=nonce) for text in texts]
    return disguise.encode(template.format(*hidden), nonce=nonce)


def special_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.special_ids]


@given(first=client_text, second=client_text)
def test_special_tokens_come_from_the_template_alone(
    tokenizer: Tokenizer, first: str, second: str
) -> None:
    template = "<|im_start|>user\n{0}<|im_end|>\n{1}<|im_end|>"
    special = tokenizer.special
    ids = encode(tokenizer, template, first, second)
    assert special_of(tokenizer, ids) == [
        special["<|im_start|>user"],
        special[IM_END],
        special[IM_END],
    ]
    assert tokenizer.decode(ids) == f"\n{first}\n{second}"


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{0}{1}", ("<|im_", "start|>")),
        ("{0}{1}", ("<", "|im_start|>")),
        ("<|{0}|>", ("im_start",)),
        ("<{0}", ("|im_start|>",)),
        ("{0}>", ("<|im_start|",)),
        ("<|im_{0}rt|>", ("sta",)),
        ("<|im_{0}tart|>", ("s",)),
        ("한{0}>", ("<국",)),
        ("{0}국>", (" 한< ".strip(),)),
    ],
)
def test_no_special_token_forms_across_a_border(
    tokenizer: Tokenizer, template: str, texts: tuple[str, ...]
) -> None:
    ids = encode(tokenizer, template, *texts)
    assert special_of(tokenizer, ids) == []
    assert tokenizer.decode(ids) == template.format(*texts)


@given(text=client_text)
def test_looking_special_costs_what_the_letters_cost(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, "<|im_end|>{0}<|im_end|>", text)
    assert ids[1:-1] == tokenizer.encode_text(text)


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<[한"), max_size=40))
def test_ordinary_prompts_get_the_official_ids(
    tokenizer: Tokenizer, official: tokenizers.Tokenizer, text: str
) -> None:
    template = "<|im_start|>system\nYou are {0}<|im_end|>\n<|im_start|>user\nx {0}<|im_end|>"
    expected = official.encode(template.format(text), add_special_tokens=False).ids
    assert encode(tokenizer, template, text) == expected


@given(text=client_text)
def test_filters_of_templates_still_do_their_work(tokenizer: Tokenizer, text: str) -> None:
    disguise = Disguise(tokenizer)
    nonce = disguise.new_nonce()
    hidden = disguise.hide(text, nonce=nonce)
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    rendered = environment.from_string("{{ t | trim }}|{{ t | tojson }}").render(t=hidden)
    expected = environment.from_string("{{ t | trim }}|{{ t | tojson }}").render(t=text)
    assert tokenizer.decode(disguise.encode(rendered, nonce=nonce)) == expected


def test_tokens_that_swallow_white_space_do_so(
    description: dict[str, object], tokenizer: Tokenizer
) -> None:
    changed = json.loads(json.dumps(description))
    for token in changed["added_tokens"]:
        if token["content"] == IM_START:
            token["lstrip"] = True
        if token["content"] == IM_END:
            token["rstrip"] = True
    swallowing = Tokenizer(json.dumps(changed))
    official = tokenizers.Tokenizer.from_str(json.dumps(changed))
    text = "a \n <|im_start|> b <|im_end|>\n\n c <|im_start|>"
    assert encode(swallowing, text) == official.encode(text, add_special_tokens=False).ids
    assert encode(tokenizer, text) != encode(swallowing, text)


def test_nonces_differ(tokenizer: Tokenizer) -> None:
    disguise = Disguise(tokenizer)
    assert len({disguise.new_nonce() for _ in range(100)}) == 100
