"""Masks of real grammars over a random model: whatever the schema, what ends by "stop" is valid."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from server.attention.backend import choose_backend
from server.chat.grammar import parse_constraint
from server.core import GenerationRequest, SamplingParams, TokenEvent
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.masks import GrammarMask, MaskBuilder
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, StepBudget, TokenMask
from server.grammar.matcher import GrammarError, Vocabulary, read_vocabulary
from server.model.checkpoint import load_model
from server.model.config import CheckpointInfo

BLOCK_SIZE = 4
MAX_TOKENS = 150


@pytest.fixture(scope="module")
def vocabulary(tiny_info: CheckpointInfo) -> Vocabulary:
    return read_vocabulary(tiny_info.path)


@pytest.fixture(scope="module")
def builder(vocabulary: Vocabulary, tiny_info: CheckpointInfo) -> Iterator[MaskBuilder]:
    builder = MaskBuilder(vocabulary, num_ids=tiny_info.text.logits_rows)
    yield builder
    builder.close()


@pytest.fixture(scope="module")
def make_runner(tiny_info: CheckpointInfo) -> Callable[[], Runner]:
    backend = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE)
    model = load_model(
        tiny_info, device="cpu", dtype="float32", backend=backend, progress=lambda done, all: None
    )

    def make() -> Runner:
        caches = backend.allocate(
            tiny_info.text.num_layers,
            1024,
            num_kv_heads=tiny_info.text.num_kv_heads,
            head_dim=tiny_info.text.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        return Runner(model, caches, block_size=BLOCK_SIZE, device="cpu")

    return make


class Ask:
    """A model that is asked several requests at once, each for one choice."""

    def __init__(
        self, make_runner: Callable[[], Runner], builder: MaskBuilder, vocabulary: Vocabulary
    ) -> None:
        self.num_preemptions = 0  # the last time, as are those
        self.error_codes: dict[str, str] = {}
        self._make_runner = make_runner
        self._builder = builder
        self._vocabulary = vocabulary

    def __call__(
        self, *requests: GenerationRequest, num_blocks: int = 1024
    ) -> dict[str, tuple[bytes, str | None]]:
        """Bytes and finish reason of each."""
        scheduler = Scheduler(
            BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            EncoderCache(max_bytes=1, bytes_per_token=1),
            budget=StepBudget(1000, 1, 1000),
            max_running=16,
        )
        for request in requests:
            bound = request.grammar is not None
            mask = self._builder.begin(request).result(10)[0] if bound else None
            scheduler.add(Sequence.from_request(request, [], constraint=mask))
        runner = self._make_runner()
        events: list[TokenEvent] = []
        while batch := scheduler.schedule():
            events += scheduler.commit(batch, runner.run(batch))
        scheduler.check()
        self.error_codes = {e.request_id: e.error_code for e in events if e.error_code is not None}
        self.num_preemptions = scheduler.counts.num_preemptions
        return {request.request_id: self._answer(request, events) for request in requests}

    def _answer(
        self, request: GenerationRequest, events: list[TokenEvent]
    ) -> tuple[bytes, str | None]:
        mine = [event for event in events if event.request_id == request.request_id]
        reason = mine[-1].finish_reason
        ids = [event.token_id for event in mine if event.token_id is not None]
        text = ids[:-1] if reason == "stop" else ids
        assert request.grammar is None or not self._vocabulary.added_ids & set(text)
        return self._vocabulary.tokenizer.decode_bytes(text), reason


@pytest.fixture(scope="module")
def ask(make_runner: Callable[[], Runner], builder: MaskBuilder, vocabulary: Vocabulary) -> Ask:
    return Ask(make_runner, builder, vocabulary)


@pytest.fixture(scope="module")
def ends(tiny_info: CheckpointInfo) -> tuple[int, ...]:
    return tiny_info.stop_token_ids


def request_of(
    name: str,
    form: dict[str, Any] | None,
    ends: tuple[int, ...],
    *,
    seed: int = 1,
    **sampling: Any,
) -> GenerationRequest:
    constraint = parse_constraint(None, form)
    params = SamplingParams(
        **({"max_tokens": MAX_TOKENS} | sampling), stop_token_ids=ends, seed=seed
    )
    grammar = None if constraint is None else constraint.grammar
    prompt = tuple(name.encode())
    return GenerationRequest(name, "tenant", prompt, params, grammar=grammar)


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """As far as the schemas below go."""
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    if "anyOf" in schema:
        return any(is_valid(value, each) for each in schema["anyOf"])
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(known)
                and all(is_valid(each, known[name]) for name, each in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(is_valid(each, schema["items"]) for each in value)
            )
        case "string":
            longest = schema["maxLength"]
            return isinstance(value, str) and schema["minLength"] <= len(value) <= longest
        case "integer":
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            return is_integer and schema["minimum"] <= value <= schema["maximum"]
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
    return schema["type"] == "null" and value is None


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
plain = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), names)
leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}]),
    st.lists(plain, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.tuples(st.integers(-500, 500), st.integers(0, 500)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}
    ),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(names, inner, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda made: {
                "type": "array",
                "items": made[0],
                "minItems": made[1],
                "maxItems": made[1] + made[2],
            }
        ),
    ),
    max_leaves=6,
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(wanted=st.lists(schemas, min_size=8, max_size=8), seed=st.integers(0, 1000))
def test_json_that_has_stopped_is_valid(
    ask: Ask, ends: tuple[int, ...], wanted: list[dict[str, Any]], seed: int
) -> None:
    requests = [
        request_of(f"r{index}", {"json": schema}, ends, seed=seed, temperature=0.5 * (index % 4))
        for index, schema in enumerate(wanted)
    ]
    for schema, (text, reason) in zip(wanted, ask(*requests).values(), strict=True):
        assert reason in ("stop", "length")
        if reason == "stop":
            value = json.loads(text)
            assert is_valid(value, schema), (schema, text)
            assert re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text.decode())) is None


def test_the_schemas_of_that_test_are_mostly_kept_to(ask: Ask, ends: tuple[int, ...]) -> None:
    """Else it would show nothing."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["가", 7, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    requests = [request_of(f"r{i}", {"json": schema}, ends, seed=i) for i in range(8)]
    answers = ask(*requests)
    assert {reason for _, reason in answers.values()} == {"stop"}
    assert all(is_valid(json.loads(text), schema) for text, _ in answers.values())
    assert len({text for text, _ in answers.values()}) > 2


