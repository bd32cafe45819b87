"""Masks of grammars: which ids may come next where an answer has a form to keep to.

No step waits for a grammar to be started, which has a thread of its own; nor, as a rule, for the
next mask of an answer, which is made beside the step that computes its token. Must not know how ids
are drawn, nor what a grammar stands for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from server.core import GenerationRequest
from server.engine.grammars import GrammarCache
from server.engine.sequence import TokenMask
from server.grammar.matcher import MAX_TOKEN_S, Vocabulary, matcher_bytes, start_matcher

MAX_MASK_THREADS = 4
"""Masks that are made at once. They take turns with the model for the cores of a CPU."""

Words = npt.NDArray[np.int32]
"""int32 [ceil(ids / 32)], a bit an id: see `TokenMask.allowed`."""

_log = logging.getLogger(__name__)


class GrammarMask:
    """One answer's way through its grammar. Only one thread at a time has its matcher."""

    def __init__(
        self, matcher: LLMatcher, *, texts: Words, ends: Words, threads: ThreadPoolExecutor
    ) -> None:
        """`texts` are the ids that may be part of an answer, `ends` those that end this one.

        An end is allowed exactly where the grammar is satisfied, whatever text it stands for.
        """
        self._matcher = matcher
        self._texts = texts & ~ends
        self._ends = ends
        self._threads = threads
        self._allowed = threads.submit(self._computed)

    def allowed(self) -> Words:
        return self._allowed.result()

    def accept(self, token_id: int) -> None:
        if not self._allowed.done():
            wait([self._allowed])
        self._allowed = self._threads.submit(self._after, token_id)

    def _after(self, token_id: int) -> Words:
        started_s = time.thread_time()
        self._matcher.consume_token(token_id)  # where it is no good, nothing is allowed after it
        words = self._computed()
        if time.thread_time() - started_s > MAX_TOKEN_S:
            # Where there are ever more ways to read what is written, the next takes longer still.
            _log.info("A grammar takes too long to follow.")
            return np.zeros_like(words)
        return words

    def _computed(self) -> Words:
        words = np.zeros_like(self._texts)
        if not self._matcher.is_error():
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(words)]
            np.bitwise_and(mask, self._texts[: len(mask)], out=words[: len(mask)])
        if self._matcher.is_error():
            _log.info("A grammar can be followed no further: %s.", self._matcher.stop_reason())
            return np.zeros_like(words)
        return words | self._ends if self._matcher.is_accepting() else words


class MaskBuilder:
    """Makes the masks of requests that have a grammar."""

    def __init__(
        self, vocabulary: Vocabulary, *, num_ids: int, reserved_ids: Collection[int] = ()
    ) -> None:
        """`num_ids` is the width of the logits. No text has a reserved id."""
        self._vocabulary = vocabulary
        self._num_ids = num_ids
        num_texts = min(num_ids, vocabulary.tokenizer.vocab_size)
        self._texts = _words(
            set(range(num_texts)) - vocabulary.added_ids - set(reserved_ids), num_ids
        )
        self._known: GrammarCache[LLMatcher] = GrammarCache()
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._threads = ThreadPoolExecutor(
            min(MAX_MASK_THREADS, os.cpu_count() or 1), thread_name_prefix="mask"
        )

    def known(self, request: GenerationRequest) -> list[TokenMask] | None:
        """One mask for each choice where its grammar has been started before, else None."""
        matcher = self._known.get(_key(request))
        return None if matcher is None else self._copies(matcher, request)

    def begin(self, request: GenerationRequest) -> Future[list[TokenMask]]:
        """One mask for each choice; or, as the exception, why there is none."""
        return self._starter.submit(self._build, request)

    def close(self) -> None:
        """Drops what waits for a thread; what runs ends by itself."""
        self._starter.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _build(self, request: GenerationRequest) -> list[TokenMask]:
        if request.grammar is None:
            raise ValueError("a request without a grammar needs no mask")
        matcher = self._known.get(_key(request))  # since the request was given its turn
        if matcher is None:
            matcher = start_matcher(self._vocabulary, request.grammar)
            num_bytes = matcher_bytes(request.grammar)
            self._known.put(_key(request), matcher, num_bytes=num_bytes)
        return self._copies(matcher, request)

    def _copies(self, matcher: LLMatcher, request: GenerationRequest) -> list[TokenMask]:
        ends = _words(request.sampling.stop_token_ids, self._num_ids)
        texts = self._texts | _words(request.grammar_special_ids, self._num_ids)
        return [
            GrammarMask(matcher.deep_copy(), texts=texts, ends=ends, threads=self._threads)
            for _ in range(request.num_choices)
        ]


def _key(request: GenerationRequest) -> tuple[str, str | None]:
    """With the tenant: else anybody could time whether somebody uses a grammar he has guessed."""
    return request.tenant, request.grammar


def _words(ids: Iterable[int], num_ids: int) -> Words:
    bits = np.zeros(-(-num_ids // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
