"""Decides what each step computes: which sequences, how many positions, which tiles.

It hands out blocks and encodings and ends sequences. It knows no tensors, so that it is tested as
the state machine it is.

Sequences join the running set as long as the cache has room for what is known of them: tenants in
turn, and within a tenant by priority, then in the order they came. Nobody passes by the first in
line because it needs more room. In a step every
running answer goes on by one token; what is left of the budget goes to the prompts. Half of it the
first to have joined share alike: prompts that came together are done at about the same time, and
their answers then go on undisturbed. The rest goes to the short ones first. Pictures and videos,
and prompts up to the last of them, may take only little of a step that running answers wait for.

An answer grows block by block: when none is left, the sequence that joined last gives up its blocks
and is computed again later.

The choices of a request are sequences like all others. What makes them cheap helps everybody who
begins alike: a prompt takes over the blocks that others have computed since it joined, and where
its next block is being computed by one that joined before it, it waits for that. The eldest never
waits, so somebody always goes on.
"""

from __future__ import annotations

import math
import secrets
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

from server.core import FinishReason, TokenEvent, TokenLogprobs
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache, Encoding
from server.engine.prefix import PrefixKeys
from server.engine.sequence import (
    Batch,
    Medium,
    Sequence,
    SequenceKey,
    Span,
    SpanOutput,
    StepBudget,
    VisionSlice,
)

SHARED_PART = 1 / 2
"""So much of what prompts may take in a step is divided among the eldest of them."""

LARGEST_SHARE = 1 / 4
"""Of the step, for each of them: where they are few, short prompts still come first."""

MAX_SHARING = 16
LEAST_SHARE = 16
"""As many at most, and so many tokens each at least: small parts cost more than they bring."""

MAX_TILE_BYTES = 1 << 30
"""The pixels of all running sequences, which are kept in case one has to be computed again."""


class _TenantLine:
    """One tenant's waiting sequences: a lower priority first, first come first among equals."""

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[SequenceKey, Sequence]] = {}
        self._priorities: list[int] = []  # the keys, in order

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._priorities:
            yield from self._by_priority[priority].values()

    def add(self, sequence: Sequence, *, is_first: bool) -> None:
        """After its equals, or before them."""
        priority = sequence.request.priority
        if priority not in self._by_priority:
            self._by_priority[priority] = OrderedDict()
            insort(self._priorities, priority)
        equals = self._by_priority[priority]
        equals[sequence.key] = sequence
        equals.move_to_end(sequence.key, last=not is_first)

    def remove(self, sequence: Sequence) -> None:
        priority = sequence.request.priority
        equals = self._by_priority[priority]
        del equals[sequence.key]
        if not equals:
            del self._by_priority[priority]
            del self._priorities[bisect_left(self._priorities, priority)]


class WaitingLine:
    """Tenants take turns, whatever their priorities; within a tenant see `_TenantLine`."""

    def __init__(self) -> None:
        self._by_tenant: OrderedDict[str, _TenantLine] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._by_tenant.values():
            yield from line

    def append(self, sequence: Sequence) -> None:
        self._line_of(sequence).add(sequence, is_first=False)
        self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """Before its equals of its tenant, whose turn is the next: it has been here before."""
        self._line_of(sequence).add(sequence, is_first=True)
        self._by_tenant.move_to_end(sequence.request.tenant, last=False)
        self._num_waiting += 1

    def first(self) -> Sequence:
        return next(iter(self))

    def take(self) -> Sequence:
        """The first; after it another tenant has its turn."""
        sequence = self.first()
        self.remove(sequence)
        if sequence.request.tenant in self._by_tenant:
            self._by_tenant.move_to_end(sequence.request.tenant)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        line = self._by_tenant[sequence.request.tenant]
        line.remove(sequence)
        if not line:
            del self._by_tenant[sequence.request.tenant]
        self._num_waiting -= 1

    def _line_of(self, sequence: Sequence) -> _TenantLine:
        return self._by_tenant.setdefault(sequence.request.tenant, _TenantLine())


