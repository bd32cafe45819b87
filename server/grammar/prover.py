"""Proving grammars in a process of their own, which is killed where it takes too long.

A grammar of a stranger may make the library compute without end or take all memory. So it is tried
here first; only one that has been tried is sent to the engine. Must not know what it was made from.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.errors import InvalidSchema, ServerError, ShuttingDown, quoted
from server.turns import Turns

ENTRY_MODULE: Final = "server.grammar.prover_main"
TIMEOUT_S: Final = 5.0
LOADING_TIMEOUT_S: Final = 60.0
MEMORY_BYTES: Final = 1 << 30
"""The whole process's address space, of which the largest vocabularies take some 100 MB."""

MAX_VERDICTS: Final = 256
"""Each is a digest and a message of ours: together some 100 KB."""

MAX_WAITING: Final = 32
MAX_WAIT_S: Final = 60.0

RESTART_S: Final = 1.0
"""So long a proof may take that nobody waits for any more: another process takes about that."""

_MESSAGES: Final = {
    "keyword": "It uses {detail}, which is not supported.",
    "format": "It uses the format {detail}, which is not supported.",
    "reference": "It refers to something that is not there: only '#/...' is looked up.",
    "look-around": "It looks ahead or behind, which is not supported.",
    "unsatisfiable": "Nothing satisfies it.",
    "complex": "It is too complex.",
    "invalid": "It is not valid.",
}


class _Lost(Exception):
    """The process has ended, or does not do as agreed."""


@dataclass(slots=True, eq=False)
class _Trial:
    """A grammar on its way through the process, which is asked at `asked_s` by the loop's clock."""

    grammar: str
    key: bytes
    has_turn: bool = False
    asked_s: float | None = None
    is_left: bool = False


class Prover:
    """One process at a time, started when it is first needed and again after it was lost.

    Tenants take turns, and where the line is full, whoever holds most of it makes room. What was
    found of the last grammars is kept.
    """

    def __init__(
        self, checkpoint: Path, *, timeout_s: float = TIMEOUT_S, entry_module: str = ENTRY_MODULE
    ) -> None:
        """`checkpoint` is the folder with the tokenizer.json that the engine reads too."""
        self._checkpoint = checkpoint
        self._timeout_s = timeout_s
        self._entry_module = entry_module
        self._process: asyncio.subprocess.Process | None = None
        self._turns = Turns(
            max_running=1, max_per_place=1, max_waiting=MAX_WAITING, shortage="grammars"
        )
        self._tasks: set[asyncio.Task[str]] = set()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def prove(self, grammar: str, *, param: str, tenant: str = "") -> None:
        """Returns if an answer can be made by it, else raises InvalidSchema.

        Unavailable where too many wait, or for too long; RateLimited for one that must make room
        for another tenant's.
        """
        # Of each tenant by itself, so that nobody learns by the clock what another has asked for.
        key = hashlib.sha256(f"{tenant}\0{grammar}".encode()).digest()
        message = self._verdicts.get(key)
        if message is None:
            message = await self._try_in_turn(_Trial(grammar, key), tenant)
        else:
            self._verdicts.move_to_end(key)
        if message:
            raise InvalidSchema(f"{param} cannot be used. {message}", param=param)

    async def stop(self) -> None:
        """Ends the process. Nothing may be proved any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kill()

    async def _try_in_turn(self, trial: _Trial, tenant: str) -> str:
        """In a task of its own, which a caller who leaves does not take with him at once."""
        task = asyncio.create_task(self._await_turn(trial, tenant))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._leave(trial, task)
            raise
        if task.cancelled():
            raise ShuttingDown
        return task.result()

    def _forget(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody else may be there to look at it

    def _leave(self, trial: _Trial, task: asyncio.Task[str]) -> None:
        """Ends what nobody waits for any more; but its process only where that is worth it."""
        trial.is_left = True
        if not trial.has_turn:
            task.cancel()
        elif trial.asked_s is not None:
            asyncio.get_running_loop().call_at(trial.asked_s + RESTART_S, task.cancel)

    async def _await_turn(self, trial: _Trial, tenant: str) -> str:
        async with self._turns.turn("", tenant=tenant, max_wait_s=MAX_WAIT_S):
            known = self._verdicts.get(trial.key)
            if known is not None:
                return known
            trial.has_turn = True
            message, is_final = await self._try(trial)
            if is_final:
                self._keep(trial.key, message)
            return message

    def _keep(self, key: bytes, message: str) -> None:
        self._verdicts[key] = message
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _try(self, trial: _Trial) -> tuple[str, bool]:
        """What is wrong with it, or nothing; and whether that will be so another time.

        A process may have been lost before, through nobody's fault here: so a second one is asked.
        """
        for _ in range(2):
            process = await self._started()
            if trial.is_left:
                return "", False
            trial.asked_s = asyncio.get_running_loop().time()
            try:
                verdict, detail = await self._ask(process, trial.grammar)
            except TimeoutError:
                await self._kill()
                break
            except _Lost:
                await self._kill()
            except BaseException:  # it was given up: the next must not read this answer
                await self._kill()
                raise
            else:
                return (_MESSAGES[verdict].format(detail=quoted(detail)) if verdict else ""), True
        else:  # two processes were lost over it within their time
            return _MESSAGES["complex"], True
        # On a busy machine that may have been somebody else's fault.
        return f"It is too complex: {self._timeout_s:g} s were not enough.", False

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", self._entry_module, str(self._checkpoint.resolve())],
            *[str(MEMORY_BYTES), str(math.ceil(2 * self._timeout_s))],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            # Where this package lies, so that the child finds the same one.
            cwd=Path(__file__).resolve().parents[2],
            env={
                "LC_CTYPE": "C.UTF-8",
                "MALLOC_ARENA_MAX": "1",  # so that what it measures of its heap is all of it
                "PYTHONPATH": ":".join(path for path in sys.path if path),
            },
            start_new_session=True,
        )
        try:
            await _answer_of(self._process, timeout_s=LOADING_TIMEOUT_S)
        except (TimeoutError, _Lost):
            await self._kill()
            raise ServerError from None
        except BaseException:
            await self._kill()
            raise
        return self._process

    async def _ask(self, process: asyncio.subprocess.Process, grammar: str) -> tuple[str, str]:
        assert process.stdin is not None
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        return await _answer_of(process, timeout_s=self._timeout_s)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _answer_of(process: asyncio.subprocess.Process, *, timeout_s: float) -> tuple[str, str]:
    """The next one; TimeoutError where it does not come."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(timeout_s):
            line = await process.stdout.readline()
        verdict, detail = json.loads(line)
    except TimeoutError:
        raise
    except (ValueError, OSError) as error:
        raise _Lost from error
    if verdict not in ("", "ready", *_MESSAGES) or not isinstance(detail, str):
        raise _Lost
    return verdict, detail
