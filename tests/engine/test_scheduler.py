"""The scheduler as a state machine, with a model that is a function of the ids and the pixels."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.core import TokenEvent, TokenLogprobs, VisionInput, VisionLayout
from server.engine import scheduler as scheduler_module
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.scheduler import Counts, Scheduler
from server.engine.sequence import (
    Batch,
    Sequence,
    SequenceKey,
    Span,
    SpanOutput,
    StepBudget,
    VisionSlice,
)
from tests.engine.samples import PICTURE, VIDEO, make_request, make_tiles


def make_scheduler(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_tokens: int = 8,
    tokens_per_stage: int = 2,
    max_beside_answers: int = 8,
    max_running: int = 8,
    encoder_bytes: int = 1000,
    stages_per_tile: int = 1,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=block_size),
        EncoderCache(max_bytes=encoder_bytes, bytes_per_token=1, stages_per_tile=stages_per_tile),
        budget=StepBudget(max_tokens, tokens_per_stage, max_beside_answers),
        max_running=max_running,
    )


def make_choices(
    name: str = "r",
    *,
    tenant: str = "tenant",
    cache_salt: str = "",
    num_choices: int,
    **options: object,
) -> list[Sequence]:
    request = make_request(name, num_choices=num_choices, **options)  # type: ignore[arg-type]
    request = replace(request, tenant=tenant, cache_salt=cache_salt)
    tiles = make_tiles(request)
    return [Sequence.from_request(request, tiles, choice=choice) for choice in range(num_choices)]


def make_sequence(name: str = "r", **options: object) -> Sequence:
    (sequence,) = make_choices(name, num_choices=1, **options)  # type: ignore[arg-type]
    return sequence


class FakeCache:
    """What a real cache would hold: for each slot, a digest of everything the position depends on.

    A span may only read slots that were written with exactly its own past, so a block that is
    shared wrongly, or given away too early, is noticed at once. Each choice says something else.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, bytes] = {}
        self.num_computed = 0
        self.num_tiles = 0

    def run(self, batch: Batch) -> list[SpanOutput]:
        for piece in batch.vision:
            assert piece.start == piece.encoding.num_stages_encoded < piece.stop
            for tile, num_stages in piece.tiles:
                self._tile(piece, tile, num_stages)
        return [self._span(span) for span in batch.spans]

    def _tile(self, piece: VisionSlice, tile: int, num_stages: int) -> None:
        """It may be further than was committed: the step was run before, and failed."""
        encoding = piece.encoding
        passed, _ = encoding.partial.get(tile, (0, None))
        if tile in encoding.features or passed >= num_stages:
            return
        assert passed >= piece.start - tile * encoding.stages_per_tile
        encoding.partial.pop(tile, None)
        state: Any = piece.medium.vision.digest
        if num_stages < encoding.stages_per_tile:
            encoding.partial[tile] = num_stages, state
        else:
            encoding.features[tile] = state
            self.num_tiles += 1

    def _span(self, span: Span) -> SpanOutput:
        sequence, state = span.sequence, b""
        for position in range(span.stop):
            state = hashlib.sha256(state + self._seen(sequence, position, span)).digest()
            slot = self._slot(sequence, position)
            if position >= span.start:
                self.slots[slot] = state
                self.num_computed += 1
            assert self.slots[slot] == state
        token_id = (state[0] + sequence.choice) % 97 if span.is_sampled else None
        told = tuple(
            None if sequence.is_placeholder(p) else TokenLogprobs(sequence.token_ids[p], -p)
            for p in span.told_positions
        )
        return SpanOutput(token_id, prompt_logprobs=told)

    def _slot(self, sequence: Sequence, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return sequence.block_table[block] * self.block_size + offset

    def _seen(self, sequence: Sequence, position: int, span: Span) -> bytes:
        """The id, or where a placeholder stands what was made of the pixels behind it."""
        for medium in sequence.media:
            if medium.start <= position < medium.stop:
                if position >= span.start:
                    encoding = medium.encoding
                    assert encoding is not None
                    assert set(encoding.features) == set(range(encoding.num_tiles))
                    assert set(encoding.features.values()) == {medium.vision.digest}
                    assert not encoding.partial
                return f"{medium.vision.digest} {position - medium.start}".encode()
        return str(sequence.token_ids[position]).encode()


def answer(scheduler: Scheduler, cache: FakeCache | None = None) -> list[TokenEvent]:
    cache = cache or FakeCache(scheduler.pool.block_size)
    events: list[TokenEvent] = []
    while batch := scheduler.schedule():
        events += scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    return events


def steps_of(scheduler: Scheduler) -> list[list[tuple[str, int, int]]]:
    """Of each step its spans: whose, from, to."""
    cache, steps = FakeCache(scheduler.pool.block_size), []
    while batch := scheduler.schedule():
        steps.append([(s.sequence.request_id, s.start, s.stop) for s in batch.spans])
        scheduler.commit(batch, cache.run(batch))
    return steps


def one_step(scheduler: Scheduler, cache: FakeCache) -> tuple[dict[str, int], list[TokenEvent]]:
    """How many positions each has in the next step, and what it tells."""
    batch = scheduler.schedule()
    assert batch is not None
    lengths = {span.sequence.request_id: len(span) for span in batch.spans}
    return lengths, scheduler.commit(batch, cache.run(batch))


def ids(events: list[TokenEvent], name: str = "r", choice: int = 0) -> list[int | None]:
    return [e.token_id for e in events if (e.request_id, e.choice) == (name, choice)]


def told_of(prompt: tuple[int, ...]) -> tuple[TokenLogprobs | None, ...]:
    """What the fake tells of a prompt without media."""
    return (None, *(TokenLogprobs(prompt[p], -p) for p in range(1, len(prompt))))


def test_a_long_prompt_goes_in_chunks_and_then_one_position_a_step() -> None:
    scheduler = make_scheduler(max_tokens=3)
    scheduler.add(make_sequence(prompt=tuple(range(7)), max_tokens=3))
    spans = [step[0][1:] for step in steps_of(scheduler)]
    assert spans == [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9)]