def test_a_row_without_a_grammar_is_what_it_is_alone(ask: Ask, ends: tuple[int, ...]) -> None:
    free = request_of("free", None, ends, max_tokens=30, temperature=0)
    bound = request_of("bound", {"regex": "[a-z]{20}"}, ends)
    together = ask(free, bound)
    assert together["free"] == ask(free)["free"]
    text, reason = together["bound"]
    assert (len(text), text.isalpha(), reason) == (20, True, "stop")


def test_what_is_computed_again_goes_on_in_its_grammar(ask: Ask, ends: tuple[int, ...]) -> None:
    """With few blocks some have to give theirs up in the middle of their answer."""
    requests = [
        request_of(f"r{i}", {"regex": "(a[0-9]b[0-9]){8}"}, ends, seed=i, max_tokens=40)
        for i in range(4)
    ]
    plenty = ask(*requests)
    assert ask.num_preemptions == 0
    assert ask(*requests, num_blocks=14) == plenty
    assert ask.num_preemptions > 0
    assert all(len(text) == 32 and reason == "stop" for text, reason in plenty.values())


def test_an_end_comes_where_it_may_and_nowhere_else(
    ask: Ask, ends: tuple[int, ...], vocabulary: Vocabulary
) -> None:
    """Whatever pushes it; and an ordinary id that ends the answer is an end and no text."""
    pushed: dict[str, Any] = {"logit_bias": tuple((each, 100.0) for each in ends)}
    b = id_of(vocabulary, "b")
    asked = {
        "early": request_of("early", {"regex": "a{3,9}"}, ends, **pushed),
        "late": request_of("late", {"regex": "a{3,9}"}, ends, min_tokens=6, **pushed),
        "short": request_of("short", {"regex": "a{3}"}, ends, min_tokens=50),
        "cut": request_of("cut", {"regex": "a{9}"}, ends, max_tokens=4),
        "letter": request_of("letter", {"regex": "a{3}[ab]*"}, (b,), logit_bias=((b, 100.0),)),
        "caught": request_of("caught", {"regex": "a{3}b"}, (b,)),
    }
    assert ask(*asked.values()) == {
        "early": (b"aaa", "stop"),
        "late": (b"aaaaaa", "stop"),
        "short": (b"aaa", "stop"),
        "cut": (b"aaaa", "length"),
        "letter": (b"aaa", "stop"),
        # Its only way on is closed: this request fails, and no other.
        "caught": (b"aaa", "error"),
    }


def test_special_and_reserved_ids_and_those_without_a_token_are_no_text(
    vocabulary: Vocabulary, tiny_info: CheckpointInfo
) -> None:
    width = tiny_info.text.logits_rows + 100
    reserved, free = id_of(vocabulary, "a"), id_of(vocabulary, "b")
    builder = MaskBuilder(vocabulary, num_ids=width, reserved_ids=[reserved])
    everything = request_of("r", {"grammar": "start: /(.|\\n)*/"}, (300,))
    [mask] = builder.begin(everything).result(10)
    ids = allowed_ids(mask, width)
    assert 300 in ids and free in ids
    assert not ids & ({reserved} | vocabulary.added_ids)
    assert max(ids - {300}) < vocabulary.tokenizer.vocab_size
    named = request_of("r", {"grammar": f"start: <[0-{max(vocabulary.added_ids)}]>"}, (299,))
    [mask] = builder.begin(named).result(10)
    assert not allowed_ids(mask, width) & vocabulary.added_ids
    special = min(vocabulary.added_ids)
    [mask] = builder.begin(replace(named, grammar_special_ids=(special,))).result(10)
    assert allowed_ids(mask, width) & vocabulary.added_ids == {special}
    builder.close()


