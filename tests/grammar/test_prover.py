"""The prover with its real process, and with one that does all it should not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.chat.grammar import parse_constraint
from server.errors import InvalidSchema, Unavailable
from server.grammar.matcher import read_vocabulary
from server.grammar.prover import MAX_WAITING, Prover

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEMO = Path(__file__).parents[2] / "server" / "demo"
STUBBORN = "tests.grammar.stubborn_prover"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prover() -> AsyncIterator[Prover]:
    prover = Prover(DEMO)
    yield prover
    await prover.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def stubborn() -> AsyncIterator[Prover]:
    prover = Prover(DEMO, timeout_s=0.5, entry_module=STUBBORN)
    yield prover
    await prover.stop()


async def message_of(prover: Prover, grammar: str) -> str:
    with pytest.raises(InvalidSchema) as caught:
        await prover.prove(grammar, param="the.param")
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "the.param")
    assert caught.value.message.startswith("the.param cannot be used. ")
    return caught.value.message.removeprefix("the.param cannot be used. ")


def grammar_of(form: str, value: object) -> str:
    constraint = parse_constraint(None, {form: value})
    assert constraint is not None
    return constraint.grammar


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("json", {}),
        ("json", {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
        ("regex", r"(a|b)+/\/\d{1,3}"),
        ("grammar", 'start: ""'),
        ("choice", ['a"\\', "/", "\n", "\u2028가"]),
        ("grammar", 'start: a+\na: "x" | /y/'),
    ],
)
async def test_what_can_be_matched_is_good(prover: Prover, form: str, value: object) -> None:
    await prover.prove(grammar_of(form, value), param="p")


@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        ("json", {"not": {}}, "It uses 'not', which is not supported."),
        ("json", {"oneOf": [{}, {}]}, "It uses 'oneOf'"),
        ("json", {"type": "string", "format": "가\n" * 90}, "It uses the format '\\uac00"),
        ("json", {"format": "x", "type": "string"}, "It uses the format 'x'"),
        ("json", {"$ref": "#/$defs/a"}, "It refers to something that is not there"),
        ("json", {"enum": []}, "Nothing satisfies it."),
        ("json", {"type": "thing"}, "It is not valid."),
        ("json", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "Nothing"),
        ("regex", "(?=a)b", "It looks ahead or behind"),
        ("regex", "[", "It is not valid."),
        ("grammar", "start: thing", "It is not valid."),
        ("grammar", "start: <|im_end|>", "Nothing satisfies it."),
        ("grammar", "start: <[3]>", "Nothing satisfies it."),
        ("grammar", '{"grammars": []}', "It is not valid."),
    ],
)
async def test_what_cannot_is_told_in_our_words(
    prover: Prover, form: str, value: object, message: str
) -> None:
    assert (await message_of(prover, grammar_of(form, value))).startswith(message)


async def test_a_grammar_that_takes_too_long_is_ended_and_the_next_one_is_tried(
    stubborn: Prover,
) -> None:
    pid = int((await message_of(stubborn, "pid")).split("'")[1])
    for bad in ("hang", "die", "lie"):
        assert "too complex" in await message_of(stubborn, bad)
        await stubborn.prove(f"after {bad}", param="p")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_process_that_was_lost_meanwhile_is_no_fault_of_the_next_grammar(
    stubborn: Prover,
) -> None:
    pid = int((await message_of(stubborn, "pid")).split("'")[1])
    os.kill(pid, signal.SIGKILL)
    await stubborn.prove("good", param="p")


async def test_what_was_found_is_kept(stubborn: Prover) -> None:
    """The process that says its number is gone, and still it is told."""
    first = await message_of(stubborn, "pid")
    assert "too complex" in await message_of(stubborn, "die")
    assert await message_of(stubborn, "pid") == first
    for number in range(300):
        await stubborn.prove(f"good {number}", param="p")
    assert await message_of(stubborn, "pid") != first


async def test_who_leaves_takes_his_answer_with_him(stubborn: Prover) -> None:
    waiting = asyncio.create_task(stubborn.prove("hang", param="p"))
    await asyncio.sleep(0.2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await stubborn.prove("good", param="p")


async def test_so_many_wait_and_no_more() -> None:
    prover = Prover(DEMO, timeout_s=600, entry_module=STUBBORN)
    await prover.prove("known", param="p")
    waiting = [asyncio.create_task(prover.prove("hang", param="p")) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await prover.prove("another", param="p")
    await prover.prove("known", param="p")
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await prover.prove("another", param="p")
    await prover.stop()


async def test_the_grammar_is_not_code_of_the_library_s_own(prover: Prover) -> None:
    """A Lark grammar that looks like the wrapper around one is still a Lark grammar."""
    inner = json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})
    assert await message_of(prover, grammar_of("grammar", inner)) == "It is not valid."


async def test_special_tokens_are_known_as_such() -> None:
    vocabulary = read_vocabulary(DEMO)
    assert vocabulary.added_ids == set(range(7))
    assert all(vocabulary.tokenizer.is_special_token(each) for each in vocabulary.added_ids)
