"""What stands between matrix products, a row at a time: of the hidden states, of gates and values,
or of the heads of a token.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.vectors import (
    ELEMENT_BYTES,
    FLOAT,
    FLOAT32,
    INT64,
    REORDERED,
    STORAGE,
    compiled,
    constant,
    fetch_add,
    load_row,
    silu,
    splat,
    store_row,
    times_plus,
    total_of,
)

NORM_FIELDS = ("next_task", "num_tasks", "rows", "added", "weight", "output")
NUM_NORM_FIELDS = len(NORM_FIELDS)
NORM_ROWS, ADDED, WEIGHT, NORM_OUTPUT = range(2, NUM_NORM_FIELDS)


class NormArguments(ctypes.Structure):
    """What rows are normed with: addresses, of [rows, size] and the weight's [size]."""

    _fields_ = [(name, ctypes.c_int64) for name in NORM_FIELDS]


POINTWISE_FIELDS = ("next_task", "num_tasks", "rows", "cosines", "sines", "output", "row_bytes")
NUM_POINTWISE_FIELDS = len(POINTWISE_FIELDS)
NEXT_TASK, NUM_TASKS, ROWS, COSINES, SINES, ROW_OUTPUT, ROW_BYTES = range(NUM_POINTWISE_FIELDS)


class PointwiseArguments(ctypes.Structure):
    """What gates and rotations are called with; addresses, and the bytes between rows.

    Cosines and sines are float32, a row a token.
    """

    _fields_ = [(name, ctypes.c_int64) for name in POINTWISE_FIELDS]


def _width_for(size: int) -> int:
    """The widest vectors of at most 64 numbers that `size` numbers are made of."""
    return math.gcd(size, 64)


@intrinsic(prefer_literal=True)
def _norm_row(
    typing_context: Any,
    row: Any,
    added: Any,
    weight: Any,
    output: Any,
    eps: Any,
    size: Any,
    storage: Any,
    adds: Any,
) -> Any:
    """row += added, if it adds; output = weight * row / sqrt(mean(row ** 2) + eps)"""
    num, kind, is_sum = size.literal_value, storage.literal_value, bool(adds.literal_value)
    width = _width_for(num)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_address, added_address, weight_address, output_address, epsilon = arguments[:5]
        squares = cgutils.alloca_once_value(builder, constant(0.0, width))
        builder.store(constant(0.0, width), squares)
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            values = load_row(builder, row_address, loop.index, width, kind)
            if is_sum:
                more = load_row(builder, added_address, loop.index, width, kind)
                total = builder.fadd(values, more)
                store_row(builder, total, row_address, loop.index, width, kind)
                # What is normed is what was stored, rounding included.
                values = load_row(builder, row_address, loop.index, width, kind)
            builder.store(times_plus(builder, values, values, builder.load(squares)), squares)
        total = total_of(builder, builder.load(squares), width)
        mean = builder.fmul(total, FLOAT(1.0 / num))
        root = builder.module.declare_intrinsic(
            "llvm.sqrt", [FLOAT], ir.FunctionType(FLOAT, [FLOAT])
        )
        scale = builder.fdiv(FLOAT(1.0), builder.call(root, [builder.fadd(mean, epsilon)]))
        scales = splat(builder, scale, width)
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            values = load_row(builder, row_address, loop.index, width, kind)
            weights = load_row(builder, weight_address, loop.index, width, kind)
            values = builder.fmul(builder.fmul(values, scales), weights)
            store_row(builder, values, output_address, loop.index, width, kind)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (num, kind, int(is_sum))]
    return types.void(*[types.int64] * 4, types.float32, *literals), generate


