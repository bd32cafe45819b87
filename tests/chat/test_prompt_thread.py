"""One thing at a time, tenants in turn, and nobody's line so long that others find no place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from server.chat.prompt_thread import PromptThread
from server.errors import RateLimited, ShuttingDown, Unavailable

pytestmark = pytest.mark.asyncio


class Works:
    """Named works for a thread, noted as they are done; the first one waits for the gate."""

    def __init__(self, thread: PromptThread) -> None:
        self.done: list[str] = []
        self.gate = threading.Event()
        self._begun = threading.Event()
        self._thread = thread

    async def hold(self) -> asyncio.Task[str]:
        def work() -> str:
            self._begun.set()
            assert self.gate.wait(10)
            return "held"

        held = asyncio.create_task(self._thread.run(work, tenant="first"))
        await asyncio.to_thread(self._begun.wait, 10)
        return held

    async def send(self, name: str) -> asyncio.Task[str]:
        """One more of the tenant by whose letter the name begins; it has its place in the line."""
        task = asyncio.create_task(self._thread.run(self._named(name), tenant=name[0]))
        await asyncio.sleep(0)
        return task

    def _named(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.done.append(name)
            return name

        return work


async def test_tenants_take_turns() -> None:
    thread = PromptThread(max_waiting=10)
    works = Works(thread)
    held = await works.hold()
    tasks = [await works.send(name) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    works.gate.set()
    assert await asyncio.gather(held, *tasks) == ["held", "a1", "a2", "a3", "b1", "c1", "b2"]
    assert works.done == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert await (await works.send("d1")) == "d1"
    thread.close()


async def test_whoever_has_most_in_a_full_line_makes_room() -> None:
    thread = PromptThread(max_waiting=3)
    works = Works(thread)
    held = await works.hold()
    tasks = [await works.send(name) for name in ("a1", "a2", "a3")]
    with pytest.raises(Unavailable) as full:
        await (await works.send("a4"))
    assert full.value.shortage == "encodes"
    other = await works.send("b1")
    with pytest.raises(RateLimited):
        await tasks[2]
    with pytest.raises(Unavailable):  # two and one: nobody has too many
        await (await works.send("b2"))
    works.gate.set()
    await asyncio.gather(held, other, *tasks[:2])
    assert works.done == ["a1", "b1", "a2"]
    thread.close()


async def test_whoever_leaves_holds_up_nobody() -> None:
    thread = PromptThread(max_waiting=3)
    works = Works(thread)
    held = await works.hold()
    first, second, third = [await works.send(name) for name in ("a1", "a2", "b1")]
    first.cancel()
    held.cancel()
    await asyncio.wait([first, held])
    works.gate.set()
    assert await asyncio.gather(second, third) == ["a2", "b1"]
    assert "a1" not in works.done
    thread.close()


async def test_a_failed_work_is_the_failure_of_its_caller_alone() -> None:
    thread = PromptThread(max_waiting=3)
    works = Works(thread)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await thread.run(fail, tenant="a")
    assert await (await works.send("a1")) == "a1"
    thread.close()


async def test_who_leaves_while_his_prompt_is_encoded_frees_no_thread() -> None:
    thread = PromptThread(max_waiting=10)
    works = Works(thread)
    held = await works.hold()
    first = await works.send("a1")
    held.cancel()
    await asyncio.sleep(0.05)
    assert not works.done and not first.done()
    second = await works.send("b1")
    works.gate.set()
    assert await asyncio.gather(first, second) == ["a1", "b1"]
    thread.close()


async def test_who_waits_or_comes_when_it_closes_is_told_so() -> None:
    thread = PromptThread(max_waiting=10)
    works = Works(thread)
    held = await works.hold()
    waiting = [await works.send(name) for name in ("a1", "b1")]
    thread.close()
    for each in [*waiting, await works.send("c1")]:
        with pytest.raises(ShuttingDown):
            await each
    works.gate.set()
    assert await held == "held"
    assert works.done == []
