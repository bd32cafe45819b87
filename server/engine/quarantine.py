"""Requests that were computed when the engine process died, by what they ask for.

Whatever was there when two processes died is refused for a while, whoever sends it: nobody's answer
is worth everybody's. Must not know how a request is computed, nor why a process died.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from server.core import GenerationRequest

MAX_CRASHES_MET = 2
"""A request that was there at so many is not sent again."""

KEPT_S = 600.0
MAX_KEPT = 4_096


def fingerprint(request: GenerationRequest) -> bytes:
    """SHA-256 of what is computed; the same for whoever asks, and under whatever id."""
    sampling = replace(request.sampling, seed=None)
    asked = replace(
        request,
        request_id="",
        tenant="",
        cache_salt="",
        priority=0,
        prompt_ids=(),
        sampling=sampling,
    )
    digest = hashlib.sha256(np.asarray(request.prompt_ids, np.int64).tobytes())
    digest.update(repr(asked).encode())
    return digest.digest()


class Quarantine:
    """The last crashes that each request met; the oldest are forgotten."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._met: deque[tuple[float, bytes]] = deque(maxlen=MAX_KEPT)

    def meet_crash(self, requests: Iterable[GenerationRequest]) -> None:
        """These were being computed when the process died. What is asked twice counts once."""
        now_s = self._clock()
        self._met.extend((now_s, each) for each in set(map(fingerprint, requests)))

    def bar(self, request: GenerationRequest) -> None:
        """It is known to have been there at so many."""
        self._met.extend([(self._clock(), fingerprint(request))] * MAX_CRASHES_MET)

    def is_barred(self, request: GenerationRequest) -> bool:
        while self._met and self._met[0][0] < self._clock() - KEPT_S:
            self._met.popleft()
        if not self._met:
            return False
        wanted = fingerprint(request)
        return sum(each == wanted for _, each in self._met) >= MAX_CRASHES_MET
