"""What the scheduler costs in each step: it has to stay the same however many requests wait.

`python -m benchmarks.scheduler` prints Markdown. No model is involved: a step's results are made up
on the spot and not timed. Each figure is the median over `--steps` steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.core import GenerationRequest, SamplingParams
from server.engine.admission import Admissions, Admitted
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache
from server.engine.messages import Progress, encode
from server.engine.meter import Meter
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, SpanOutput, StepBudget
from server.engine.sequence import Sequence as EngineSequence

RUNNING = (32, 256)
WAITING = (10, 100, 1_000)
BLOCK_SIZE = 64
PROMPT_TOKENS = 200
LONG_PROMPT_TOKENS = 4_000
NUM_TENANTS = 8
NUM_PRIORITIES = 5


class Requests:
    """Makes requests that differ in everything a line of waiting ones could care for."""

    def __init__(self) -> None:
        self._chance = random.Random(1)
        self._count = 0

    def make(self, *, num_prompt: int = PROMPT_TOKENS, max_tokens: int) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(
            request_id=f"request {self._count}",
            tenant=f"tenant {self._count % NUM_TENANTS}",
            prompt_ids=tuple(self._chance.randrange(100_000) for _ in range(num_prompt)),
            sampling=SamplingParams(max_tokens=max_tokens),
            priority=self._chance.randrange(NUM_PRIORITIES),
        )

    def make_sequence(self, *, num_prompt: int = PROMPT_TOKENS, max_tokens: int) -> EngineSequence:
        return EngineSequence.from_request(
            self.make(num_prompt=num_prompt, max_tokens=max_tokens), []
        )


def outputs_of(batch: Batch) -> list[SpanOutput]:
    """As if every row had drawn token 1."""
    return [SpanOutput(1 if span.is_sampled else None) for span in batch.spans]


def make_scheduler(*, num_blocks: int, max_running: int) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
        EncoderCache(max_bytes=1 << 28, bytes_per_token=1_024),
        budget=StepBudget(
            max_tokens=1 << 20, tokens_per_stage=100, max_media_tokens_beside_answers=1 << 20
        ),
        max_running=max_running,
    )


def step_times_us(
    scheduler: Scheduler, num_steps: int, *, between: Callable[[Batch], None] = lambda batch: None
) -> list[float]:
    """Of `schedule` and `commit` together; `between` steps something else may happen, untimed."""
    times_us = []
    for _ in range(num_steps):
        began_ns = time.perf_counter_ns()
        batch = scheduler.schedule()
        scheduled_ns = time.perf_counter_ns()
        assert batch is not None
        outputs = outputs_of(batch)
        resumed_ns = time.perf_counter_ns()
        scheduler.commit(batch, outputs)
        ended_ns = time.perf_counter_ns()
        times_us.append((scheduled_ns - began_ns + ended_ns - resumed_ns) / 1_000)
        between(batch)
    return times_us


def full_set(num_running: int, num_waiting: int, num_steps: int) -> list[float]:
    """As many run as may; nobody ends and nobody joins."""
    requests = Requests()
    scheduler = make_scheduler(num_blocks=num_running * 64, max_running=num_running)
    for _ in range(num_running + num_waiting):
        scheduler.add(requests.make_sequence(max_tokens=3_000))
    step_times_us(scheduler, 3)
    times_us = step_times_us(scheduler, num_steps)
    assert (scheduler.num_running, scheduler.num_waiting) == (num_running, num_waiting)
    return times_us


def full_cache(num_running: int, num_waiting: int, num_steps: int) -> list[float]:
    """Each step asks whether the first in line fits at last: a long prompt that the cache knows."""
    requests = Requests()
    num_blocks = num_running * 32
    scheduler = make_scheduler(num_blocks=num_blocks, max_running=2 * num_running)
    known = requests.make_sequence(num_prompt=LONG_PROMPT_TOKENS, max_tokens=1)
    scheduler.add(known)
    step_times_us(scheduler, 1)
    for _ in range(num_running):
        scheduler.add(requests.make_sequence(max_tokens=1_500))
    step_times_us(scheduler, 3)
    # What the known one left is kept: together with new ends it is longer than what is free.
    length = (scheduler.pool.num_free - num_running) * BLOCK_SIZE
    prompt_ids = (*known.request.prompt_ids, *range(length))
    first = GenerationRequest(
        "first",
        known.request.tenant,
        prompt_ids,
        SamplingParams(max_tokens=1),
        priority=-1,
    )
    scheduler.add(EngineSequence.from_request(first, []))
    for _ in range(num_waiting - 1):
        scheduler.add(requests.make_sequence(max_tokens=1_500))
    times_us = step_times_us(scheduler, num_steps)
    assert (scheduler.num_running, scheduler.num_waiting) == (num_running, num_waiting)
    return times_us


def coming_and_going(num_running: int, num_waiting: int, num_steps: int) -> list[float]:
    """In each step one or so ends, another joins with its prompt, and one more comes to wait."""
    requests = Requests()
    scheduler = make_scheduler(num_blocks=num_running * 64, max_running=num_running)
    chance = random.Random(2)
    for _ in range(num_running):
        scheduler.add(requests.make_sequence(max_tokens=chance.randint(1, 2 * num_running)))
    step_times_us(scheduler, 1)

    def refill(_: Batch) -> None:
        while scheduler.num_running + scheduler.num_waiting < num_running + num_waiting:
            scheduler.add(requests.make_sequence(max_tokens=num_running))

    step_times_us(scheduler, 2 * num_running, between=refill)
    return step_times_us(scheduler, num_steps, between=refill)


def leaving(num_running: int, num_waiting: int, num_steps: int) -> list[float]:
    """Besides, one that waits leaves in each step and another comes; both are timed."""
    requests = Requests()
    scheduler = make_scheduler(num_blocks=num_running * 64, max_running=num_running)
    for _ in range(num_running):
        scheduler.add(requests.make_sequence(max_tokens=3_000))
    step_times_us(scheduler, 1)
    names = []
    for _ in range(num_waiting):
        sequence = requests.make_sequence(max_tokens=3_000)
        names.append(sequence.request_id)
        scheduler.add(sequence)
    chance = random.Random(3)
    times_us = []
    for _ in range(num_steps):
        index = chance.randrange(num_waiting)
        sequence = requests.make_sequence(max_tokens=3_000)
        began_ns = time.perf_counter_ns()
        scheduler.abort(names[index])
        scheduler.add(sequence)
        changed_us = (time.perf_counter_ns() - began_ns) / 1_000
        names[index] = sequence.request_id
        times_us.append(changed_us + step_times_us(scheduler, 1)[0])
    return times_us


def admission_times_us(num_admitted: int, num_steps: int) -> list[float]:
    """In the HTTP process: asking for room, entering, starting and leaving."""
    requests = Requests()
    admissions = Admissions(max_waiting=10_000, max_per_tenant=10_000)
    for _ in range(num_admitted):
        admissions.enter(Admitted(requests.make(max_tokens=10), [], 0))
    times_us = []
    for _ in range(num_steps):
        admitted = Admitted(requests.make(max_tokens=10), [], 0)
        began_ns = time.perf_counter_ns()
        admissions.shortage(admitted.request, num_tile_bytes=0, kv_tokens=1 << 20)
        admissions.enter(admitted)
        admissions.start(admitted)
        admissions.leave(admitted)
        times_us.append((time.perf_counter_ns() - began_ns) / 1_000)
    return times_us


def report_times_us(num_steps: int) -> list[float]:
    """Making and encoding what the engine process tells of itself, four times a second."""
    scheduler = make_scheduler(num_blocks=1_000, max_running=8)
    meter = Meter(scheduler)
    times_us = []
    for _ in range(num_steps):
        began_ns = time.perf_counter_ns()
        encode(Progress((), meter.stats_if_due()))
        times_us.append((time.perf_counter_ns() - began_ns) / 1_000)
    return times_us


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    measure: Callable[[int, int, int], list[float]]
    """From how many run, how many wait and how many steps to the time of each, in microseconds."""


LOADS = (
    Load("the running set is full", full_set),
    Load("the cache is full", full_cache),
    Load("one ends, one joins", coming_and_going),
    Load("one of the waiting leaves", leaving),
)


def rows(num_steps: int) -> Iterator[Sequence[str]]:
    yield ("a step, µs", "running", *(f"{count:,} waiting" for count in WAITING))
    for load in LOADS:
        for num_running in RUNNING:
            medians = (
                statistics.median(load.measure(num_running, num_waiting, num_steps))
                for num_waiting in WAITING
            )
            yield (load.name, str(num_running), *(f"{median:.0f}" for median in medians))
    medians = (statistics.median(admission_times_us(count, num_steps)) for count in WAITING)
    yield ("admitting and letting go of one", "", *(f"{median:.1f}" for median in medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps for each figure")
    num_steps = parser.parse_args().steps
    for index, row in enumerate(rows(num_steps)):
        print("| " + " | ".join(row) + " |")
        if index == 0:
            print("|---" * len(row) + "|")
        sys.stdout.flush()
    report_us = statistics.median(report_times_us(num_steps))
    print(f"\nOne report of the engine process: {report_us:.0f} µs.")


if __name__ == "__main__":
    main()
