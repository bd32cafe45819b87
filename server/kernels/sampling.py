"""An id for each row of logits, as `server.engine.sampler` describes it: a row is a task.

What a row is narrowed and drawn by are its distances, how far each score is below the largest, and
its weights. Both stay in the nearer caches while a row is looked at again.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.vectors import (
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    compiled,
    constant,
    exp,
    fetch_add,
    greatest_of,
    integers,
    load_row,
    pointer,
    splat,
    store_row,
    vector,
)

SAMPLING_FIELDS = (
    "next_task",
    "num_tasks",
    "next_room",
    "rooms",
    "room_bytes",
    "logits",
    "num_ids",
    "weight_unit",
    "wishes",
    "chosen",
)
NUM_FIELDS = len(SAMPLING_FIELDS)
(
    NEXT_TASK,
    NUM_TASKS,
    NEXT_ROOM,
    ROOMS,
    ROOM_BYTES,
    LOGITS,
    NUM_IDS,
    WEIGHT_UNIT,
    WISHES,
    CHOSEN,
) = range(NUM_FIELDS)


class SamplingArguments(ctypes.Structure):
    """What rows are drawn from with: addresses, of logits float32 [rows, ids], which are
    overwritten, wishes float64 [rows, NUM_WISHES], and chosen int64 [rows].

    Every thread takes a room of its own, of `room_bytes`. A weight of 1 is `weight_unit`.
    """

    _fields_ = [(name, ctypes.c_int64) for name in SAMPLING_FIELDS]


NUM_WISHES = 5
TEMPERATURE, LEAST_SCORE, TOP_K, TOP_P, CHANCE = range(NUM_WISHES)
"""What each row asks for. A temperature of 0 is greedy."""

WIDTH = 32
"""Rows are made of vectors of so many numbers."""

_GATHERED_WIDTH = 16
"""Vectors that members are gathered from: of as many numbers as a machine gathers at once."""

_BLOCK_VECTORS = 32
"""A row's weights are added up by blocks of so many vectors, to draw among the sums first."""

_DIGIT_BITS = 9
_FIRST_SHIFT = 2 * _DIGIT_BITS
_FIRST_BITS = 31 - _FIRST_SHIFT

_INFINITY_BITS = 0x7F800000
_INFINITE = float("inf")


