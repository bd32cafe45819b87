from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.chat.tokenizer import Delta, Detokenizer, TokenChance, Tokenizer, detokenize
from server.core import TokenEvent, TokenLogprobs
from server.errors import CheckpointError, ServerError, ShuttingDown, WorkerRestarting
from tests.chat.conftest import CORPUS, END_OF_TEXT, IM_END, SPECIAL

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "안녕하세요, 그림에 무엇이 있나요?",
    "tabs\tand\n\nnew lines  ",
    "emoji 👩‍👩‍👧 and e\u0301, NUL \x00",
    *SPECIAL,
    "before<|im_start|>after <|endoftext|><|endoftext|>",
]
text_with_specials = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL, "<|", "|>", "<", "[", "안녕"]))
).map("".join)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_never_becomes_special(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)


@given(text=text_with_specials)
def test_any_text_survives_and_never_becomes_special(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("text", [*CORPUS[:2], "Hello  world\n", "안녕 circle"])
def test_ordinary_text_gets_the_official_ids(
    tokenizer: Tokenizer, official: tokenizers.Tokenizer, text: str
) -> None:
    assert tokenizer.encode_text(text) == official.encode(text, add_special_tokens=False).ids


def test_the_special_entry_among_ordinary_ones_would_be_reached(
    description: dict[str, Any], official: tokenizers.Tokenizer, tokenizer: Tokenizer
) -> None:
    """The trap that dropping the added tokens alone would leave open."""
    naive = tokenizers.Tokenizer.from_str(
        json.dumps(
            description
            | {
                "added_tokens": [],
                "pre_tokenizer": {**description["pre_tokenizer"], "use_regex": False},
            }
        )
    )
    special_id = official.token_to_id(END_OF_TEXT)
    assert special_id in naive.encode(END_OF_TEXT).ids
    unsplit = description | {"pre_tokenizer": {**description["pre_tokenizer"], "use_regex": False}}
    ids = Tokenizer(json.dumps(unsplit)).encode_text(END_OF_TEXT)
    assert special_id not in ids
    assert tokenizer.decode(ids) == END_OF_TEXT


def test_stored_truncation_and_padding_do_not_apply(description: dict[str, Any]) -> None:
    truncating = tokenizers.Tokenizer.from_str(json.dumps(description))
    truncating.enable_truncation(3)
    truncating.enable_padding(length=50)
    text = "What is in the picture?" * 3
    assert Tokenizer(truncating.to_str()).encode_text(text) == Tokenizer(
        json.dumps(description)
    ).encode_text(text)


def test_reserved_ids_are_special_though_not_added(description: dict[str, Any]) -> None:
    word, token_id = next(
        (token.replace("Ġ", " "), token_id)
        for token, token_id in description["model"]["vocab"].items()
        if len(token) == 3 and token.startswith("Ġ") and token.isascii() is False
    )
    assert Tokenizer(json.dumps(description)).encode_text(word) == [token_id]
    reserving = Tokenizer(json.dumps(description), reserved_ids=[token_id])
    assert reserving.special[word] == token_id
    assert reserving.token_bytes(token_id) == b""
    assert token_id not in reserving.encode_text(word)
    assert reserving.decode(reserving.encode_text(word)) == word
    with pytest.raises(CheckpointError, match="no token with the id 99999"):
        Tokenizer(json.dumps(description), reserved_ids=[99_999])


def test_special_tokens_have_no_text_but_added_ordinary_ones_do(
    description: dict[str, Any],
) -> None:
    changed = json.loads(json.dumps(description))
    changed["added_tokens"].append(
        {**changed["added_tokens"][0], "id": 900, "content": "<tool>", "special": False}
    )
    tokenizer = Tokenizer(json.dumps(changed))
    assert tokenizer.token_bytes(900) == b"<tool>"
    assert tokenizer.token_bytes(tokenizer.special[IM_END]) == b""
    assert tokenizer.token_bytes(10**6) == b""
    assert 900 not in tokenizer.encode_text("<tool>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "byte-level BPE"),
        ({"model": {"type": "Unigram", "vocab": []}}, "not a tokenizer|byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte-level BPE"),
        ({"model": None}, "not a tokenizer"),
    ],
)
def test_other_kinds_are_refused(
    description: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(json.dumps(description | change))


def test_a_vocabulary_without_a_byte_is_refused(description: dict[str, Any]) -> None:
    vocabulary = {k: v for k, v in description["model"]["vocab"].items() if k != "Ċ"}
    model = description["model"] | {"vocab": vocabulary, "merges": []}
    with pytest.raises(CheckpointError, match="0x0A"):
        Tokenizer(json.dumps(description | {"model": model}))


def test_broken_files_are_refused(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no readable tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One id a byte: the worst way a model can spell a text."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return [by_bytes[bytes([byte])] for byte in data]


def streamed(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, "" if detokenizer.is_stopped else detokenizer.finish()]


def test_hangul_leaves_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    pieces = streamed(tokenizer, byte_ids(tokenizer, "한글".encode()))
    assert pieces == ["", "", "한", "", "", "글", ""]


def test_an_unfinished_character_at_the_end_is_dropped(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, byte_ids(tokenizer, "한글".encode()[:-1]))) == "한"


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, byte_ids(tokenizer, b"a\xff\xc2b"))) == "a\ufffd\ufffdb"