def test_an_answer_ends_by_length_and_returns_its_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=2))
    events = answer(scheduler)
    assert [event.finish_reason for event in events] == [None, "length"]
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_a_stop_id_ends_the_answer_and_is_its_last_event() -> None:
    scheduler = make_scheduler(num_blocks=99)
    scheduler.add(make_sequence("long", prompt=(1, 2, 3), max_tokens=9))
    free = ids(answer(scheduler), "long")
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=9, stop=(free[4],)))
    assert ids(answer(scheduler)) == free[: free.index(free[4]) + 1]


def test_a_stop_id_that_is_also_the_last_allowed_token_is_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(1, 2, 3), max_tokens=2, stop=range(97)))
    assert answer(scheduler)[-1].finish_reason == "stop"


def test_requests_run_together_and_join_at_any_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=(1, 2), max_tokens=3))
    batch = scheduler.schedule()
    assert batch is not None
    cache = FakeCache(4)
    scheduler.commit(batch, cache.run(batch))
    scheduler.add(make_sequence("b", prompt=(3, 4, 5), max_tokens=2))
    batch = scheduler.schedule()
    assert batch is not None
    assert [(s.sequence.request_id, s.start, s.stop) for s in batch.spans] == [
        ("a", 2, 3),
        ("b", 0, 3),
    ]
    assert [sequence.request_id for sequence in batch.joined] == ["b"]


def test_tenants_join_in_turn_and_within_one_in_order() -> None:
    scheduler = make_scheduler(max_running=1)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        scheduler.add(make_sequence(name, tenant=name[0], max_tokens=1))
    order = [event.request_id for event in answer(scheduler)]
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_nobody_overtakes_the_first_that_waits_for_room() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_running=4)
    scheduler.add(make_sequence("running", prompt=(1,) * 8, max_tokens=4))
    scheduler.add(make_sequence("large", prompt=(2,) * 8, max_tokens=1))
    scheduler.add(make_sequence("small", prompt=(3,), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert [sequence.request_id for sequence in batch.joined] == ["running"]
    events = scheduler.commit(batch, FakeCache(4).run(batch))
    assert scheduler.num_waiting == 2
    assert events == [] or events[0].request_id == "running"


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="longer than the whole cache"):
        scheduler.add(make_sequence(prompt=(1,) * 8, max_tokens=1))


def test_short_prompts_come_first_and_the_eldest_always_gets_its_share() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=16)
    scheduler.add(make_sequence("long", prompt=range(40), max_tokens=1))
    scheduler.add(make_sequence("short", prompt=range(100, 110), max_tokens=1))
    scheduler.add(make_sequence("middle", prompt=range(200, 220), max_tokens=1))
    steps = steps_of(scheduler)
    assert steps[0] == [("short", 0, 10), ("middle", 0, 2), ("long", 0, 4)]


def test_prompts_that_came_together_share_half_of_a_step() -> None:
    scheduler = make_scheduler(num_blocks=199, max_tokens=120)
    for number in range(4):
        prompt = range(100 * number, 100 * number + 70)
        scheduler.add(make_sequence(str(number), prompt=prompt, max_tokens=1))
    steps = steps_of(scheduler)
    # Three are sure of 20 tokens, for the fourth it would be too few; the rest is the first's.
    assert steps[0] == [("0", 0, 70), ("1", 0, 30), ("2", 0, 20)]


def test_beside_running_answers_a_prompt_takes_what_the_step_holds() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=40, max_beside_answers=5)
    scheduler.add(make_sequence("answer", prompt=(1,), max_tokens=4))
    cache = FakeCache(4)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    scheduler.add(make_sequence("prompt", prompt=range(50), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert [(s.sequence.request_id, len(s)) for s in batch.spans] == [("answer", 1), ("prompt", 39)]


def test_beside_running_answers_a_prompt_with_media_goes_on_slowly() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=100, max_beside_answers=5)
    scheduler.add(make_sequence("answer", prompt=(1,), max_tokens=4))
    cache = FakeCache(4)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    scheduler.add(make_sequence("prompt", prompt=(*range(50), PICTURE), max_tokens=1))
    lengths = []
    while batch := scheduler.schedule():
        lengths.append({s.sequence.request_id: len(s) for s in batch.spans})
        scheduler.commit(batch, cache.run(batch))
    assert lengths[:3] == [{"answer": 1, "prompt": 5}] * 3
    assert lengths[3] == {"prompt": 49}  # nobody waits any more


def test_an_answer_that_finds_no_block_makes_the_last_one_wait() -> None:
    alone = make_scheduler(num_blocks=99)
    for name in "ab":
        alone.add(make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9))
    expected = answer(alone)
    scheduler = make_scheduler(num_blocks=6)
    cache = FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9))
    joined = []
    events: list[TokenEvent] = []
    while batch := scheduler.schedule():
        joined += [sequence.request_id for sequence in batch.joined]
        events += scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    assert joined.count("a") == 1 and joined.count("b") > 1
    for name in "ab":
        assert ids(events, name) == ids(expected, name)


def test_the_newest_goes_back_first_whoever_needs_the_block() -> None:
    """The newest needs one first, then the next; only the eldest finds none."""
    scheduler, cache = make_scheduler(num_blocks=8, max_tokens=100), FakeCache(4)
    for name, num_ids in (("a", 6), ("b", 7), ("c", 8)):
        scheduler.add(make_sequence(name, prompt=(ord(name),) * num_ids, max_tokens=7))
    running, joined = [], []
    while batch := scheduler.schedule():
        running.append("".join(span.sequence.request_id for span in batch.spans))
        joined += [sequence.request_id for sequence in batch.joined]
        scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    assert running[:5] == ["abc", "abc", "abc", "ab", "ab"]
    assert joined == ["a", "b", "c", "c"]


def test_one_who_had_to_go_back_comes_before_those_who_never_ran() -> None:
    scheduler, cache = make_scheduler(num_blocks=6), FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    scheduler.add(make_sequence("c", prompt=(9,) * 20, max_tokens=1))
    joined = []
    while batch := scheduler.schedule():
        joined += [sequence.request_id for sequence in batch.joined]
        scheduler.commit(batch, cache.run(batch))
    assert joined[0] == "b" and joined[-1] == "c"


