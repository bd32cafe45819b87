"""Batches made by background processes, so that drawing does not stall the arithmetic.

A batch is asked for by number: its content depends on (seed, phase, number) and the task weights
alone, so a resumed run goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

Weights = dict[str, float]
Maker = Callable[[random.Random, Weights], Any]


def stream_of(seed: int, *names: object) -> random.Random:
    return random.Random(zlib.crc32(repr((seed, names)).encode()) + (seed << 32))


def produce(
    maker: Maker,
    seed: int,
    phase: str,
    first: int,
    stride: int,
    batches: multiprocessing.queues.Queue[Any],
    weights: multiprocessing.queues.Queue[Weights],
) -> None:
    number, current = first, {}
    parent = os.getppid()
    while os.getppid() == parent:
        while not weights.empty():
            current = weights.get()
        batches.put(maker(stream_of(seed, phase, number), current))
        number += stride


class Feed:
    """Iterates over batches; `reweigh` sends new task weights to the producers."""

    def __init__(
        self, maker: Maker, *, seed: int, phase: str, first: int, num_processes: int = 1
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.queues: list[Any] = []
        self.weights: list[Any] = []
        self.processes = []
        for index in range(num_processes):
            queue, weights = context.Queue(maxsize=6), context.Queue()
            process = context.Process(
                target=produce,
                args=(maker, seed, phase, first + index, num_processes, queue, weights),
                daemon=True,
            )
            process.start()
            self.queues.append(queue)
            self.weights.append(weights)
            self.processes.append(process)

    def __iter__(self) -> Iterator[Any]:
        while True:
            for queue in self.queues:
                yield queue.get()

    def reweigh(self, weights: Weights) -> None:
        for queue in self.weights:
            queue.put(weights)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