def test_special_ids_in_the_middle_do_not_disturb_a_character(tokenizer: Tokenizer) -> None:
    first, second, third = byte_ids(tokenizer, "한".encode())
    ids = [first, tokenizer.special[IM_END], second, third]
    assert "".join(streamed(tokenizer, ids)) == "한"


@given(text=text_with_specials)
def test_streamed_text_is_the_text_however_it_is_spelled(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode_text(text), byte_ids(tokenizer, text.encode())):
        assert "".join(streamed(tokenizer, ids)) == text


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Slow and plain: the shortest beginning of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        hits = [one for one in stop if text[:end].endswith(one)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


class Pieces:
    """A vocabulary made of the pieces of one text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()


class PiecesWithNames(Pieces):
    def chance_of(self, logprobs: TokenLogprobs) -> TokenChance:
        data = self.token_bytes(logprobs.token_id)
        return TokenChance(data.decode(), data, logprobs.logprob)


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text(alphabet="ab한", max_size=4), max_size=8),
    stop=st.lists(st.text(alphabet="ab한", min_size=1, max_size=4), max_size=4),
)
@example(pieces=["a", "b"], stop=["b", "ab"])
@example(pieces=["abab"], stop=["bab", "ba"])
def test_stop_strings_cut_alike_however_the_text_is_spelled(
    tokenizer: Tokenizer, pieces: list[str], stop: list[str]
) -> None:
    text = "".join(pieces)
    expected = cut_at_stop(text, stop)
    assert "".join(streamed(tokenizer, byte_ids(tokenizer, text.encode()), stop)) == expected
    vocabulary: Any = Pieces(pieces)
    assert "".join(streamed(vocabulary, range(len(pieces)), stop)) == expected


def test_only_a_possible_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, b"x<ab<abc>")
    assert streamed(tokenizer, ids, ["<abc>"]) == ["x", "", "", "", "<ab", "", "", "", "", ""]
    ids = byte_ids(tokenizer, b"x<ab!")
    assert streamed(tokenizer, ids, ["<abc>"]) == ["x", "", "", "", "<ab!", ""]


class Stream:
    """A scripted stream that counts how far it was read."""

    def __init__(self, events: Sequence[TokenEvent]) -> None:
        self.events = list(events)
        self.num_read = 0
        self.closed_choices: list[int] = []
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        for event in self.events:
            self.num_read += 1
            if event.choice not in self.closed_choices:
                yield event

    def close_choice(self, choice: int) -> None:
        self.closed_choices.append(choice)

    def close(self) -> None:
        self.is_closed = True


def events(ids: Sequence[int], reason: Any = "length", code: str | None = None) -> Stream:
    if code is not None:
        tail = [TokenEvent("r", None, "error", code)]
        return Stream([*(TokenEvent("r", i) for i in ids), *tail])
    last = len(ids) - 1
    return Stream([TokenEvent("r", i, reason if n == last else None) for n, i in enumerate(ids)])


async def collect(stream: Stream, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> list[Delta]:
    return [delta async for delta in detokenize(stream, tokenizer, stop=stop)]


async def test_deltas_count_every_token_once(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a한b".encode())
    deltas = await collect(events(ids), tokenizer)
    assert deltas == [Delta("a", None, 1), Delta("한", None, 3), Delta("b", "length", 1)]


async def test_a_stop_string_before_the_least_number_of_tokens_is_text(
    tokenizer: Tokenizer,
) -> None:
    stream = events(byte_ids(tokenizer, b"a.b.c"))
    deltas = [d async for d in detokenize(stream, tokenizer, stop=["."], min_tokens=2)]
    assert "".join(delta.text for delta in deltas) == "a.b"
    assert deltas[-1].finish_reason == "stop"


async def test_the_ending_token_counts_but_is_no_text(tokenizer: Tokenizer) -> None:
    """Also an ordinary token that the caller made an end."""
    ids = byte_ids(tokenizer, b"ab")
    assert await collect(events(ids, "stop"), tokenizer) == [
        Delta("a", None, 1),
        Delta("", "stop", 1),
    ]


async def test_held_text_is_given_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*byte_ids(tokenizer, b"a<"), tokenizer.special[END_OF_TEXT]]
    deltas = await collect(events(ids, "stop"), tokenizer, ["<|"])
    assert deltas == [Delta("a", None, 1), Delta("<", "stop", 2)]


async def test_a_stop_string_ends_the_answer_and_closes_the_stream(tokenizer: Tokenizer) -> None:
    stream = events(byte_ids(tokenizer, b"one\ntwo\n"))
    deltas = detokenize(stream, tokenizer, stop=["\n"])
    seen: list[Delta] = []
    while not seen or seen[-1].finish_reason is None:
        seen.append(await anext(deltas))
    # Closed already, though nobody has resumed the generator.
    assert stream.closed_choices == [0]
    assert "".join(delta.text for delta in seen) == "one"
    assert (seen[-1].finish_reason, sum(delta.num_tokens for delta in seen)) == ("stop", 4)
    assert stream.num_read == 4
    await deltas.aclose()
    assert stream.is_closed


def with_choice(stream: Stream, choice: int) -> list[TokenEvent]:
    return [replace(event, choice=choice) for event in stream.events]


async def test_each_choice_has_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    """Half a character of one never meets the other's; one stops and the other goes on."""
    first = with_choice(events(byte_ids(tokenizer, "한.글".encode())), 0)
    second = with_choice(events(byte_ids(tokenizer, "글한글".encode())), 1)
    together = Stream([event for pair in zip_longest(first, second) for event in pair if event])
    deltas = [d async for d in detokenize(together, tokenizer, stop=["."], num_choices=2)]
    texts = ["".join(delta.text for delta in deltas if delta.choice == n) for n in range(2)]
    assert texts == ["한", "글한글"]
    ends = [(delta.choice, delta.finish_reason) for delta in deltas if delta.finish_reason]
    assert ends == [(0, "stop"), (1, "length")]
    assert [sum(d.num_tokens for d in deltas if d.choice == n) for n in range(2)] == [4, 9]
    assert together.closed_choices == [0, 1] and together.is_closed


def told(
    tokenizer: Tokenizer, data: bytes, *, reason: Any = "length", ids: Sequence[int] = ()
) -> Stream:
    """Each byte with a log-probability of its own: minus its place."""
    plain = events([*byte_ids(tokenizer, data), *ids], reason)
    return Stream(
        [
            replace(event, logprobs=TokenLogprobs(event.token_id or 0, -float(place)))
            for place, event in enumerate(plain.events)
        ]
    )


def places(deltas: Sequence[Delta]) -> list[tuple[str, list[int]]]:
    return [(d.text, [-round(chance.logprob) for chance in d.chances]) for d in deltas]


async def test_a_logprob_comes_with_the_text_of_its_token(tokenizer: Tokenizer) -> None:
    deltas = await collect(told(tokenizer, "a한b".encode()), tokenizer)
    assert places(deltas) == [("a", [0]), ("한", [1, 2, 3]), ("b", [4])]
    shown = [chance for delta in deltas for chance in delta.chances]
    assert b"".join(chance.text_bytes for chance in shown) == "a한b".encode()
    assert [chance.text for chance in shown] == ["a", "\ufffd", "\ufffd", "\ufffd", "b"]


async def test_logprobs_of_text_that_is_held_back_are_held_back_too(tokenizer: Tokenizer) -> None:
    stream = told(tokenizer, b"x<ab!")
    assert places(await collect(stream, tokenizer, ["<abc>"])) == [
        ("x", [0]),
        ("<ab!", [1, 2, 3, 4]),
    ]


async def test_what_a_stop_string_cuts_is_not_told(tokenizer: Tokenizer) -> None:
    stream = told(tokenizer, b"one<abc>two")
    deltas = await collect(stream, tokenizer, ["<abc>"])
    assert [place for _, found in places(deltas) for place in found] == [0, 1, 2]
    assert sum(delta.num_tokens for delta in deltas) == 8


async def test_a_token_of_which_something_is_shown_is_told(tokenizer: Tokenizer) -> None:
    pieces: Any = PiecesWithNames(["ab", "c<", "ab>", "d"])
    plain = events(range(4))
    stream = Stream(
        [replace(e, logprobs=TokenLogprobs(e.token_id or 0, -1.0)) for e in plain.events]
    )
    deltas = await collect(stream, pieces, ["<ab>"])
    shown = [chance.text for delta in deltas for chance in delta.chances]
    assert "".join(delta.text for delta in deltas) == "abc"
    assert shown == ["ab", "c<"]


async def test_the_ending_token_is_not_told_and_an_unfinished_character_is(
    tokenizer: Tokenizer,
) -> None:
    ended = told(tokenizer, b"ab", reason="stop", ids=[tokenizer.special[END_OF_TEXT]])
    assert places(await collect(ended, tokenizer)) == [("a", [0]), ("b", [1]), ("", [])]
    cut = told(tokenizer, "a한".encode()[:-1])
    assert places(await collect(cut, tokenizer)) == [("a", [0]), ("", [1, 2])]


def test_special_tokens_are_told_by_their_names(tokenizer: Tokenizer) -> None:
    special = tokenizer.special[IM_END]
    (letter,) = byte_ids(tokenizer, b"a")
    chance = tokenizer.chance_of(
        TokenLogprobs(letter, -0.5, ((special, -0.1), (letter, -0.5), (10**6, -math.inf)))
    )
    assert (chance.text, chance.text_bytes, chance.logprob) == ("a", b"a", -0.5)
    assert [(top.text, top.logprob) for top in chance.top] == [
        (IM_END, -0.1),
        ("a", -0.5),
        ("", -math.inf),
    ]


async def test_leaving_early_closes_the_stream(tokenizer: Tokenizer) -> None:
    stream = events(byte_ids(tokenizer, b"abc"))
    deltas = detokenize(stream, tokenizer)
    await anext(deltas)
    await deltas.aclose()
    assert stream.is_closed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("worker_restarting", WorkerRestarting),
        ("shutting_down", ShuttingDown),
        ("internal_error", ServerError),
        ("never heard of", ServerError),
    ],
)
async def test_error_events_are_raised(
    tokenizer: Tokenizer, code: str, error: type[ServerError]
) -> None:
    stream = events(byte_ids(tokenizer, b"a"), code=code)
    with pytest.raises(ServerError) as caught:
        await collect(stream, tokenizer)
    assert type(caught.value) is error
    assert stream.is_closed


