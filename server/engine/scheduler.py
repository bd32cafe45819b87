"""Decides what each step computes: which sequences, how many positions, which tiles.

It hands out blocks and ends sequences. It knows no tensors, so that it is tested as the state
machine it is.

The present policy is the plainest that is correct: requests join the running set strictly in the
order they came, at most `max_running` of them (the worker says one), and each takes every block it
can come to need when it joins, so that nothing ever has to be preempted. A better policy changes
this file only: the batch it returns already mixes prefill, chunks, decode and vision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as AbstractSequence

from server.core import FinishReason, TokenEvent
from server.engine.blocks import BlockPool
from server.engine.sequence import Batch, Sequence, Span, SpanOutput, VisionSlice


class Scheduler:
    """The waiting and the running sequences; each is in exactly one of the two, or finished."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_tokens_per_step: int,
        max_tiles_per_step: int,
        max_running: int = 1,
    ) -> None:
        self.pool = pool
        self._max_tokens_per_step = max_tokens_per_step
        self._max_tiles_per_step = max_tiles_per_step
        self._max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Last in the queue. What could never fit must have been refused before."""
        if self.pool.blocks_for(sequence.max_tokens) > self.pool.num_blocks:
            raise ValueError("the sequence is longer than the whole cache")
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """Ends the request wherever it is; nothing if it is nowhere any more."""
        return self._end(request_id, "abort")

    def fail(self, request_id: str, *, error_code: str) -> list[TokenEvent]:
        """Ends the request because it cannot be computed."""
        return self._end(request_id, "error", error_code=error_code)

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to do."""
        joined = self._join()
        spans: list[Span] = []
        vision: list[VisionSlice] = []
        tokens_left = self._max_tokens_per_step
        tiles_left = self._max_tiles_per_step
        for sequence in self._running:
            stop = min(len(sequence), sequence.num_computed + tokens_left)
            for medium in sequence.media:
                if medium.is_encoded or medium.start >= stop:
                    continue
                first = medium.num_tiles_encoded
                last = min(medium.num_tiles, first + tiles_left)
                if last > first:
                    vision.append(VisionSlice(sequence, medium, first, last))
                    tiles_left -= last - first
                if last < medium.num_tiles:
                    stop = medium.start  # the rest, and so its embeds, come in a later step
                    break
            if stop > sequence.num_computed:
                spans.append(Span(sequence, sequence.num_computed, stop))
                tokens_left -= len(spans[-1])
        return Batch(spans, vision, joined) if spans or vision else None

    def commit(self, batch: Batch, outputs: AbstractSequence[SpanOutput]) -> list[TokenEvent]:
        """Takes in what the step made, an output for each span; returns what there is to tell."""
        for piece in batch.vision:
            piece.medium.num_tiles_encoded = piece.stop
        events: list[TokenEvent] = []
        for span, output in zip(batch.spans, outputs, strict=True):
            sequence = span.sequence
            sequence.num_computed = span.stop
            if output.error_code is not None:
                events += self.fail(sequence.request_id, error_code=output.error_code)
            elif output.token_id is not None:
                events.append(self._append(sequence, output.token_id))
        return events

    def check(self) -> None:
        """Raises where an invariant is broken; cheap enough for every idle moment."""
        self.pool.check(sequence.block_table for sequence in [*self._waiting, *self._running])
        if any(sequence.status != "waiting" or sequence.block_table for sequence in self._waiting):
            raise RuntimeError("a waiting sequence is not waiting, or holds blocks")
        if any(sequence.status != "running" for sequence in self._running):
            raise RuntimeError("a sequence in the running set is not running")
        if len(self._running) > self._max_running:
            raise RuntimeError("more sequences run than may")

    def _join(self) -> list[Sequence]:
        joined: list[Sequence] = []
        while self._waiting and len(self._running) < self._max_running:
            needed = self.pool.blocks_for(self._waiting[0].max_tokens)
            if needed > self.pool.num_free:
                break  # the first waits for room; nobody overtakes it
            sequence = self._waiting.popleft()
            sequence.status = "running"
            sequence.block_table = self.pool.allocate(needed)
            self._running.append(sequence)
            joined.append(sequence)
        return joined

    def _append(self, sequence: Sequence, token_id: int) -> TokenEvent:
        sequence.token_ids.append(token_id)
        sampling = sequence.request.sampling
        reason: FinishReason | None = None
        if token_id in sampling.stop_token_ids:
            reason = "stop"
        elif sequence.num_generated >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._release(sequence)
        return TokenEvent(sequence.request_id, token_id, reason)

    def _end(
        self, request_id: str, reason: FinishReason, *, error_code: str | None = None
    ) -> list[TokenEvent]:
        for sequence in [*self._running, *self._waiting]:
            if sequence.request_id == request_id:
                self._release(sequence)
                return [TokenEvent(request_id, None, reason, error_code)]
        return []

    def _release(self, sequence: Sequence) -> None:
        if sequence.status == "running":
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.media = []
        sequence.status = "finished"
