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
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Final

from server.errors import InvalidSchema, RateLimited, ServerError, Unavailable, quoted

ENTRY_MODULE: Final = "server.grammar.prover_main"
TIMEOUT_S: Final = 5.0
LOADING_TIMEOUT_S: Final = 60.0
MEMORY_BYTES: Final = 1 << 30
"""The whole process's address space, of which the largest vocabularies take some 100 MB."""

MAX_VERDICTS: Final = 256
"""Each is a digest and a message of ours: together some 100 KB."""

MAX_WAITING: Final = 32
"""So many times the timeout is the longest wait for a turn."""

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


class Prover:
    """One process at a time, started when it is first needed and again after it was lost.

    Grammars take turns. What was found of the last ones is kept.
    """

    def __init__(
        self, checkpoint: Path, *, timeout_s: float = TIMEOUT_S, entry_module: str = ENTRY_MODULE
    ) -> None:
        """`checkpoint` is the folder with the tokenizer.json that the engine reads too."""
        self._checkpoint = checkpoint
        self._timeout_s = timeout_s
        self._entry_module = entry_module
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting: Counter[str] = Counter()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def prove(self, grammar: str, *, param: str, tenant: str = "") -> None:
        """Returns if an answer can be made by it, else raises InvalidSchema.

        Unavailable where too many wait, RateLimited where half of them are this tenant's.
        """
        digest = hashlib.sha256(grammar.encode()).digest()
        message = self._verdicts.get(digest)
        if message is None:
            message = await self._in_turn(digest, grammar, tenant)
        else:
            self._verdicts.move_to_end(digest)
        if message:
            raise InvalidSchema(f"{param} cannot be used. {message}", param=param)

    async def _in_turn(self, digest: bytes, grammar: str, tenant: str) -> str:
        if self._waiting.total() >= MAX_WAITING:
            raise Unavailable(shortage="grammars")
        # Without keys everybody is one tenant, who may fill the line.
        if tenant and self._waiting[tenant] >= MAX_WAITING // 2:
            raise RateLimited("Too many forms of this client are being checked.")
        self._waiting[tenant] += 1
        try:
            async with self._turn:
                known = self._verdicts.get(digest)
                if known is not None:
                    return known
                message, is_final = await self._try(grammar)
                if is_final:
                    self._keep(digest, message)
                return message
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def stop(self) -> None:
        """Ends the process. Nothing may be proved any more."""
        async with self._turn:
            await self._kill()

    def _keep(self, digest: bytes, message: str) -> None:
        self._verdicts[digest] = message
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _try(self, grammar: str) -> tuple[str, bool]:
        """What is wrong with it, or nothing; and whether that will be so another time.

        A process may have been lost before, through nobody's fault here: so a second one is asked.
        """
        for _ in range(2):
            process = await self._started()
            try:
                verdict, detail = await self._ask(process, grammar)
            except TimeoutError:
                await self._kill()
                break
            except _Lost:
                await self._kill()
            except BaseException:  # whoever waited has left: the next must not read this answer
                await self._kill()
                raise
            else:
                return (_MESSAGES[verdict].format(detail=quoted(detail)) if verdict else ""), True
        # On a busy machine that may have been somebody else's fault.
        return f"It is too complex: {self._timeout_s:g} s were not enough, or its memory.", False

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
            env={"LC_CTYPE": "C.UTF-8", "PYTHONPATH": ":".join(path for path in sys.path if path)},
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