def test_a_prompt_begins_as_the_tokenizers_own_rules_say(description: dict[str, Any]) -> None:
    """And ordinary text never does, wherever it stands."""
    end = next(each for each in description["added_tokens"] if each["content"] == "<|endoftext|>")
    beginning = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>",
                "ids": [end["id"]],
                "tokens": ["<|endoftext|>"],
            }
        },
    }
    for text in ("안녕 a", "", "<|endoftext|>"):
        with_rule = Tokenizer(json.dumps(description | {"post_processor": beginning}))
        plain = Tokenizer(json.dumps(description)).encode_text(text)
        assert with_rule.encode_text(text) == plain
        assert with_rule.encode_prompt(text) == [end["id"], *plain]
        assert Tokenizer(json.dumps(description)).encode_prompt(text) == plain


def test_tokens_begin_where_their_text_does(tokenizer: Tokenizer) -> None:
    text = "원 a👩 b"
    ids = tokenizer.encode_text(text)
    starts = tokenizer.starts_of(ids)
    assert starts[0] == 0 and starts == sorted(starts)
    for index, start in enumerate(starts):
        before = b"".join(map(tokenizer.token_bytes, ids[:index]))
        assert text.startswith(before.decode("utf-8", errors="ignore"))
        assert len(before.decode("utf-8", errors="ignore")) == start
    assert tokenizer.starts_of([]) == []
