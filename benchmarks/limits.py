"""What this machine can do at best, so that everything else is a fraction of it.

Several ways to read memory and to multiply matrices, and of each the best time: a limit that was
taken from one way alone would let others look better than possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import Effort, seconds_of
from server.kernels.machine import has_half_units

GEMM_DTYPES = ("bfloat16", "float32")
WEIGHT_SHAPE = (8192, 2048)
READ_BYTES = 1 << 30
"""Read in turn, so that no cache holds any of it when its turn comes again."""

READ_ROWS = (1, 4)
GEMM_ROWS = {"cpu": (128, 512), "cuda": (2048, 8192)}
"""More rows are no faster, and fewer are bound by reading the weight."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One way to reach a limit: bytes or operations a second, at best."""

    name: str
    dtype: str
    per_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """`reads` and `products` are all that was tried; what counts is the best of each."""

    reads: tuple[Probe, ...]
    products: tuple[Probe, ...]

    @property
    def read_bytes_per_s(self) -> float:
        return max(probe.per_s for probe in self.reads)

    @property
    def operations_per_s(self) -> dict[str, float]:
        """By dtype. float16 goes through the units of bfloat16 and is taken to be as fast."""
        best = {
            dtype: max(probe.per_s for probe in self.products if probe.dtype == dtype)
            for dtype in GEMM_DTYPES
        }
        return {**best, "float16": best["bfloat16"]}

    def or_better(self, other: Limits) -> Limits:
        """The better one of each probe; both have tried the same."""

        def better(mine: tuple[Probe, ...], theirs: tuple[Probe, ...]) -> tuple[Probe, ...]:
            pairs = zip(mine, theirs, strict=True)
            return tuple(max(pair, key=lambda probe: probe.per_s) for pair in pairs)

        return Limits(better(self.reads, other.reads), better(self.products, other.products))


def measure_limits(device: str, effort: Effort) -> Limits:
    with torch.inference_mode():
        return Limits(
            reads=tuple(
                Probe(name, dtype, READ_BYTES / min(seconds_of(run, device, effort)))
                for name, dtype, run in _reads(device)
            ),
            products=tuple(
                Probe(name, dtype, operations / min(seconds_of(run, device, effort)))
                for name, dtype, operations, run in _products(device)
            ),
        )


def _reads(device: str) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(name, dtype, what reads READ_BYTES bytes)"""
    for dtype in GEMM_DTYPES:
        weights = _weights(dtype, device)
        yield "sum", dtype, partial(_sum_all, weights)
        if not _can_pack(dtype, device):
            continue
        packed = [pack(weights.pop()) for _ in range(len(weights))]
        for rows in READ_ROWS:
            hidden = _random((rows, WEIGHT_SHAPE[1]), dtype, device)
            yield f"packed linear, rows: {rows}", dtype, partial(_multiply_all, hidden, packed)


def _products(device: str) -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """(name, dtype, operations, what does them)"""
    for dtype in GEMM_DTYPES:
        weight = _random(WEIGHT_SHAPE, dtype, device)
        packed = [pack(weight)] if _can_pack(dtype, device) else []
        for rows in GEMM_ROWS[torch.device(device).type]:
            hidden = _random((rows, WEIGHT_SHAPE[1]), dtype, device)
            operations = 2 * rows * weight.numel()
            yield f"linear, rows: {rows}", dtype, operations, partial(F.linear, hidden, weight)
            if packed:
                run = partial(_multiply_all, hidden, packed)
                yield f"packed linear, rows: {rows}", dtype, operations, run


def _sum_all(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.sum()


def _multiply_all(hidden: Tensor, packed: list[Tensor]) -> None:
    for weight in packed:
        packed_linear(hidden, weight)


def _can_pack(dtype: str, device: str) -> bool:
    return device == "cpu" and (dtype == "float32" or has_half_units(getattr(torch, dtype)))


def _weights(dtype: str, device: str) -> list[Tensor]:
    first = _random(WEIGHT_SHAPE, dtype, device)
    # Copies, because drawing a gigabyte takes longer than reading it a hundred times.
    return [first.clone() for _ in range(READ_BYTES // first.nbytes)]


def _random(shape: tuple[int, int], dtype: str, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(getattr(torch, dtype))


def pack(weight: Tensor) -> Tensor:
    """A weight in the order oneDNN reads it in."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def packed_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    projected: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    return projected
