"""The prover with its real process, and with one that does all it should not."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.chat.grammar import parse_constraint
from server.errors import InvalidSchema, RateLimited, ShuttingDown, Unavailable
from server.grammar.matcher import read_vocabulary
from server.grammar.prover import MAX_WAITING, Prover

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEMO = Path(__file__).parents[2] / "server" / "demo"
STUBBORN = "tests.grammar.stubborn_prover"
NUMBERS = itertools.count()


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


MANY_WAYS = "start: " + " | ".join(f'x{i}? "y"' for i in range(2000)) + "\n"
MANY_WAYS += "\n".join(f'x{i}: "z{i}"' for i in range(2000))


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


def object_of(number: int, *, required: bool, **schema: object) -> dict[str, object]:
    names = [f"member_{index}" for index in range(number)]
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names if required else [],
        **schema,
    }


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("schema", [{"additionalProperties": False}, {}])
async def test_a_thousand_members_are_possible(
    prover: Prover, required: bool, schema: dict[str, object]
) -> None:
    """As many as a schema may have, whether each must be there or none."""
    await prover.prove(grammar_of("json", object_of(1000, required=required, **schema)), param="p")


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
        ("regex", r"(\w{1,200}\d){1,100}" * 12, "It is too complex."),
        ("grammar", MANY_WAYS, "It is too complex."),
        ("grammar", "start: thing", "It is not valid."),
        ("grammar", "start: <|im_end|>", "It is not valid."),
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


async def pid_of(prover: Prover) -> int:
    """Of the process there is now: asked by another tenant each time, for whom nothing is kept."""
    with pytest.raises(InvalidSchema) as caught:
        await prover.prove("pid", param="p", tenant=str(next(NUMBERS)))
    return int(caught.value.message.split("'")[1])


async def leave(waiting: asyncio.Task[None]) -> None:
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_who_leaves_soon_ends_no_process_and_the_next_reads_his_own_answer(
    stubborn: Prover,
) -> None:
    pid = await pid_of(stubborn)
    leaving = asyncio.create_task(stubborn.prove("soon", param="p"))
    waiting = asyncio.create_task(stubborn.prove("good", param="p"))
    await asyncio.sleep(0.05)
    await leave(leaving)
    await waiting
    assert await pid_of(stubborn) == pid
    # He has been answered meanwhile: nobody is asked a second time.
    await asyncio.wait_for(stubborn.prove("soon", param="p"), 0.1)


async def test_who_leaves_a_proof_without_end_holds_the_process_no_longer_than_a_restart() -> None:
    prover = Prover(DEMO, timeout_s=600, entry_module=STUBBORN)
    pid = await pid_of(prover)
    leaving = asyncio.create_task(prover.prove("hang", param="p"))
    await asyncio.sleep(0.1)
    await leave(leaving)
    assert await asyncio.wait_for(pid_of(prover), 30) != pid
    await prover.stop()


async def test_who_leaves_the_line_or_a_process_that_starts_leaves_it_alone() -> None:
    prover = Prover(DEMO, timeout_s=600, entry_module=STUBBORN)
    starting = asyncio.create_task(prover.prove("hang", param="p"))
    in_line = asyncio.create_task(prover.prove("hang", param="p"))
    await asyncio.sleep(0.01)
    await leave(starting)
    await leave(in_line)
    await asyncio.wait_for(prover.prove("good", param="p"), 30)
    await prover.stop()


async def test_so_many_wait_and_no_more() -> None:
    prover = Prover(DEMO, timeout_s=600, entry_module=STUBBORN)
    await prover.prove("known", param="p")
    waiting = [asyncio.create_task(prover.prove("hang", param="p")) for _ in range(MAX_WAITING + 1)]
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable):
        await prover.prove("another", param="p")
    await prover.prove("known", param="p")
    await prover.stop()
    assert {type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)} == {
        ShuttingDown
    }


async def test_tenants_take_turns_and_the_line_is_nobody_s_alone() -> None:
    prover = Prover(DEMO, timeout_s=600, entry_module=STUBBORN)
    await pid_of(prover)
    done: list[str] = []

    async def ask(tenant: str, number: int) -> None:
        await prover.prove(f"soon {number}", param="p", tenant=tenant)
        done.append(tenant)

    many = [asyncio.create_task(ask("many", number)) for number in range(MAX_WAITING + 1)]
    await asyncio.sleep(0.05)  # the line is full
    few = [asyncio.create_task(ask("few", number)) for number in range(2)]
    await asyncio.gather(*few)
    assert done.count("many") <= 4
    errors = [each for each in await asyncio.gather(*many, return_exceptions=True) if each]
    assert [type(each) for each in errors] == [RateLimited, RateLimited]
    assert done.count("many") == MAX_WAITING - 1
    await prover.stop()


async def test_nobody_learns_by_the_clock_what_another_tenant_has_asked(stubborn: Prover) -> None:
    """What is told anew comes from the process there is now, what is kept from the one before."""

    async def told(tenant: str) -> int:
        with pytest.raises(InvalidSchema) as caught:
            await stubborn.prove("pid", param="p", tenant=tenant)
        return int(caught.value.message.split("'")[1])

    first = await told("one")
    assert "too complex" in await message_of(stubborn, "die")
    assert await told("one") == first
    assert await told("two") != first


async def test_the_grammar_is_not_code_of_the_library_s_own(prover: Prover) -> None:
    """A Lark grammar that looks like the wrapper around one is still a Lark grammar."""
    inner = json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})
    assert await message_of(prover, grammar_of("grammar", inner)) == "It is not valid."


async def test_special_tokens_are_known_as_such() -> None:
    vocabulary = read_vocabulary(DEMO)
    assert vocabulary.added_ids == set(range(7))
    assert all(vocabulary.tokenizer.is_special_token(each) for each in vocabulary.added_ids)


async def test_special_tokens_keep_their_ids_whatever_else_was_added(tmp_path: Path) -> None:
    description = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    first = read_vocabulary(DEMO).tokenizer.vocab_size
    model = description["added_tokens"][0]
    names = ["plain", "<|one|>", "plain too", "<|two|>"]
    added = [
        {**model, "content": name, "id": first + index, "special": "|" in name}
        for index, name in enumerate(names)
    ]
    description["added_tokens"] += added
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.tokenizer.vocab_size == first + len(names)
    for token in description["added_tokens"]:
        assert token["id"] in vocabulary.added_ids
        assert vocabulary.tokenizer.is_special_token(token["id"]) is token["special"]
    for name in names:
        ids = vocabulary.tokenizer.tokenize_str(name)
        assert vocabulary.added_ids.isdisjoint(ids)
        assert vocabulary.tokenizer.decode_bytes(ids) == name.encode()