@intrinsic(prefer_literal=True)
def _gate_row(typing_context: Any, row: Any, output: Any, size: Any, storage: Any) -> Any:
    """output [size] = SiLU of the first half of the row, times the second half"""
    num, kind = size.literal_value, storage.literal_value
    width = _width_for(num)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gate_address, output_address = arguments[:2]
        value_address = builder.add(gate_address, INT64(num * ELEMENT_BYTES[kind]))
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            gates = load_row(builder, gate_address, loop.index, width, kind)
            values = load_row(builder, value_address, loop.index, width, kind)
            gated = builder.fmul(silu(builder, gates, width), values)
            store_row(builder, gated, output_address, loop.index, width, kind)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (num, kind)]
    return types.void(types.int64, types.int64, *literals), generate


@intrinsic(prefer_literal=True)
def _rotate_head(
    typing_context: Any,
    head: Any,
    cosines: Any,
    sines: Any,
    output: Any,
    head_dim: Any,
    storage: Any,
) -> Any:
    """One head: dimension i turns with dimension i + head_dim / 2."""
    half, kind = head_dim.literal_value // 2, storage.literal_value
    half_bytes = INT64(half * ELEMENT_BYTES[kind])
    width = _width_for(half)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first_address, cosine_address, sine_address, output_address = arguments[:4]
        second_address = builder.add(first_address, half_bytes)
        second_output = builder.add(output_address, half_bytes)
        with cgutils.for_range(builder, INT64(half // width)) as loop:
            firsts = load_row(builder, first_address, loop.index, width, kind)
            seconds = load_row(builder, second_address, loop.index, width, kind)
            cosine = load_row(builder, cosine_address, loop.index, width, FLOAT32)
            sine = load_row(builder, sine_address, loop.index, width, FLOAT32)
            turned = builder.fsub(
                builder.fmul(firsts, cosine), builder.fmul(seconds, sine), flags=REORDERED
            )
            store_row(builder, turned, output_address, loop.index, width, kind)
            turned = times_plus(builder, firsts, sine, builder.fmul(seconds, cosine))
            store_row(builder, turned, second_output, loop.index, width, kind)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (2 * half, kind)]
    return types.void(*[types.int64] * 4, *literals), generate


def compile_norm(*, size: int, eps: float, dtype: str, adds: bool) -> Any:
    """The function that fills `output` with normed rows, to which it may add first; see RMSNorm."""
    storage, is_sum = STORAGE[dtype], int(adds)
    epsilon = np.float32(eps)
    row_bytes = size * ELEMENT_BYTES[storage]

    def norm(address: Any) -> None:
        call = carray(address, (NUM_NORM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            place = task * row_bytes
            _norm_row(
                call[NORM_ROWS] + place,
                call[ADDED] + place,
                call[WEIGHT],
                call[NORM_OUTPUT] + place,
                epsilon,
                size,
                storage,
                is_sum,
            )

    return compiled(norm)


def compile_gate(*, size: int, dtype: str) -> Any:
    """The function that makes rows of `size` out of rows of twice as many; see GatedMLP."""
    storage = STORAGE[dtype]
    output_bytes = size * ELEMENT_BYTES[storage]

    def gate(address: Any) -> None:
        call = carray(address, (NUM_POINTWISE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            row = call[ROWS] + task * call[ROW_BYTES]
            _gate_row(row, call[ROW_OUTPUT] + task * output_bytes, size, storage)

    return compiled(gate)


def compile_rotate(*, num_heads: int, head_dim: int, dtype: str) -> Any:
    """The function that rotates the first `num_heads` heads of each row; see `rotate`."""
    storage = STORAGE[dtype]
    head_bytes = head_dim * ELEMENT_BYTES[storage]
    angle_bytes = head_dim * ELEMENT_BYTES[FLOAT32]

    def rotate(address: Any) -> None:
        call = carray(address, (NUM_POINTWISE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            row = call[ROWS] + task * call[ROW_BYTES]
            output = call[ROW_OUTPUT] + task * num_heads * head_bytes
            cosines = call[COSINES] + task * angle_bytes
            sines = call[SINES] + task * angle_bytes
            for head in range(num_heads):
                place = head * head_bytes
                _rotate_head(row + place, cosines, sines, output + place, head_dim, storage)

    return compiled(rotate)