def room_bytes(num_ids: int) -> int:
    """What one thread needs: weights, members' distances and weights, bins, and blocks' sums."""
    num_blocks = -(-num_ids // (WIDTH * _BLOCK_VECTORS))
    return 3 * 4 * num_ids + 8 * (1 << _FIRST_BITS) + 8 * num_blocks


@intrinsic
def _greatest(typing_context: Any, row: Any, num_vectors: Any) -> Any:
    """The greatest number of a row, NaN where it holds one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        sizes_type = vector(INT32, WIDTH)
        greatest = cgutils.alloca_once(builder, vector(FLOAT, WIDTH))
        builder.store(constant(-math.inf, WIDTH), greatest)
        # Of numbers as bits without their sign, only those of NaN are greater than infinity's.
        largest = cgutils.alloca_once(builder, sizes_type)
        builder.store(integers(0, WIDTH), largest)
        with cgutils.for_range(builder, count) as loop:
            values = load_row(builder, address, loop.index, WIDTH, FLOAT32)
            before = builder.load(greatest)
            is_greater = builder.fcmp_ordered(">", values, before)
            builder.store(builder.select(is_greater, values, before), greatest)
            sizes = builder.and_(builder.bitcast(values, sizes_type), integers(0x7FFFFFFF, WIDTH))
            before = builder.load(largest)
            is_larger = builder.icmp_unsigned(">", sizes, before)
            builder.store(builder.select(is_larger, sizes, before), largest)
        reduce = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.umax.v{WIDTH}i32", (), ir.FunctionType(INT32, [sizes_type])
        )
        size = builder.call(reduce, [builder.load(largest)])
        is_number = builder.icmp_unsigned("<=", size, INT32(_INFINITY_BITS))
        value = greatest_of(builder, builder.load(greatest), WIDTH)
        return builder.select(is_number, value, FLOAT(math.nan))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def _place_in(typing_context: Any, row: Any, index: Any, value: Any) -> Any:
    """Where a row's vector first has a value; WIDTH where it has not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, place, wanted = arguments
        values = load_row(builder, address, place, WIDTH, FLOAT32)
        is_equal = builder.fcmp_ordered("==", values, splat(builder, wanted, WIDTH))
        bits = builder.bitcast(is_equal, ir.IntType(WIDTH))
        return builder.zext(builder.cttz(bits, ir.IntType(1)(0)), INT64)

    return types.int64(types.int64, types.int64, types.float32), generate


@intrinsic
def _weigh(
    typing_context: Any,
    row: Any,
    weights: Any,
    num_vectors: Any,
    greatest: Any,
    temperature: Any,
    farthest: Any,
    unit: Any,
) -> Any:
    """Makes a row's logits distances, and fills its weights, 0 beyond `farthest` -> their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, weight_address, count = arguments[:3]
        zeros = constant(0.0, WIDTH)
        greatests, temperatures, limits, units = (
            splat(builder, each, WIDTH) for each in arguments[3:]
        )
        total = _sum_of_none(builder)
        with cgutils.for_range(builder, count) as loop:
            logits = load_row(builder, address, loop.index, WIDTH, FLOAT32)
            below = builder.fdiv(builder.fsub(greatests, logits), temperatures)
            store_row(builder, below, address, loop.index, WIDTH, FLOAT32)
            shares = exp(builder, builder.fneg(below), WIDTH)
            is_within = builder.fcmp_ordered("<=", below, limits)
            values = builder.select(is_within, builder.fmul(shares, units), zeros)
            store_row(builder, values, weight_address, loop.index, WIDTH, FLOAT32)
            _add_whole(builder, values, total)
        return _sum_of(builder, total)

    arguments = [*[types.int64] * 3, *[types.float32] * 4]
    return types.int64(*arguments), generate


@intrinsic
def _sum_within(
    typing_context: Any, row: Any, weights: Any, first: Any, stop: Any, limit: Any
) -> Any:
    """The sum of the weights in these vectors of a row that are not beyond a distance."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, weight_address, start, end, limit = arguments
        limits, zeros = splat(builder, limit, WIDTH), constant(0.0, WIDTH)
        total = _sum_of_none(builder)
        with cgutils.for_range(builder, end, start=start) as loop:
            below = load_row(builder, address, loop.index, WIDTH, FLOAT32)
            values = load_row(builder, weight_address, loop.index, WIDTH, FLOAT32)
            is_within = builder.fcmp_ordered("<=", below, limits)
            _add_whole(builder, builder.select(is_within, values, zeros), total)
        return _sum_of(builder, total)

    return types.int64(*[types.int64] * 4, types.float32), generate


def _sum_of_none(builder: Any) -> Any:
    sums = vector(INT64, WIDTH)
    return cgutils.alloca_once_value(builder, ir.Constant(sums, [0] * WIDTH))


def _add_whole(builder: Any, values: Any, total: Any) -> None:
    """Weights count as the integers they are when cut off."""
    whole = builder.fptosi(values, vector(INT64, WIDTH))
    builder.store(builder.add(builder.load(total), whole), total)


def _sum_of(builder: Any, total: Any) -> Any:
    kind = ir.FunctionType(INT64, [vector(INT64, WIDTH)])
    name = f"llvm.vector.reduce.add.v{WIDTH}i64"
    reduce = builder.module.declare_intrinsic(name, (), kind)
    return builder.call(reduce, [builder.load(total)])


@intrinsic
def _gather_members(
    typing_context: Any,
    row: Any,
    weights: Any,
    num_vectors: Any,
    limit: Any,
    member_distances: Any,
    member_weights: Any,
) -> Any:
    """Distances and weights of those not beyond a distance, one behind another -> their number."""
    width = _GATHERED_WIDTH

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, weight_address, count, limit, *outputs = arguments
        limits = splat(builder, limit, width)
        floats, bits = vector(FLOAT, width), vector(ir.IntType(1), width)
        compress = builder.module.declare_intrinsic(
            f"llvm.experimental.vector.compress.v{width}f32",
            (),
            ir.FunctionType(floats, [floats, bits, floats]),
        )
        num_bytes = cgutils.alloca_once_value(builder, INT64(0))
        with cgutils.for_range(builder, builder.mul(count, INT64(WIDTH // width))) as loop:
            below = load_row(builder, address, loop.index, width, FLOAT32)
            is_within = builder.fcmp_ordered("<=", below, limits)
            mask = builder.bitcast(is_within, ir.IntType(width))
            with builder.if_then(builder.icmp_unsigned("!=", mask, mask.type(0))):
                values = load_row(builder, weight_address, loop.index, width, FLOAT32)
                place = builder.load(num_bytes)
                for output, each in zip(outputs, (below, values), strict=True):
                    gathered = builder.call(
                        compress, [each, is_within, ir.Constant(floats, ir.Undefined)]
                    )
                    target = builder.inttoptr(builder.add(output, place), floats.as_pointer())
                    builder.store(gathered, target, align=4)
                more = builder.zext(builder.ctpop(mask), INT64)
                more = builder.mul(more, INT64(4))
                builder.store(builder.add(place, more), num_bytes)
        return builder.udiv(builder.load(num_bytes), INT64(4))

    arguments = [*[types.int64] * 3, types.float32, types.int64, types.int64]
    return types.int64(*arguments), generate


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], INT32), FLOAT)

    return types.float32(types.int64), generate


@njit(error_model="numpy")
def _distance_that_reaches(wanted: Any, distances: Any, weights: Any, count: Any, held: Any) -> Any:
    """The least of the first `count` distances within which the weights reach `wanted`.

    distances are int32, the bits of float32 that are not negative; held has a place for each bin.
    """
    bits, shift, num_bits = 0, _FIRST_SHIFT, _FIRST_BITS
    while shift >= 0:
        num_bins = 1 << num_bits
        for digit in range(num_bins):
            held[digit] = 0
        for index in range(count):
            held[distances[index] >> shift & num_bins - 1] += np.int64(weights[index])
        found = 0
        while held[found] < wanted:
            wanted -= held[found]
            found += 1
        bits |= found << shift
        num_kept = 0
        for index in range(count):
            distance = distances[index]
            distances[num_kept], weights[num_kept] = distance, weights[index]
            num_kept += (distance >> shift & num_bins - 1) == found
        count, num_bits = num_kept, _DIGIT_BITS
        shift -= _DIGIT_BITS
    return _as_float(bits)


def compile_sampling() -> Any:
    """The function that chooses an id for each row, -1 for one that is unusable."""

    def sampling(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task, next_room = call[NEXT_TASK:].ctypes.data, call[NEXT_ROOM:].ctypes.data
        num_rows, num_ids = call[NUM_TASKS], call[NUM_IDS]
        num_vectors = num_ids // WIDTH
        num_blocks = (num_vectors + _BLOCK_VECTORS - 1) // _BLOCK_VECTORS
        wishes = carray(pointer(call[WISHES]), (num_rows, NUM_WISHES), np.float64)
        chosen = carray(pointer(call[CHOSEN]), (num_rows,), np.int64)
        unit = np.float32(call[WEIGHT_UNIT])

        weight_place = call[ROOMS] + fetch_add(next_room) * call[ROOM_BYTES]
        distance_place = weight_place + 4 * num_ids
        value_place = distance_place + 4 * num_ids
        held_place = value_place + 4 * num_ids
        sums_place = held_place + 8 * (1 << _FIRST_BITS)
        weights = carray(pointer(weight_place), (num_ids,), np.float32)
        member_distances = carray(pointer(distance_place), (num_ids,), np.int32)
        member_weights = carray(pointer(value_place), (num_ids,), np.float32)
        held = carray(pointer(held_place), (1 << _FIRST_BITS,), np.int64)
        sums = carray(pointer(sums_place), (num_blocks,), np.int64)

        while True:
            task = fetch_add(next_task)
            if task >= num_rows:
                break
            row = call[LOGITS] + task * 4 * num_ids
            chosen[task] = -1
            greatest = _greatest(row, num_vectors)
            if not -_INFINITE < greatest < _INFINITE:  # nor where it is NaN
                continue
            if wishes[task, TEMPERATURE] == 0.0:
                index = 0
                place = _place_in(row, index, greatest)
                while place == WIDTH:
                    index += 1
                    place = _place_in(row, index, greatest)
                chosen[task] = index * WIDTH + place
                continue

            limit = np.float32(-wishes[task, LEAST_SCORE])
            temperature = np.float32(wishes[task, TEMPERATURE])
            total = _weigh(row, weight_place, num_vectors, greatest, temperature, limit, unit)
            if wishes[task, TOP_K] < num_ids:
                everything = np.float32(_INFINITE)
                count = _gather_members(
                    row, weight_place, num_vectors, everything, distance_place, value_place
                )
                for index in range(count):
                    member_weights[index] = 1
                wanted = np.int64(wishes[task, TOP_K])
                limit = min(
                    limit,
                    _distance_that_reaches(wanted, member_distances, member_weights, count, held),
                )
                total = _sum_within(row, weight_place, 0, num_vectors, limit)
            if wishes[task, TOP_P] < 1.0:
                wanted = min(np.int64(math.ceil(wishes[task, TOP_P] * total)), total)
                if wanted < total:
                    # Even if all ids were as light as one there, less than the rest is beyond it.
                    rest = (total - wanted) / (np.float64(unit) * num_ids)
                    limit = min(limit, np.float32(0.01 - math.log(rest)))
                count = _gather_members(
                    row, weight_place, num_vectors, limit, distance_place, value_place
                )
                limit = _distance_that_reaches(
                    wanted, member_distances, member_weights, count, held
                )

            total = 0
            for block in range(num_blocks):
                first = block * _BLOCK_VECTORS
                stop = min(first + _BLOCK_VECTORS, num_vectors)
                sums[block] = _sum_within(row, weight_place, first, stop, limit)
                total += sums[block]
            # Under the total, so that rounding never lands behind the last weight.
            target = min(np.int64(wishes[task, CHANCE] * total), total - 1)
            block = 0
            while target >= sums[block]:
                target -= sums[block]
                block += 1
            distances = carray(pointer(row), (num_ids,), np.float32)
            index = block * _BLOCK_VECTORS * WIDTH
            while True:
                if distances[index] <= limit:
                    target -= np.int64(weights[index])
                if target < 0:
                    break
                index += 1
            chosen[task] = index

    return compiled(sampling)
