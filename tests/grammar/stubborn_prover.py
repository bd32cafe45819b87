"""A prover's process with a mind of its own: it answers each grammar as that says.

`hang` for ever, `die`, `lie` in words nobody knows, `pid` itself; else the grammar is good: what
begins with `soon` after a moment.
"""

from __future__ import annotations

import json
import os
import sys
import time


def say(verdict: str, detail: str = "") -> None:
    sys.stdout.write(json.dumps([verdict, detail]) + "\n")
    sys.stdout.flush()


say("ready")
for line in sys.stdin:
    grammar = json.loads(line)
    if grammar.startswith("soon"):
        time.sleep(0.1)
    match grammar:
        case "hang":
            time.sleep(600)
        case "die":
            sys.exit(1)
        case "lie":
            say("whatever")
        case "pid":
            say("keyword", str(os.getpid()))
        case _:
            say("")
