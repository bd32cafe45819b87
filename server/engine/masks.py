"""Masks of grammars: which ids may come next where an answer has a form to keep to.

Matchers are started in a thread of their own, so that no step waits for one. Must not know how ids
are drawn, nor what a grammar stands for.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from server.core import GenerationRequest
from server.engine.sequence import TokenMask
from server.grammar.matcher import Vocabulary, start_matcher

Words = npt.NDArray[np.int32]
"""int32 [ceil(ids / 32)], a bit an id: see `TokenMask.allowed`."""

_log = logging.getLogger(__name__)


class GrammarMask:
    """One answer's way through its grammar."""

    def __init__(self, matcher: LLMatcher, *, texts: Words, ends: Words) -> None:
        """`texts` are the ids that may be part of an answer, `ends` those that end this one.

        An end is allowed exactly where the grammar is satisfied, whatever text it stands for.
        """
        self._matcher = matcher
        self._texts = texts & ~ends
        self._ends = ends
        self._allowed: Words | None = None  # until the next token

    def allowed(self) -> Words:
        if self._allowed is None:
            self._allowed = self._computed()
        return self._allowed

    def accept(self, token_id: int) -> None:
        self._allowed = None
        self._matcher.consume_token(token_id)  # where it is no good, nothing is allowed after it

    def _computed(self) -> Words:
        words = np.zeros_like(self._texts)
        if not self._matcher.is_error():
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(words)]
            np.bitwise_and(mask, self._texts[: len(mask)], out=words[: len(mask)])
        if self._matcher.is_error():
            _log.error("A grammar can be followed no further: %s.", self._matcher.stop_reason())
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def begin(self, request: GenerationRequest) -> Future[list[TokenMask]]:
        """One mask for each choice; or, as the exception, why there is none."""
        return self._thread.submit(self._build, request)

    def close(self) -> None:
        """Drops what waits for the thread; what runs ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _build(self, request: GenerationRequest) -> list[TokenMask]:
        if request.grammar is None:
            raise ValueError("a request without a grammar needs no mask")
        matcher = start_matcher(self._vocabulary, request.grammar)
        ends = _words(request.sampling.stop_token_ids, self._num_ids)
        texts = self._texts | _words(request.grammar_special_ids, self._num_ids)
        return [
            GrammarMask(matcher.deep_copy(), texts=texts, ends=ends)
            for _ in range(request.num_choices)
        ]


def _words(ids: Iterable[int], num_ids: int) -> Words:
    bits = np.zeros(-(-num_ids // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
