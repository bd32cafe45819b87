"""An engine process with faults: what a prompt begins with decides what happens in its steps.

And some grammars decide what happens where their matchers are started.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from llguidance import LLMatcher

from server.engine import masks
from server.engine.runner import Runner
from server.engine.sequence import Batch, SpanOutput
from server.engine.worker_main import serve
from server.grammar.matcher import Vocabulary, start_matcher

# Those of HANG and KILL_AFTER_FIRST_TOKEN come in the second step, the others in each.
SLOW, HANG, RAISE, KILL, KILL_AFTER_FIRST_TOKEN = range(240, 245)

KILLING_GRAMMAR, SLOW_GRAMMAR = "kill", "slow"

MODULE = "tests.engine.faulty_worker"


class FaultyRunner:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._faults: dict[int, Callable[[int], None]] = {
            SLOW: lambda num_generated: time.sleep(0.05),
            HANG: lambda num_generated: time.sleep(3600 if num_generated else 0),
            RAISE: self._raise,
            KILL: lambda num_generated: os.kill(os.getpid(), signal.SIGKILL),
            KILL_AFTER_FIRST_TOKEN: self._kill_later,
        }

    def run(self, batch: Batch) -> list[SpanOutput]:
        for span in batch.spans:
            fault = self._faults.get(span.sequence.request.prompt_ids[0])
            if fault is not None:
                fault(span.sequence.num_generated)
        return self._runner.run(batch)

    def _raise(self, num_generated: int) -> None:
        raise RuntimeError("a fault put in by a test")

    def _kill_later(self, num_generated: int) -> None:
        if num_generated:
            time.sleep(0.2)  # the token that came before must have left
            os.kill(os.getpid(), signal.SIGKILL)


def start_faultily(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    if grammar == KILLING_GRAMMAR:
        time.sleep(0.2)  # the word of it must have left
        os.kill(os.getpid(), signal.SIGKILL)
    if grammar == SLOW_GRAMMAR:
        time.sleep(3600)
    return start_matcher(vocabulary, grammar)


if __name__ == "__main__":
    masks.start_matcher = start_faultily
    sys.exit(serve(sys.argv[1], wrap=FaultyRunner))
