"""The process in which a stranger's grammar is tried, and which may be lost over it.

A line in is a grammar as a JSON string, a line out what became of it. It holds nothing but the
vocabulary. Whoever started it kills it when it takes too long; if that one is gone, an alarm does.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Final, TextIO

from server.grammar.matcher import GrammarError, Vocabulary, read_vocabulary, start_matcher

MAX_DETAIL_CHARS: Final = 64

_VERDICTS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r'Unimplemented keys: \["((?:[^"\\]|\\.)*)"'), "keyword"),
    (re.compile(r"^(oneOf) constraints"), "keyword"),
    (re.compile(r"Unknown format: (.*)"), "format"),
    (re.compile(r"Resource '|Pointer '"), "reference"),
    (re.compile(r"look-around"), "look-around"),
    (re.compile(r"[Uu]nsatisfiable|nothing may come|NoExtension"), "unsatisfiable"),
    (re.compile(r"too large|too complex|too many|[Uu]nable to determine|limit|fuel"), "complex"),
)
"""What the library says of a grammar -> our word for it. A group is a word of the client's."""


def serve(folder: Path, lines: TextIO, out: TextIO, *, memory_bytes: int, alarm_s: int) -> None:
    """Returns at the end of `lines`."""
    vocabulary = read_vocabulary(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _say(out, "ready")
    for line in lines:
        signal.alarm(alarm_s)
        _say(out, *_tried(vocabulary, json.loads(line)))
        signal.alarm(0)


def _tried(vocabulary: Vocabulary, grammar: str) -> tuple[str, str]:
    """(verdict, detail); both are empty where an answer can begin by the grammar."""
    try:
        start_matcher(vocabulary, grammar)
    except GrammarError as error:
        for pattern, verdict in _VERDICTS:
            found = pattern.search(str(error))
            if found:
                return verdict, (found[1] if pattern.groups else "")[:MAX_DETAIL_CHARS]
        return "invalid", ""
    return "", ""


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