@dataclass(slots=True)
class Counts:
    """What a scheduler has done so far; see `EngineTotals`."""

    num_prompt_tokens_computed: int = 0
    num_tokens_generated: int = 0
    num_preemptions: int = 0
    num_prefix_tokens_looked_up: int = 0
    num_prefix_tokens_hit: int = 0


def _shares(prompts: list[Sequence], num_tokens: int) -> dict[SequenceKey, int]:
    """What of so many tokens others must leave to the eldest prompts."""
    shared = math.ceil(num_tokens * SHARED_PART)
    sharing = prompts[: max(1, min(MAX_SHARING, shared // LEAST_SHARE))]
    share = min(shared // max(1, len(sharing)), math.ceil(num_tokens * LARGEST_SHARE))
    return {
        sequence.key: share
        if sequence.has_media_to_compute
        else min(share, sequence.num_to_compute)
        for sequence in sharing
    }


@dataclass(slots=True)
class _Plan:
    """A step in the making. `encodings` are those that one of its slices goes on with."""

    spans: list[Span] = field(default_factory=list)
    vision: list[VisionSlice] = field(default_factory=list)
    encodings: set[Encoding] = field(default_factory=set)


class Scheduler:
    """The waiting and the running sequences; each is in exactly one of the two, or finished."""

    def __init__(
        self,
        pool: BlockPool,
        encoder_cache: EncoderCache,
        *,
        budget: StepBudget,
        max_running: int,
        secret: bytes | None = None,
    ) -> None:
        """`secret` keeps the keys of cached prefixes from being foreseen; drawn if not given."""
        self.pool = pool
        self.encoder_cache = encoder_cache
        self.counts = Counts()
        self._budget = budget
        self._max_running = max_running
        self._prefix_keys = PrefixKeys(
            block_size=pool.block_size, secret=secret or secrets.token_bytes(32)
        )
        self._sequences: dict[str, dict[int, Sequence]] = {}  # the choices of each request
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []  # in the order they joined
        self._running_choices: Counter[str] = Counter()  # by request
        self._running_tile_bytes = 0

    @property
    def idle(self) -> bool:
        return not self._sequences

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running_tile_bytes(self) -> int:
        return self._running_tile_bytes

    def add(self, sequence: Sequence) -> None:
        """To the line of its tenant. What could never fit must have been refused before."""
        if self.pool.blocks_for(sequence.max_tokens) > self.pool.num_blocks:
            raise ValueError("the sequence is longer than the whole cache")
        choices = self._sequences.setdefault(sequence.request_id, {})
        if sequence.choice in choices:
            raise ValueError("two sequences have the same id")
        choices[sequence.choice] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str, choice: int | None = None) -> list[TokenEvent]:
        """Ends one choice of a request, or all, wherever they are; nothing if they are no more."""
        return [
            self._end(sequence, "abort")
            for sequence in list(self._sequences.get(request_id, {}).values())
            if choice in (None, sequence.choice)
        ]

    def fail(self, sequence: Sequence, *, error_code: str) -> list[TokenEvent]:
        """Ends the request of what cannot be computed, whose other choices might fail as well.

        What they made is of no use to others.
        """
        for choice in self._sequences[sequence.request_id].values():
            self.pool.forget(choice.block_table)
        for medium in sequence.media:
            self.encoder_cache.forget(sequence.request.cache_owner, medium.vision)
        failed = self._end(sequence, "error", error_code=error_code)
        return [failed, *self.abort(sequence.request_id)]

    def schedule(self) -> Batch | None:
        """The next step, or None when there is nothing to do."""
        joined = self._join() if self._make_room() else []
        plan = _Plan()
        prompts: list[Sequence] = []
        keys_in_progress: set[bytes] = set()
        for sequence in self._running:
            self._adopt_blocks(sequence)
            if sequence.is_answering:
                plan.spans.append(Span(sequence, sequence.num_computed, len(sequence)))
            elif not self._waits_for_block(sequence, keys_in_progress):
                prompts.append(sequence)
        self._advance_prompts(prompts, plan)
        if not plan.spans and not plan.vision:
            return None
        return Batch(plan.spans, plan.vision, joined)

    def commit(self, batch: Batch, outputs: AbstractSequence[SpanOutput]) -> list[TokenEvent]:
        """Takes in what the step made, an output for each span; returns what there is to tell."""
        for piece in batch.vision:
            piece.encoding.num_stages_encoded = piece.stop
        events: list[TokenEvent] = []
        for span, output in zip(batch.spans, outputs, strict=True):
            sequence = span.sequence
            if sequence.status == "finished":
                continue  # another choice of its request failed a moment ago
            if output.error_code is not None:
                events += self.fail(sequence, error_code=output.error_code)
                continue
            sequence.prompt_logprobs += output.prompt_logprobs
            self._mark_computed(sequence, span.stop)
            if output.token_id is not None:
                events.append(self._append(sequence, output.token_id, output.logprobs))
        return events

    def check(self) -> None:
        """Raises where an invariant is broken; cheap enough for every idle moment."""
        everybody = [s for choices in self._sequences.values() for s in choices.values()]
        self.pool.check(sequence.block_table for sequence in everybody)
        self.encoder_cache.check(
            medium.encoding
            for sequence in everybody
            for medium in sequence.media
            if medium.encoding is not None
        )
        if any(
            sequence.status != "waiting" or sequence.block_table or sequence.num_computed
            for sequence in self._waiting
        ):
            raise RuntimeError("a waiting sequence is not waiting, or holds blocks")
        if any(sequence.status != "running" for sequence in self._running):
            raise RuntimeError("a sequence in the running set is not running")
        tile_bytes = {one.request_id: one.num_tile_bytes for one in self._running}
        if sum(tile_bytes.values()) != self._running_tile_bytes:
            raise RuntimeError("the bytes of the running sequences' tiles do not add up")
        if len(self._running) > self._max_running:
            raise RuntimeError("more sequences run than may")
        known = {sequence.key for sequence in [*self._waiting, *self._running]}
        if (
            known != {sequence.key for sequence in everybody}
            or len(known) != self.num_waiting + self.num_running
            or not all(self._sequences.values())
        ):
            raise RuntimeError("a sequence is in neither set, or in both")

    def _make_room(self) -> bool:
        """A block for the next position of everybody who runs; False where somebody had to go."""
        num_running = len(self._running)
        for sequence in list(self._running):
            if sequence.status != "running":
                continue  # it went a moment ago, for one that joined before it
            missing = self.pool.blocks_for(len(sequence)) - len(sequence.block_table)
            if not missing:
                continue
            while missing > self.pool.num_free and sequence.status == "running":
                self._preempt(self._running[-1])
            if sequence.status == "running":
                sequence.block_table += self.pool.allocate(missing)
        return len(self._running) == num_running

    def _join(self) -> list[Sequence]:
        joined: list[Sequence] = []
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting.first()
            if not self._take_room(sequence):
                break  # the first waits for room; nobody passes it by
            self._waiting.take()
            sequence.status = "running"
            self._join_running(sequence)
            joined.append(sequence)
        return joined

    def _take_room(self, sequence: Sequence) -> bool:
        """Blocks for all that is known of it, those of a known prefix among them, and encodings."""
        # The last position is always computed: the next token follows from it.
        self._prefix_keys.extend(sequence, stop=len(sequence) - 1)
        shared = [] if sequence.must_compute_prompt else self.pool.find(sequence.block_keys)
        num_shared = len(shared) * self.pool.block_size
        media = [medium for medium in sequence.media if medium.stop > num_shared]
        owner = sequence.request.cache_owner
        self.pool.share(shared)
        missing = self.pool.blocks_for(len(sequence)) - len(shared)
        # Everybody who runs will soon want another block.
        is_enough = (
            missing + len(self._running) <= self.pool.num_free
            and self._running_tile_bytes + self._new_tile_bytes(sequence) <= MAX_TILE_BYTES
        ) or not self._running
        if not is_enough or not self.encoder_cache.has_room(
            owner, [medium.vision for medium in media]
        ):
            self.pool.free(shared)
            return False
        sequence.block_table = shared + self.pool.allocate(missing)
        sequence.num_computed = num_shared
        if sequence.num_cached is None:
            sequence.num_cached = num_shared
            self.counts.num_prefix_tokens_looked_up += len(sequence)
            self.counts.num_prefix_tokens_hit += num_shared
        for medium in media:
            medium.encoding = self.encoder_cache.acquire(owner, medium.vision)
            medium.encode_s -= medium.encoding.encode_s  # what was spent before is not its own
        return True

    def _new_tile_bytes(self, sequence: Sequence) -> int:
        """What it adds to the running tiles: the choices of a request have theirs together."""
        is_there = sequence.request_id in self._running_choices
        return 0 if is_there else sequence.num_tile_bytes

    def _join_running(self, sequence: Sequence) -> None:
        self._running_tile_bytes += self._new_tile_bytes(sequence)
        self._running_choices[sequence.request_id] += 1
        self._running.append(sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._running_choices[sequence.request_id] -= 1
        if not self._running_choices[sequence.request_id]:
            del self._running_choices[sequence.request_id]
            self._running_tile_bytes -= sequence.num_tile_bytes

    def _adopt_blocks(self, sequence: Sequence) -> None:
        """Shares the next blocks of its prompt with those who computed them since it joined."""
        size = self.pool.block_size
        first, num_inside = divmod(sequence.num_computed, size)
        last = (len(sequence) - 1) // size  # the last position is always computed
        if num_inside or first >= last or sequence.must_compute_prompt:
            return
        found = self.pool.find(sequence.block_keys[index] for index in range(first, last))
        if found:
            stop = first + len(found)
            self.pool.share(found)
            self.pool.free(sequence.block_table[first:stop])
            sequence.block_table[first:stop] = found
            self._move_on(sequence, stop * size)

    def _waits_for_block(self, sequence: Sequence, keys_in_progress: set[bytes]) -> bool:
        """Whether one that joined before it is at the same block; else it goes on with it itself.

        `keys_in_progress` are the blocks at which those are, and will be this one's too.
        """
        index, num_inside = divmod(sequence.num_computed, self.pool.block_size)
        if index >= (len(sequence) - 1) // self.pool.block_size:
            return False  # nobody could share it: it is not full, or computed for its last position
        key = sequence.block_keys[index]
        is_begun = key in keys_in_progress
        keys_in_progress.add(key)
        return is_begun and not num_inside and not sequence.must_compute_prompt

    def _advance_prompts(self, prompts: list[Sequence], plan: _Plan) -> None:
        answers = sum(self._budget.price(span.start, span.stop) for span in plan.spans)
        left = max(1, self._budget.max_tokens - math.ceil(answers))
        left_to_media = self._budget.max_media_tokens_beside_answers if plan.spans else left
        price = self._budget.tokens_per_stage
        # One stage may exceed its share, but what others take leaves room for it in the step.
        makes_room = bool(prompts) and prompts[0].is_being_encoded and price < left
        reserved = _shares(prompts, left - price if makes_room else left)
        media = [each for each in prompts if each.has_media_to_compute]
        reserved_for_media = _shares(media, left_to_media)
        for sequence in media:
            if sequence.key in reserved:
                may_take = reserved_for_media.get(sequence.key, 0)
                reserved[sequence.key] = min(reserved[sequence.key], may_take)
        if makes_room:
            reserved[prompts[0].key] = max(reserved[prompts[0].key], price)
        for sequence in sorted(prompts, key=lambda sequence: sequence.num_to_compute):
            reserved.pop(sequence.key, None)
            reserved_for_media.pop(sequence.key, None)
            allowance = left - sum(reserved.values())
            if sequence.has_media_to_compute:
                allowance = min(allowance, left_to_media - sum(reserved_for_media.values()))
            if allowance > 0:
                is_eldest = sequence is prompts[0]
                spent = self._advance(sequence, allowance, plan, may_exceed=is_eldest)
                left -= spent
                left_to_media -= spent if sequence.has_media_to_compute else 0

    def _advance(
        self, sequence: Sequence, allowance: int, plan: _Plan, *, may_exceed: bool = False
    ) -> int:
        """Adds what this sequence computes for at most `allowance` tokens; returns what it costs.

        Its positions go as far as the allowance and the encoded media before them reach. A stage
        of a tile, or a position, that is dearer than any allowance is computed where that
        `may_exceed`.
        """
        spent, start = 0, sequence.num_computed

        def reached() -> int:
            return self._budget.stop_within(start, max(0, allowance - spent))

        stop = len(sequence)
        for medium in sequence.media:
            encoding = medium.encoding
            if encoding is None or encoding.is_complete:
                continue
            if medium.start >= min(stop, reached()):
                break
            if encoding not in plan.encodings:  # else another sequence encodes it in this step
                first, price = encoding.num_stages_encoded, self._budget.tokens_per_stage
                count = max((allowance - spent) // price, int(may_exceed and not spent))
                last = min(encoding.num_stages, first + count)
                if last > first:
                    plan.vision.append(VisionSlice(sequence, encoding, medium, first, last))
                    plan.encodings.add(encoding)
                    spent += (last - first) * price
                if last == encoding.num_stages:
                    continue
            stop = medium.start  # the rest, and so its embeds, come in a later step
            break
        stop = min(stop, max(reached(), start + int(may_exceed and not spent)))
        if stop > start:
            plan.spans.append(Span(sequence, start, stop))
            spent += math.ceil(self._budget.price(start, stop))
        return spent

    def _mark_computed(self, sequence: Sequence, stop: int) -> None:
        size = self.pool.block_size
        num_prompt = len(sequence.request.prompt_ids)
        if sequence.num_computed < num_prompt:
            self.counts.num_prompt_tokens_computed += min(stop, num_prompt) - sequence.num_computed
        self._prefix_keys.extend(sequence, stop=stop)
        for index in range(sequence.num_computed // size, stop // size):
            self.pool.name(sequence.block_table[index], sequence.block_keys[index])
        self._move_on(sequence, stop)

    def _move_on(self, sequence: Sequence, stop: int) -> None:
        """Its positions up to `stop` are in its blocks; what was needed to make them is not."""
        sequence.num_computed = stop
        for medium in sequence.media:
            if medium.stop <= stop:
                self._release_encoding(medium)

    def _append(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> TokenEvent:
        is_first = not sequence.num_generated
        sequence.token_ids.append(token_id)
        self.counts.num_tokens_generated += 1
        sampling = sequence.request.sampling
        reason: FinishReason | None = None
        if token_id in sampling.stop_token_ids:
            reason = "stop"
        elif sequence.num_generated >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._release(sequence)
        elif sequence.constraint is not None:
            sequence.constraint.accept(token_id)
        # The other choices share what this request computed itself: of the cache tells the first.
        is_telling = is_first and sequence.choice == 0
        return TokenEvent(
            sequence.request_id,
            token_id,
            reason,
            num_cached_tokens=(sequence.num_cached or 0) if is_telling else 0,
            encode_times_s=(
                tuple(medium.encode_s for medium in sequence.media) if is_telling else ()
            ),
            choice=sequence.choice,
            logprobs=logprobs,
            prompt_logprobs=(
                tuple(sequence.prompt_logprobs) if is_telling and sequence.tells_prompt else None
            ),
        )

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, error_code: str | None = None
    ) -> TokenEvent:
        self._release(sequence)
        return TokenEvent(sequence.request_id, None, reason, error_code, choice=sequence.choice)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the line, with nothing computed but its tokens kept."""
        self._leave_running(sequence)
        self._free(sequence)
        sequence.status = "waiting"
        sequence.num_computed = 0
        self._waiting.put_back(sequence)
        self.counts.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.status == "running":
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        self._free(sequence)
        choices = self._sequences[sequence.request_id]
        del choices[sequence.choice]
        if not choices:
            del self._sequences[sequence.request_id]
        sequence.media = []
        sequence.constraint = None
        sequence.status = "finished"

    def _free(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        for medium in sequence.media:
            self._release_encoding(medium)

    def _release_encoding(self, medium: Medium) -> None:
        if medium.encoding is not None:
            medium.encode_s += medium.encoding.encode_s
            self.encoder_cache.release(medium.encoding)
            medium.encoding = None