def joining_order(scheduler: Scheduler, cache: FakeCache | None = None) -> list[str]:
    cache, joined = cache or FakeCache(scheduler.pool.block_size), []
    while batch := scheduler.schedule():
        joined += [sequence.request_id for sequence in batch.joined]
        scheduler.commit(batch, cache.run(batch))
    return joined


def test_of_one_tenant_a_lower_priority_starts_first_and_equals_as_they_came() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1), ("f", -(2**31))):
        scheduler.add(make_sequence(name, priority=priority))
    assert joining_order(scheduler) == ["f", "c", "e", "a", "d", "b"]


def test_no_priority_gets_a_tenant_more_turns() -> None:
    scheduler = make_scheduler(max_running=1)
    for number in range(3):
        scheduler.add(make_sequence(f"a{number}", tenant="a"))
    for number in range(3):
        scheduler.add(make_sequence(f"b{number}", tenant="b", priority=-number))
    assert joining_order(scheduler) == ["a0", "b2", "a1", "b1", "a2", "b0"]


def test_one_who_had_to_go_back_comes_before_its_equals_only() -> None:
    scheduler, cache = make_scheduler(num_blocks=6), FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    for name, priority in (("equal", 0), ("important", -1), ("unimportant", 1)):
        scheduler.add(make_sequence(name, prompt=(9,) * 20, max_tokens=1, priority=priority))
    assert joining_order(scheduler, cache) == ["important", "b", "equal", "unimportant"]
    assert scheduler.counts.num_preemptions == 1


def test_what_was_done_is_counted() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    for name in ("first", "second"):
        scheduler.add(make_sequence(name, prompt=range(10), max_tokens=3))
        answer(scheduler, cache)
    assert scheduler.counts == Counts(
        num_prompt_tokens_computed=10 + 2,
        num_tokens_generated=6,
        num_prefix_tokens_looked_up=20,
        num_prefix_tokens_hit=8,
    )
    for name in ("third", "fourth"):
        scheduler.add(make_sequence(name, prompt=(ord(name[0]), PICTURE, 1), max_tokens=1))
        answer(scheduler, cache)
    encodings = scheduler.encoder_cache
    assert (encodings.num_misses, encodings.num_hits) == (1, 1)


def test_one_who_comes_back_is_not_counted_as_another_look_into_the_cache() -> None:
    scheduler, cache = make_scheduler(num_blocks=6), FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9))
    answer(scheduler, cache)
    counts = scheduler.counts
    assert counts.num_preemptions >= 1
    assert (counts.num_tokens_generated, counts.num_prefix_tokens_looked_up) == (18, 14)


def test_a_thousand_random_aborts_leave_nothing_behind() -> None:
    """Whatever their phase: waiting, reading a picture or a prompt, answering, sent back."""
    chance = random.Random(1)
    scheduler = make_scheduler(num_blocks=24, max_running=6, encoder_bytes=30)
    cache, num_added = FakeCache(4), 0
    ends: Counter[str | None] = Counter()
    unfinished: list[str] = []
    while ends["abort"] < 1000:
        while len(unfinished) < 10:
            name, num_added = str(num_added), num_added + 1
            media = chance.choice([(), (PICTURE,), (VIDEO,), (OTHER_PICTURE, VIDEO)])
            prompt = (*range(chance.randint(1, 20)), *media, chance.randint(1, 90))
            options = {"max_tokens": chance.randint(1, 20), "priority": chance.randint(-1, 1)}
            tenant = chance.choice("ab")
            scheduler.add(make_sequence(name, tenant=tenant, prompt=prompt, **options))
            unfinished.append(name)
        batch = scheduler.schedule()
        assert batch is not None
        events = scheduler.commit(batch, cache.run(batch))
        for name in chance.sample(unfinished, chance.randint(0, 3)):
            events += scheduler.abort(name)
        scheduler.check()
        ended = {event.request_id: event.finish_reason for event in events if event.finish_reason}
        ends.update(ended.values())
        unfinished = [name for name in unfinished if name not in ended]
    for name in unfinished:
        scheduler.abort(name)
    scheduler.check()
    assert scheduler.idle and scheduler.counts.num_preemptions > 0
    assert scheduler.pool.num_used == scheduler.encoder_cache.held_bytes == 0
    assert scheduler.num_waiting == scheduler.num_running == scheduler.running_tile_bytes == 0


def test_the_same_beginning_is_computed_once() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    prompt = tuple(range(30))
    scheduler.add(make_sequence("first", prompt=prompt, max_tokens=2))
    first = answer(scheduler, cache)
    assert (first[0].num_cached_tokens, cache.num_computed) == (0, 31)
    scheduler.add(make_sequence("second", prompt=prompt, max_tokens=2))
    second = answer(scheduler, cache)
    assert (second[0].num_cached_tokens, second[1].num_cached_tokens) == (28, 0)
    assert cache.num_computed == 31 + 3
    assert ids(first, "first") == ids(second, "second")


def test_the_next_turn_finds_the_answer_before_it() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    scheduler.add(make_sequence("turn", prompt=range(10), max_tokens=7))
    given = [token for token in ids(answer(scheduler, cache), "turn") if token is not None]
    scheduler.add(make_sequence("next", prompt=(*range(10), *given, 5), max_tokens=1))
    assert answer(scheduler, cache)[0].num_cached_tokens == 16


def test_a_prompt_in_the_cache_to_its_last_id_still_computes_one_position() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    for name in ("one", "two"):
        scheduler.add(make_sequence(name, prompt=range(8), max_tokens=1))
        events = answer(scheduler, cache)
    assert events[0].num_cached_tokens == 4


def test_tenants_never_share_a_block_or_an_encoding() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    for tenant in "ab":
        scheduler.add(make_sequence(tenant, tenant=tenant, prompt=(PICTURE, *range(20))))
        assert answer(scheduler, cache)[0].num_cached_tokens == 0
    assert cache.num_tiles == 2 * len(PICTURE.layout.tile_queries)


