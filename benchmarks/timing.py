"""Timing what runs on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Effort:
    """How long one figure is measured: until both are reached, after `num_warm` runs apart."""

    least_runs: int
    least_s: float
    num_warm: int = 1


def seconds_of(run: Callable[[], object], device: str, effort: Effort) -> list[float]:
    """The seconds of each run."""
    for _ in range(effort.num_warm):
        one_run_s(run, device)
    times_s: list[float] = []
    while len(times_s) < effort.least_runs or sum(times_s) < effort.least_s:
        times_s.append(one_run_s(run, device))
    return times_s


def one_run_s(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    started_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started_s


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