def id_of(vocabulary: Vocabulary, text: str) -> int:
    [token_id] = vocabulary.tokenizer.tokenize_str(text)
    return token_id


def allowed_ids(mask: TokenMask, num_ids: int) -> set[int]:
    words = mask.allowed()
    assert words is not None and words.shape == (-(-num_ids // 32),)
    bits = np.unpackbits(words.astype("<i4").view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_asking_changes_nothing_and_choices_go_apart(builder: MaskBuilder) -> None:
    request = replace(request_of("r", {"choice": ["ab", "cd"]}, (256,)), num_choices=2)
    first, second = builder.begin(request).result(10)
    beginning = allowed_ids(first, 272)
    assert beginning == allowed_ids(first, 272) == allowed_ids(second, 272)
    first.accept(min(beginning))
    assert allowed_ids(first, 272) != beginning == allowed_ids(second, 272)
    second.accept(256)  # no way on from there
    assert allowed_ids(second, 272) == allowed_ids(second, 272) == set()


def test_a_grammar_that_is_none_fails_and_what_waits_can_be_dropped(
    vocabulary: Vocabulary,
) -> None:
    builder = MaskBuilder(vocabulary, num_ids=300)
    request = replace(request_of("r", {"regex": "a"}, ()), grammar="{}")
    with pytest.raises(GrammarError):
        builder.begin(request).result(10)
    with pytest.raises(ValueError, match="needs no mask"):
        builder.begin(replace(request, grammar=None)).result(10)
    waiting = [builder.begin(request) for _ in range(50)]
    builder.close()
    with pytest.raises((CancelledError, GrammarError)):
        waiting[-1].result(10)


def test_a_grammar_is_started_once_for_each_tenant(builder: MaskBuilder) -> None:
    """And what is known goes its own way from the beginning."""
    request = replace(request_of("r", {"choice": ["ef", "gh"]}, (256,)), num_choices=2)
    assert builder.known(request) is None
    [made, _] = builder.begin(request).result(10)
    beginning = allowed_ids(made, 272)
    made.accept(min(beginning))
    known = builder.known(request)
    assert known is not None and len(known) == 2
    assert [allowed_ids(each, 272) for each in known] == [beginning, beginning]
    known[0].accept(max(beginning))
    assert allowed_ids(known[0], 272) != allowed_ids(made, 272) != beginning
    assert builder.known(replace(request, tenant="another")) is None


class SlowMatcher:
    """Allows every id, but says so only when it `may` go on."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.consumed: list[int] = []

    def is_error(self) -> bool:
        return False

    def is_accepting(self) -> bool:
        return False

    def consume_token(self, token_id: int) -> None:
        self.consumed.append(token_id)

    def compute_bitmask(self) -> bytes:
        assert self.may.wait(10)
        return b"\xff" * 4


def test_nobody_waits_for_the_next_mask_until_it_is_asked_for() -> None:
    matcher = SlowMatcher()
    words = np.array([-1], np.int32)
    with ThreadPoolExecutor(1) as threads:
        mask = GrammarMask(
            cast(LLMatcher, matcher), texts=words, ends=np.zeros_like(words), threads=threads
        )
        matcher.may.set()
        assert mask.allowed().tolist() == [-1]
        matcher.may.clear()
        mask.accept(7)
        opening = threading.Timer(0.1, matcher.may.set)
        opening.start()
        assert not matcher.may.is_set()
        assert mask.allowed().tolist() == [-1] and matcher.may.is_set()
    assert matcher.consumed == [7]


def test_a_form_that_turns_out_too_complex_ends_its_answer_and_no_other(
    ask: Ask, ends: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """It is no fault of ours, and no second try would help."""
    many = " | ".join(f'x{number}? "y"' for number in range(2000))
    rules = "\n".join(f'x{number}: "z{number}"' for number in range(2000))
    hard = request_of("hard", {"grammar": f'start: "qqq" many\nmany: {many}\n{rules}'}, ends)
    easy = request_of("easy", {"regex": "[a-z]{40}"}, ends)
    answers = ask(hard, easy)
    assert answers["easy"][1] == "stop"
    text, reason = answers["hard"]
    assert text.startswith(b"q") and reason == "error"
    assert ask.error_codes == {"hard": "invalid_json_schema"}
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_form_that_takes_too_long_for_a_token_ends_its_answer(
    ask: Ask, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = request_of("slow", {"grammar": "start: s\ns: s s s | s s | /[a-z ]/"}, ends)
    assert ask(slow)["slow"][1] in ("stop", "length")
    monkeypatch.setattr("server.engine.masks.MAX_TOKEN_S", 0.0)
    text, reason = ask(slow)["slow"]
    assert (len(text), reason) == (1, "error")
    assert ask.error_codes == {"slow": "invalid_json_schema"}