def test_salts_share_a_block_or_an_encoding_with_themselves_alone() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    owners = [("ab", ""), ("ab", "c"), ("a", "bc"), ("", "abc"), ("1", ":x"), ("1:", "x")]
    for num_cached in (0, 32):
        for tenant, salt in owners:
            options = {"tenant": tenant, "cache_salt": salt, "prompt": (PICTURE, *range(20))}
            scheduler.add(make_sequence(f"{tenant}/{salt}/{num_cached}", **options, max_tokens=1))
            (event,) = answer(scheduler, cache)
            assert event.num_cached_tokens == num_cached, (tenant, salt)
    assert cache.num_tiles == len(owners) * len(PICTURE.layout.tile_queries)


def test_salts_of_one_tenant_are_no_tenants_of_their_own() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, tenant, salt in (("a", "x", "1"), ("b", "x", "2"), ("c", "x", "3"), ("d", "y", "")):
        scheduler.add(make_sequence(name, tenant=tenant, cache_salt=salt, max_tokens=1))
    order = []
    while (batch := scheduler.schedule()) is not None:
        order += [span.sequence.request_id for span in batch.spans]
        scheduler.commit(batch, [SpanOutput(1) for _ in batch.spans])
    assert order == ["a", "d", "b", "c"]


def test_pictures_of_equal_size_never_share_a_block() -> None:
    other = VisionInput("image", PICTURE.layout, digest="c" * 64)
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=100), FakeCache(4)
    for name, picture, num_cached in (("a", PICTURE, 0), ("b", other, 4), ("c", other, 20)):
        scheduler.add(make_sequence(name, prompt=(*range(6), picture, 9, 9, 9, 9), max_tokens=1))
        assert answer(scheduler, cache)[0].num_cached_tokens == num_cached, name


@pytest.mark.parametrize("max_tokens", [6, 100])
def test_two_who_show_the_same_picture_have_it_encoded_once(max_tokens: int) -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=max_tokens), FakeCache(4)
    scheduler.add(make_sequence("a", prompt=(1, 2, PICTURE), max_tokens=1))
    scheduler.add(make_sequence("b", prompt=(3, 4, PICTURE), max_tokens=1))
    answer(scheduler, cache)
    scheduler.add(make_sequence("later", prompt=(5, PICTURE), max_tokens=1))
    answer(scheduler, cache)
    assert cache.num_tiles == len(PICTURE.layout.tile_queries)


def test_nothing_is_encoded_for_a_picture_behind_cached_blocks() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=100, encoder_bytes=0)
    cache = FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(PICTURE, *range(8)), max_tokens=1))
        answer(scheduler, cache)
    assert cache.num_tiles == len(PICTURE.layout.tile_queries)


def test_a_medium_that_ends_a_cached_prompt_is_encoded_again() -> None:
    """One position is left, and what stands there was made of pixels and is not kept."""
    scheduler = make_scheduler(num_blocks=64, encoder_bytes=0, tokens_per_stage=5)
    cache = FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(1, 2, 3, PICTURE), max_tokens=1))
        events = answer(scheduler, cache)
        assert [event.finish_reason for event in events] == ["length"]
    assert events[0].num_cached_tokens == 16


def test_what_a_failed_request_made_is_not_shared() -> None:
    scheduler, cache = make_scheduler(num_blocks=64, max_tokens=12), FakeCache(4)
    bad = make_sequence("bad", prompt=(PICTURE, *range(20)), max_tokens=1)
    scheduler.add(bad)
    for _ in range(2):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, cache.run(batch))
    scheduler.fail(bad, error_code="internal_error")
    scheduler.check()
    scheduler.add(make_sequence("again", prompt=(PICTURE, *range(20)), max_tokens=1))
    assert answer(scheduler, cache)[0].num_cached_tokens == 0
    assert cache.num_tiles == 2 * len(PICTURE.layout.tile_queries)


