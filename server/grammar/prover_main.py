"""The process in which a stranger's grammar is tried, and which may be lost over it.

A line in is a grammar as a JSON string, a line out what became of it. It holds nothing but the
vocabulary. Whoever started it kills it when it takes too long; if that one is gone, an alarm does.
"""

from __future__ import annotations

import ctypes
import json
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TextIO

import numpy as np
from llguidance import LLMatcher

from server.grammar.matcher import (
    MAX_TOKEN_S,
    PROOF_STACK_BYTES,
    GrammarError,
    Vocabulary,
    matcher_bytes,
    read_vocabulary,
    start_matcher,
)

MAX_DETAIL_CHARS: Final = 64

MAX_START_S: Final = 0.5
NUM_STEPS_TRIED: Final = 16

_VERDICTS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r'Unimplemented keys: \["((?:[^"\\]|\\.)*)"'), "keyword"),
    (re.compile(r"^(oneOf) constraints"), "keyword"),
    (re.compile(r"Unknown format: (.*)"), "format"),
    (re.compile(r"Resource '|Pointer '"), "reference"),
    (re.compile(r"look-around"), "look-around"),
    (re.compile(r"[Uu]nsatisfiable|nothing may come|NoExtension"), "unsatisfiable"),
    (
        re.compile(r"too large|too complex|too many|[Uu]nable to determine|limit|fuel|; max is"),
        "complex",
    ),
)
"""What the library says of a grammar -> our word for it. A group is a word of the client's."""


def serve(folder: Path, lines: TextIO, out: TextIO, *, memory_bytes: int, alarm_s: int) -> None:
    """Returns at the end of `lines`."""
    vocabulary = read_vocabulary(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    threading.stack_size(PROOF_STACK_BYTES)
    _say(out, "ready")
    for line in lines:
        signal.alarm(alarm_s)
        # In a thread, because the stack of a process is what its machine says.
        with ThreadPoolExecutor(1) as thread:
            verdict = thread.submit(_tried, vocabulary, json.loads(line)).result()
        _say(out, *verdict)
        signal.alarm(0)


def _tried(vocabulary: Vocabulary, grammar: str) -> tuple[str, str]:
    """(verdict, detail); both are empty where an answer can be made by the grammar.

    The engine will do the same: a grammar that takes it too long to start, or to go on by, is too
    complex, because other answers wait for that; and so is one that takes more memory than the
    engine's cache counts for it.
    """
    started_s, bytes_before = time.process_time(), _heap_bytes()
    try:
        matcher = start_matcher(vocabulary, grammar)
        is_small = _heap_bytes() - bytes_before <= matcher_bytes(grammar)
        is_soon = time.process_time() - started_s <= MAX_START_S
        if not (is_small and is_soon and _goes_on_well(matcher)):
            return "complex", ""
    except GrammarError as error:
        for pattern, verdict in _VERDICTS:
            found = pattern.search(str(error))
            if found:
                return verdict, (found[1] if pattern.groups else "")[:MAX_DETAIL_CHARS]
        return "invalid", ""
    return "", ""


def _goes_on_well(matcher: LLMatcher) -> bool:
    """Whether a first few tokens can be taken in time, some that come first and some that last."""
    for step in range(NUM_STEPS_TRIED):
        started_s = time.process_time()
        allowed = np.unpackbits(
            np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"
        ).nonzero()[0]
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        if not len(allowed):
            return matcher.is_accepting()
        matcher.consume_token(int(allowed[0 if step % 2 else -1]))
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        if time.process_time() - started_s > MAX_TOKEN_S:
            return False
        if matcher.is_stopped():
            break
    return True


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo`; its numbers wrap at 2 GiB, which this process never has."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _heap_bytes() -> int:
    """What of the heap is in use, to the byte: nothing but a matcher is made meanwhile."""
    mallinfo = ctypes.CDLL(None).mallinfo
    mallinfo.restype = _HeapInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def _say(out: TextIO, verdict: str, detail: str = "") -> None:
    out.write(json.dumps([verdict, detail]) + "\n")
    out.flush()


if __name__ == "__main__":
    serve(
        Path(sys.argv[1]),
        sys.stdin,
        sys.stdout,
        memory_bytes=int(sys.argv[2]),
        alarm_s=int(sys.argv[3]),
    )