def test_the_pixels_of_all_who_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_sequence("0", prompt=(VIDEO, 1))
    monkeypatch.setattr(scheduler_module, "MAX_TILE_BYTES", 2 * video.num_tile_bytes)
    scheduler = make_scheduler(num_blocks=64)
    for name in "012":
        scheduler.add(make_sequence(name, prompt=(VIDEO, 1), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert [sequence.request_id for sequence in batch.joined] == ["0", "1"]


def test_the_eldest_prompt_gets_its_share_of_very_little() -> None:
    scheduler = make_scheduler(num_blocks=99, max_tokens=2, max_running=40)
    cache = FakeCache(4)
    scheduler.add(make_sequence("eldest", prompt=range(30), max_tokens=1))
    for step in range(60):
        scheduler.add(make_sequence(f"short {step}", prompt=(step,) * 5, max_tokens=1))
        batch = scheduler.schedule()
        assert batch is not None
        for event in scheduler.commit(batch, cache.run(batch)):
            if event.request_id == "eldest":
                return
    raise AssertionError("the eldest was starved")


@pytest.mark.parametrize("stages_per_tile", [1, 3])
def test_one_who_breaks_off_leaves_the_encoding_to_the_other(stages_per_tile: int) -> None:
    """With three stages in the middle of a tile: the other goes on with it."""
    scheduler = make_scheduler(num_blocks=64, max_tokens=4, stages_per_tile=stages_per_tile)
    cache = FakeCache(4)
    scheduler.add(make_sequence("a", prompt=(VIDEO, 1), max_tokens=1))
    scheduler.add(make_sequence("b", prompt=(VIDEO, 2, 3), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None and len(batch.vision) == 1
    scheduler.commit(batch, cache.run(batch))
    assert bool(batch.vision[0].encoding.partial) == (stages_per_tile == 3)
    scheduler.abort("a")
    scheduler.check()
    events = answer(scheduler, cache)
    assert [event.finish_reason for event in events] == ["length"]
    assert cache.num_tiles == len(VIDEO.layout.tile_queries)


def test_tiles_are_encoded_before_the_positions_that_need_them() -> None:
    """Two of its seven tiles a step; the text before it is computed meanwhile."""
    scheduler = make_scheduler(num_blocks=64, max_tokens=8, tokens_per_stage=3)
    scheduler.add(make_sequence(prompt=(1, 2, VIDEO, 3), max_tokens=1))
    cache, steps = FakeCache(4), []
    while batch := scheduler.schedule():
        tiles = [(piece.start, piece.stop) for piece in batch.vision]
        steps.append((tiles, [(span.start, span.stop) for span in batch.spans]))
        scheduler.commit(batch, cache.run(batch))
    assert steps == [
        ([(0, 2)], [(0, 2)]),
        ([(2, 4)], []),
        ([(4, 6)], []),
        ([(6, 7)], [(2, 7)]),
        ([], [(7, 13)]),
    ]


def test_a_tile_dearer_than_a_step_is_encoded_alone_and_holds_nobody_up() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=8, tokens_per_stage=50)
    scheduler.add(make_sequence("video", prompt=(VIDEO, 3), max_tokens=1))
    scheduler.add(make_sequence("text", prompt=(1, 2, 3), max_tokens=2))
    batch = scheduler.schedule()
    assert batch is not None
    assert [len(piece) for piece in batch.vision] == [1]
    assert [span.sequence.request_id for span in batch.spans] == ["text"]


def test_a_tile_goes_through_its_stages_in_several_steps() -> None:
    """Three stages for each of two tiles, two stages a step; its positions wait for the last."""
    scheduler = make_scheduler(num_blocks=64, max_tokens=8, tokens_per_stage=4, stages_per_tile=3)
    picture = VisionInput("image", VisionLayout((4, 4)), digest="d" * 64)
    scheduler.add(make_sequence(prompt=(1, picture, 3), max_tokens=1))
    cache, steps = FakeCache(4), []
    while batch := scheduler.schedule():
        slices = [(piece.start, piece.stop) for piece in batch.vision]
        steps.append((slices, [(span.start, span.stop) for span in batch.spans]))
        scheduler.commit(batch, cache.run(batch))
    assert steps == [
        ([(0, 2)], []),
        ([(2, 4)], []),
        ([(4, 6)], []),
        ([], [(0, 8)]),
        ([], [(8, 10)]),
    ]
    assert cache.num_tiles == 2


def test_one_who_leaves_in_the_middle_of_a_tile_leaves_nothing() -> None:
    scheduler = make_scheduler(num_blocks=64, max_tokens=8, tokens_per_stage=8, stages_per_tile=3)
    cache = FakeCache(4)
    sequence = make_sequence(prompt=(PICTURE, 1), max_tokens=1)
    scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    encoding = sequence.media[0].encoding
    assert encoding is not None and encoding.partial and not encoding.is_complete
    scheduler.abort("r")
    scheduler.check()
    assert sequence.media == []
    assert scheduler.encoder_cache.num_bytes == 0
    scheduler.add(make_sequence("again", prompt=(PICTURE, 1), max_tokens=1))
    assert answer(scheduler, cache)[-1].finish_reason == "length"
    assert cache.num_tiles == len(PICTURE.layout.tile_queries)


def test_one_who_goes_back_in_the_middle_of_a_tile_begins_it_again() -> None:
    """The answer that joined first wants another block, and the picture's prompt has the last."""
    sequence = make_sequence("picture", prompt=(PICTURE, 3), max_tokens=1)
    blocks_of_both = 1 + -(-len(sequence) // 4)
    scheduler = make_scheduler(
        num_blocks=blocks_of_both + 1, max_beside_answers=2, tokens_per_stage=2, stages_per_tile=9
    )
    cache, pieces, events = FakeCache(4), [], []
    scheduler.add(make_sequence("answer", prompt=(1, 2, 3), max_tokens=9))
    scheduler.add(sequence)
    while batch := scheduler.schedule():
        pieces += batch.vision
        events += scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    left, made = dict.fromkeys(piece.encoding for piece in pieces)
    assert left.partial and not left.is_complete and made.is_complete
    assert min(piece.start for piece in pieces if piece.encoding is made) == 0
    assert len(ids(events, "answer")) == 9 and len(ids(events, "picture")) == 1


def test_a_stage_that_fits_a_step_never_makes_it_longer() -> None:
    """The eldest's stage takes more than its share, but others leave room for it."""
    scheduler = make_scheduler(num_blocks=64, max_tokens=12, tokens_per_stage=8, stages_per_tile=2)
    scheduler.add(make_sequence("video", prompt=(VIDEO, 3), max_tokens=1))
    scheduler.add(make_sequence("text", prompt=range(9), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert [len(piece) for piece in batch.vision] == [1]
    assert [len(span) for span in batch.spans] == [4]


@pytest.mark.parametrize(("price", "num_long"), [(173, 4), (173, 8), (260, 0), (300, 0)])
def test_who_comes_after_a_slow_video_is_not_held_up_by_it(price: int, num_long: int) -> None:
    """A stage takes most of a step, or more than there is; long prompts came before the short."""
    scheduler = make_scheduler(
        num_blocks=4000, max_tokens=260, max_running=40, tokens_per_stage=price, stages_per_tile=9
    )
    scheduler.add(make_sequence("video", prompt=(VIDEO, 1), max_tokens=1))
    for number in range(num_long):
        prompt = range(1000 * number, 1000 * number + 900)
        scheduler.add(make_sequence(f"long {number}", prompt=prompt, max_tokens=1))
    scheduler.add(make_sequence("short", prompt=(7, 8, 9), max_tokens=1))
    cache = FakeCache(4)
    first = [event.request_id for _ in range(3) for event in one_step(scheduler, cache)[1]]
    assert first == ["short"]


def test_media_withhold_nothing_that_they_may_not_take() -> None:
    scheduler = make_scheduler(num_blocks=999, max_tokens=100, max_beside_answers=8, max_running=40)
    scheduler.add(make_sequence("answer", prompt=(1,), max_tokens=9))
    cache = FakeCache(4)
    one_step(scheduler, cache)
    for name in "abc":
        scheduler.add(make_sequence(name, prompt=(VIDEO, *range(900)), max_tokens=1))
    scheduler.add(make_sequence("text", prompt=range(300), max_tokens=1))
    lengths, _ = one_step(scheduler, cache)
    assert lengths["text"] >= 100 - 1 - 8


def test_behind_its_last_medium_a_prompt_is_like_any_other() -> None:
    scheduler = make_scheduler(num_blocks=999, max_tokens=100, max_beside_answers=8)
    scheduler.add(make_sequence("before", prompt=(PICTURE, 1), max_tokens=1))
    cache = FakeCache(4)
    while not scheduler.idle:
        one_step(scheduler, cache)
    scheduler.add(make_sequence("answer", prompt=(1,), max_tokens=9))
    one_step(scheduler, cache)
    scheduler.add(make_sequence("again", prompt=(PICTURE, *range(2, 200)), max_tokens=1))
    lengths = [one_step(scheduler, cache)[0].get("again", 0) for _ in range(3)]
    assert max(lengths) == 99


def test_a_medium_behind_the_step_s_last_position_is_not_encoded_yet() -> None:
    scheduler = make_scheduler(max_tokens=2)
    scheduler.add(make_sequence(prompt=(1, 2, PICTURE), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None and batch.vision == [] and len(batch.spans) == 1


def test_a_failed_span_ends_its_request_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("good", max_tokens=1))
    scheduler.add(make_sequence("bad", max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    events = scheduler.commit(batch, [SpanOutput(5), SpanOutput(error_code="internal_error")])
    assert events == [
        TokenEvent("good", 5, "length"),
        TokenEvent("bad", None, "error", "internal_error"),
    ]
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_a_choice_that_fails_ends_the_others_of_its_request() -> None:
    """Also those behind it in the same step, and those that still wait."""
    scheduler = make_scheduler(max_running=3)
    for sequence in [*make_choices("bad", num_choices=3, max_tokens=9), make_sequence("good")]:
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch is not None and len(batch.spans) == 3 and scheduler.num_waiting == 1
    outputs = [SpanOutput(5), SpanOutput(error_code="internal_error"), SpanOutput(6)]
    assert scheduler.commit(batch, outputs) == [
        TokenEvent("bad", 5),
        TokenEvent("bad", None, "error", "internal_error", choice=1),
        TokenEvent("bad", None, "abort", choice=0),
        TokenEvent("bad", None, "abort", choice=2),
    ]
    scheduler.check()
    assert [event.request_id for event in answer(scheduler)] == ["good"] * 4


def test_aborting_what_is_not_there_is_harmless() -> None:
    assert make_scheduler().abort("nobody") == []


@pytest.mark.parametrize("max_tokens", [3, 7, 100])
def test_choices_compute_the_full_blocks_of_their_prompt_once(max_tokens: int) -> None:
    """Each computes what no block holds alone, and an answer of its own."""
    prompt = range(41)
    alone, cache = make_scheduler(num_blocks=99), FakeCache(4)
    alone.add(make_sequence(prompt=prompt, max_tokens=6))
    expected = ids(answer(alone, cache))
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=max_tokens), FakeCache(4)
    for sequence in make_choices(num_choices=4, prompt=prompt, max_tokens=6):
        scheduler.add(sequence)
    events = answer(scheduler, cache)
    assert cache.num_computed == 40 + 4 * (1 + 5)
    assert ids(events) == expected
    assert len({tuple(ids(events, choice=choice)) for choice in range(4)}) == 4
    assert scheduler.idle and scheduler.pool.num_used == 0
    assert sum(event.num_cached_tokens for event in events) == 0


@pytest.mark.parametrize("stages_per_tile", [1, 3])
def test_choices_have_their_picture_encoded_once(stages_per_tile: int) -> None:
    scheduler = make_scheduler(num_blocks=99, stages_per_tile=stages_per_tile)
    cache = FakeCache(4)
    for sequence in make_choices(num_choices=3, prompt=(1, 2, PICTURE, *range(9)), max_tokens=4):
        scheduler.add(sequence)
    answer(scheduler, cache)
    assert cache.num_tiles == len(PICTURE.layout.tile_queries)
    assert scheduler.encoder_cache.held_bytes == 0


def test_who_takes_over_the_positions_of_a_picture_lets_go_of_its_encoding() -> None:
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=16), FakeCache(4)
    first, second = make_choices(num_choices=2, prompt=(PICTURE, *range(30)), max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    while first.num_computed < first.media[0].stop:
        batch = scheduler.schedule()
        assert batch is not None
        assert second.media[0].encoding is not None
        scheduler.commit(batch, cache.run(batch))
    scheduler.schedule()
    assert second.num_computed >= second.media[0].stop and second.num_to_compute > 1
    assert second.media[0].encoding is None
    scheduler.check()


def test_what_was_in_the_cache_when_a_request_came_is_told_once() -> None:
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=100), FakeCache(4)
    scheduler.add(make_sequence("before", prompt=range(9), max_tokens=1))
    answer(scheduler, cache)
    for sequence in make_choices(num_choices=3, prompt=range(30), max_tokens=2):
        scheduler.add(sequence)
    events = answer(scheduler, cache)
    assert [(e.choice, e.num_cached_tokens) for e in events if e.num_cached_tokens] == [(0, 8)]


def test_who_comes_while_the_same_beginning_is_computed_waits_for_it() -> None:
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=6), FakeCache(4)
    scheduler.add(make_sequence("a", prompt=range(20), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    scheduler.add(make_sequence("b", prompt=(*range(12), 50, 51), max_tokens=1))
    scheduler.add(make_sequence("c", prompt=(60, 61, 62), max_tokens=1))
    steps = []
    while batch := scheduler.schedule():
        steps.append([(s.sequence.request_id, s.start, s.stop) for s in batch.spans])
        scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    # b joins with the block that is there, waits, and goes on behind the two that are made.
    assert steps[0] == [("c", 0, 3), ("a", 6, 9)]
    assert steps[1] == [("a", 9, 15)]
    assert steps[2] == [("b", 12, 14), ("a", 15, 19)]
    assert cache.num_computed == 20 + 2 + 3


def test_the_eldest_never_waits_and_another_tenant_neither() -> None:
    scheduler = make_scheduler(num_blocks=99, max_tokens=100)
    for name, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        scheduler.add(make_sequence(name, tenant=tenant, prompt=range(20), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    assert {span.sequence.request_id for span in batch.spans} == {"a", "c"}


def test_who_waited_goes_on_alone_when_the_other_is_gone() -> None:
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=3), FakeCache(4)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt=(PICTURE, *range(20)), max_tokens=1))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.commit(batch, cache.run(batch))
    scheduler.abort("a")
    assert [event.finish_reason for event in answer(scheduler, cache)] == ["length"]


def test_one_choice_is_aborted_and_the_others_go_on() -> None:
    scheduler, cache = make_scheduler(num_blocks=99), FakeCache(4)
    sequences = make_choices(num_choices=3, prompt=range(9), max_tokens=5)
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, cache.run(batch))
    assert scheduler.abort("r", 1) == [TokenEvent("r", None, "abort", choice=1)]
    assert scheduler.abort("r", 1) == []
    scheduler.check()
    events = answer(scheduler, cache)
    assert {event.choice for event in events} == {0, 2}
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"] * 2
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_all_choices_are_aborted_together_wherever_they_are() -> None:
    scheduler, cache = make_scheduler(max_running=2), FakeCache(4)
    for sequence in make_choices(num_choices=4, prompt=range(9), max_tokens=5):
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch is not None and scheduler.num_waiting == 2
    scheduler.commit(batch, cache.run(batch))
    events = scheduler.abort("r")
    assert [(e.choice, e.finish_reason) for e in events] == [(c, "abort") for c in range(4)]
    assert scheduler.idle and scheduler.pool.num_used == 0


def test_the_pixels_of_all_choices_of_a_request_are_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequences = make_choices(num_choices=3, prompt=(VIDEO, 1), max_tokens=1)
    monkeypatch.setattr(scheduler_module, "MAX_TILE_BYTES", sequences[0].num_tile_bytes)
    scheduler = make_scheduler(num_blocks=64)
    for sequence in sequences:
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch is not None and len(batch.joined) == 3


@pytest.mark.parametrize("max_tokens", [1, 3, 100])
def test_a_prompt_that_is_told_is_computed_whole_and_shared_by_others(max_tokens: int) -> None:
    prompt = tuple(range(14))
    scheduler, cache = make_scheduler(num_blocks=99, max_tokens=max_tokens), FakeCache(4)
    scheduler.add(make_sequence("before", prompt=prompt, max_tokens=1))
    answer(scheduler, cache)
    for sequence in make_choices(num_choices=2, prompt=prompt, max_tokens=2, num_prompt_logprobs=0):
        scheduler.add(sequence)
    events = answer(scheduler, cache)
    assert [e.choice for e in events if e.prompt_logprobs is not None] == [0]
    assert events[[e.choice for e in events].index(0)].prompt_logprobs == told_of(prompt)
    assert sum(event.num_cached_tokens for event in events) == 0
    assert cache.num_computed == 14 + (14 + 1) + (2 + 1)


def test_a_prompt_of_one_id_tells_nothing_of_it() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=(5,), max_tokens=2, num_prompt_logprobs=3))
    first, second = answer(scheduler)
    assert (first.prompt_logprobs, second.prompt_logprobs) == ((None,), None)


def test_what_was_told_of_a_prompt_is_told_once_though_it_is_computed_again() -> None:
    """Two grow until one has to go back, some of them in the middle of their prompt."""
    scheduler, cache = make_scheduler(num_blocks=6, max_tokens=3), FakeCache(4)
    prompts = {"a": (1,) * 7, "b": (2,) * 9}
    for name, prompt in prompts.items():
        scheduler.add(make_sequence(name, prompt=prompt, max_tokens=9, num_prompt_logprobs=0))
    joined, events = [], []
    while batch := scheduler.schedule():
        joined += [sequence.request_id for sequence in batch.joined]
        events += scheduler.commit(batch, cache.run(batch))
        scheduler.check()
    assert joined.count("b") > 1
    told = {e.request_id: e.prompt_logprobs for e in events if e.prompt_logprobs is not None}
    assert told == {name: told_of(prompt) for name, prompt in prompts.items()}


class Recorder:
    """A mask that allows all and keeps what it is told."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_a_mask_is_told_each_token_once_and_dropped_at_the_end() -> None:
    """The last one it need not know. Both grow until one has to be computed again."""
    scheduler, cache = make_scheduler(num_blocks=6), FakeCache(4)
    masks = {name: Recorder() for name in "ab"}
    sequences = [make_sequence(name, prompt=(ord(name),) * 7, max_tokens=9) for name in masks]
    joined, events = [], []
    for sequence in sequences:
        sequence.constraint = masks[sequence.request_id]
        scheduler.add(sequence)
    while batch := scheduler.schedule():
        joined += [sequence.request_id for sequence in batch.joined]
        events += scheduler.commit(batch, cache.run(batch))
    assert joined.count("b") > 1
    for name, mask in masks.items():
        assert mask.accepted == ids(events, name)[:-1]
    assert [sequence.constraint for sequence in sequences] == [None, None]


OTHER_PICTURE = VisionInput("image", PICTURE.layout, digest="c" * 64)
MAX_TOKENS = 5
MAX_BESIDE = 3


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, failures and aborts, in a pool often too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = FakeCache(4)
        self.num_requests = 0
        self.added: dict[SequenceKey, Sequence] = {}
        self.masks: dict[SequenceKey, Recorder] = {}
        self.events: dict[SequenceKey, list[TokenEvent]] = {}
        self.finals: dict[SequenceKey, str] = {}
        self.joined: list[Sequence] = []  # those who ran when the last step began, in order

    @initialize(stages_per_tile=st.integers(1, 4), price=st.integers(1, MAX_TOKENS + 2))
    def begin(self, stages_per_tile: int, price: int) -> None:
        self.price = price
        self.scheduler = make_scheduler(
            num_blocks=12,
            max_tokens=MAX_TOKENS,
            max_beside_answers=MAX_BESIDE,
            max_running=4,
            encoder_bytes=30,
            tokens_per_stage=price,
            stages_per_tile=stages_per_tile,
        )

    @rule(
        num_ids=st.integers(1, 17),
        max_tokens=st.integers(1, 12),
        media=st.sampled_from([(), (PICTURE,), (OTHER_PICTURE,), (VIDEO,)]),
        stop=st.lists(st.integers(0, 96), max_size=20),
        tenant=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
        num_choices=st.sampled_from([1, 1, 2, 4]),
        num_prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        num_ids: int,
        max_tokens: int,
        media: tuple[VisionInput, ...],
        stop: list[int],
        tenant: str,
        priority: int,
        num_choices: int,
        num_prompt_logprobs: int | None,
    ) -> None:
        for sequence in make_choices(
            str(self.num_requests),
            tenant=tenant,
            num_choices=num_choices,
            prompt=(*range(1, num_ids + 1), *media),
            max_tokens=max_tokens,
            stop=stop,
            priority=priority,
            num_prompt_logprobs=num_prompt_logprobs,
        ):
            self.masks[sequence.key] = Recorder()
            sequence.constraint = self.masks[sequence.key]
            self.added[sequence.key] = sequence
            self.events[sequence.key] = []
            self.scheduler.add(sequence)
        self.num_requests += 1

    @rule()
    def step(self) -> None:
        batch = self.schedule()
        assert (batch is None) == self.scheduler.idle
        if batch is None:
            return
        self.judge(batch)
        self.note(self.scheduler.commit(batch, self.cache.run(batch)))

    @rule(number=st.integers(0, 4), is_computed=st.booleans())
    def step_in_which_one_fails(self, number: int, is_computed: bool) -> None:
        """As the worker does it: everybody alone, and one of them cannot be computed.

        The fault came before anything was computed together, or after everything was.
        """
        batch = self.schedule()
        if batch and is_computed:
            self.cache.run(batch)
        for index, (sequence, part) in enumerate(batch.alone() if batch else ()):
            if index == number:
                self.note(self.scheduler.fail(sequence, error_code="internal_error"))
            elif sequence.status == "running":
                self.note(self.scheduler.commit(part, self.cache.run(part)))

    @rule(number=st.integers(0, 40))
    def abort(self, number: int) -> None:
        self.note(self.scheduler.abort(str(number)))

    @rule(number=st.integers(0, 40), choice=st.integers(0, 3))
    def abort_one_choice(self, number: int, choice: int) -> None:
        self.note(self.scheduler.abort(str(number), choice))

    def schedule(self) -> Batch | None:
        """Of those who ran, the newest went back, and whoever stayed joined before them."""
        running = [sequence for sequence in self.joined if sequence.status == "running"]
        batch = self.scheduler.schedule()
        joined = batch.joined if batch else []
        stayed = [each for each in running if each.status == "running" and each not in joined]
        assert running[: len(stayed)] == stayed
        self.joined = [*stayed, *joined]
        return batch

    def judge(self, batch: Batch) -> None:
        waiting = [sequence for sequence in self.added.values() if sequence.status == "waiting"]
        for joined in batch.joined:
            assert not any(self.is_before(other, joined) for other in waiting)
        answering = sum(span.sequence.is_answering for span in batch.spans)
        prompts = batch.num_tokens - answering
        room = max(1, MAX_TOKENS - answering)
        with_media = sum(
            len(span)
            for span in batch.spans
            if span.sequence.has_media_to_compute and not span.sequence.is_answering
        )
        assert prompts <= room
        stages = sum(len(piece) for piece in batch.vision)
        is_too_dear = self.price >= room and stages == 1
        assert prompts + stages * self.price <= room or is_too_dear
        assert with_media + (stages - 1) * self.price <= (MAX_BESIDE if answering else MAX_TOKENS)
        assert len({span.sequence.key for span in batch.spans}) == len(batch.spans)
        self.judge_sharing(batch)
        for span in batch.spans:
            assert span.start == span.sequence.num_computed < span.stop <= len(span.sequence)
            assert span.stop <= len(span.sequence.block_table) * self.scheduler.pool.block_size

    def is_before(self, one: Sequence, other: Sequence) -> bool:
        """Whether of two of a tenant the one must join first. Of those who ran before, nobody
        knows here in which order they went back."""
        if one.request.tenant != other.request.tenant:
            return False
        if one.request.priority != other.request.priority:
            return one.request.priority < other.request.priority
        if other.num_cached is not None:
            return False
        if one.num_cached is not None:
            return True
        return (int(one.request_id), one.choice) < (int(other.request_id), other.choice)

    def judge_sharing(self, batch: Batch) -> None:
        """No two of one tenant begin the same full block of what they know, in any step."""
        begun: set[object] = set()
        size = self.scheduler.pool.block_size
        for span in batch.spans:
            sequence, stop = span.sequence, span.start + size
            if span.start % size or stop >= len(sequence) or sequence.must_compute_prompt:
                continue
            seen = [
                f"{medium.vision.digest} {medium.start}"
                for medium in sequence.media
                if medium.start < stop
            ]
            block = (sequence.request.tenant, *sequence.token_ids[:stop], *seen)
            assert block not in begun
            begun.add(block)

    def note(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = event.request_id, event.choice
            assert key not in self.finals
            self.events[key].append(event)
            if event.finish_reason is not None:
                self.finals[key] = event.finish_reason

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        """All that was admitted ends, as it would have ended alone, and nothing is left behind."""
        for _ in range(5000):  # where each stage of each tile takes a step of its own
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.encoder_cache.held_bytes == 0
        for key, sequence in self.added.items():
            self.judge_answer(key, sequence)

    def judge_answer(self, key: SequenceKey, sequence: Sequence) -> None:
        request, (_, choice) = sequence.request, key
        alone = make_scheduler(num_blocks=64)
        alone.add(Sequence.from_request(request, make_tiles(request), choice=choice))
        expected = answer(alone)
        told = [event for event in self.events[key] if event.token_id is not None]
        if self.finals[key] not in ("abort", "error"):
            assert len(told) == len(expected)
            assert self.masks[key].accepted == [event.token_id for event in told[:-1]]
        else:
            assert self.masks[key].accepted == [event.token_id for event in told]
        for event, alike in zip(told, expected, strict=False):
            assert event.token_id == alike.token_id
            assert event.prompt_logprobs == alike.prompt_logprobs
        assert sequence.constraint is None


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
