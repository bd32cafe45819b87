"""The loops that are compiled for CPUs: attention over pages, and what is between matrix products.

Numba has no vectors of its own: the inner parts are written in LLVM's terms, whose vectors of any
width become whatever the machine has. Functions are compiled once for each shape and kept beside
this file, or in the user's cache folder. All of it is one file, because numba compiles anew when
the file of a function has changed, and looks at no other.

Any number of threads may call a function at the same time with the same arguments, whose
`next_task` is 0 before: they share its tasks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

# Vectors ------------------------------------------------------------------------------------------

FLOAT, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTE_POINTER = ir.IntType(8).as_pointer()
CACHE_LINE_BYTES = 64

# Sums may be reordered, but what is not a number has to stay so: the sampler looks for it.
REORDERED = ("reassoc", "contract", "nsz")

EXP2_COEFFICIENTS = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1)
"""Of the Taylor series of 2 ** x from x ** 6 down to x ** 2: under 1e-7 off within half of 0."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
STORAGE = {"torch.float32": FLOAT32, "torch.bfloat16": BFLOAT16, "torch.float16": FLOAT16}
"""What numbers are stored as, by the name of torch's type."""

ELEMENT_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}


def _vector(element: Any, width: int) -> Any:
    return ir.VectorType(element, width)


def _constant(value: float, width: int) -> Any:
    return ir.Constant(_vector(FLOAT, width), [value] * width)


def _integers(value: int, width: int) -> Any:
    return ir.Constant(_vector(INT32, width), [value] * width)


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    """The same number in every place of a vector."""
    anything = ir.Constant(_vector(scalar.type, width), ir.Undefined)
    first = builder.insert_element(anything, scalar, INT32(0))
    return builder.shuffle_vector(first, anything, _integers(0, width))


def _times_plus(builder: Any, left: Any, right: Any, sum_so_far: Any) -> Any:
    product = builder.fmul(left, right, flags=REORDERED)
    return builder.fadd(product, sum_so_far, flags=REORDERED)


def _float_pointer(builder: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index])


def _load_row(builder: Any, address: Any, row: Any, width: int, storage: int) -> Any:
    """Row `row` of a table of rows of `width` stored numbers, as float32."""
    size = INT64(width * ELEMENT_BYTES[storage])
    place = builder.inttoptr(builder.add(address, builder.mul(row, size)), BYTE_POINTER)
    if storage == FLOAT32:
        return builder.load(builder.bitcast(place, _vector(FLOAT, width).as_pointer()), align=4)
    if storage == FLOAT16:
        halves = _vector(ir.HalfType(), width)
        return builder.fpext(
            builder.load(builder.bitcast(place, halves.as_pointer()), align=2),
            _vector(FLOAT, width),
        )
    # bfloat16 is the upper half of a float32
    bits = builder.load(builder.bitcast(place, _vector(INT16, width).as_pointer()), align=2)
    wide = builder.shl(builder.zext(bits, _vector(INT32, width)), _integers(16, width))
    return builder.bitcast(wide, _vector(FLOAT, width))


def _store_row(builder: Any, values: Any, address: Any, row: Any, width: int, storage: int) -> None:
    """The counterpart of `_load_row`: rounds to the nearest, to even where two are as near."""
    size = INT64(width * ELEMENT_BYTES[storage])
    place = builder.inttoptr(builder.add(address, builder.mul(row, size)), BYTE_POINTER)
    if storage == FLOAT32:
        builder.store(values, builder.bitcast(place, values.type.as_pointer()), align=4)
        return
    if storage == FLOAT16:
        halves = builder.fptrunc(values, _vector(ir.HalfType(), width))
        builder.store(halves, builder.bitcast(place, halves.type.as_pointer()), align=2)
        return
    bits = builder.bitcast(values, _vector(INT32, width))
    upper = builder.lshr(bits, _integers(16, width))
    is_odd = builder.and_(upper, _integers(1, width))
    rounded = builder.add(bits, builder.add(is_odd, _integers(0x7FFF, width)))
    rounded = builder.lshr(rounded, _integers(16, width))
    # Rounding could carry the bits of what is not a number into a number.
    is_number = builder.fcmp_ordered("==", values, values)
    rounded = builder.select(is_number, rounded, _integers(0x7FC0, width))
    shorts = builder.trunc(rounded, _vector(INT16, width))
    builder.store(shorts, builder.bitcast(place, shorts.type.as_pointer()), align=2)


def _prefetch_row(builder: Any, address: Any, row: Any, num_bytes: int) -> None:
    arguments = [BYTE_POINTER, INT32, INT32, INT32]
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [BYTE_POINTER], ir.FunctionType(ir.VoidType(), arguments)
    )
    start = builder.add(address, builder.mul(row, INT64(num_bytes)))
    for offset in range(0, num_bytes, CACHE_LINE_BYTES):
        line = builder.inttoptr(builder.add(start, INT64(offset)), BYTE_POINTER)
        builder.call(prefetch, [line, INT32(0), INT32(2), INT32(1)])  # read, level 2, data


def _exp(builder: Any, exponents: Any, width: int) -> Any:
    """e to the power of numbers <= 0, about 1e-7 off; what is not a number stays so."""
    powers = builder.fmul(exponents, _constant(math.log2(math.e), width))
    least = _constant(-125.0, width)
    powers = builder.select(builder.fcmp_ordered("<", powers, least), least, powers)
    # Added to this, a number is rounded to an integer, which its lowest bits then hold.
    rounder = _constant(1.5 * 2.0**23, width)
    rounded = builder.fadd(powers, rounder)
    rest = builder.fsub(powers, builder.fsub(rounded, rounder))
    series = _constant(EXP2_COEFFICIENTS[0], width)
    for coefficient in (*EXP2_COEFFICIENTS[1:], math.log(2), 1.0):
        series = _times_plus(builder, series, rest, _constant(coefficient, width))
    bits = builder.shl(builder.bitcast(rounded, _vector(INT32, width)), _integers(23, width))
    scale = builder.bitcast(builder.add(bits, _integers(127 << 23, width)), _vector(FLOAT, width))
    return builder.fmul(series, scale)


def _reduce(builder: Any, operation: str, values: Any, width: int, *start: Any) -> Any:
    kinds = [*(each.type for each in start), values.type]
    reduce = builder.module.declare_intrinsic(
        f"llvm.vector.reduce.{operation}.v{width}f32", (), ir.FunctionType(FLOAT, kinds)
    )
    return builder.call(reduce, [*start, values], fastmath=REORDERED)


@intrinsic(prefer_literal=True)
def _fetch_add(typing_context: Any, address: Any) -> Any:
    """One more at an address that all threads share; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], INT64.as_pointer())
        return builder.atomic_rmw("add", place, INT64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], BYTE_POINTER)

    return types.voidptr(types.int64), generate


# Attention ----------------------------------------------------------------------------------------
#
# A task is one key/value head of one sequence: its query heads are computed together, so that keys
# and values are read once. The pages are walked with a running maximum (the online softmax of
# FlashAttention, arXiv:2205.14135), everything in float32. A page holds its keys as
# [head_dim, page_size], so that a vector runs across tokens, and its values as
# [page_size, head_dim], so that one runs across dimensions; while a page is computed the next one
# is called into the cache.

HIDDEN = -3e38
"""The score of a position that is not seen, and of the maximum before the first page."""

FIELDS = (
    "next_task",
    "num_tasks",
    "num_kv_heads",
    "keys",
    "values",
    "queries",
    "output",
    "bounds",
    "lengths",
    "block_table",
    "table_width",
    "max_queries",
    "new_keys",
    "new_values",
    "slots",
)
NUM_FIELDS = len(FIELDS)
NEXT_TASK, NUM_TASKS, NUM_KV_HEADS, KEYS, VALUES, QUERIES, OUTPUT = range(7)
BOUNDS, LENGTHS, BLOCK_TABLE, TABLE_WIDTH, MAX_QUERIES = range(7, 12)
NEW_KEYS, NEW_VALUES, SLOTS = range(12, NUM_FIELDS)
"""Where each field of the arguments stands: compiled code sees an array of 64-bit numbers."""


class AttentionArguments(ctypes.Structure):
    """What the kernels of attention are called with; addresses of contiguous tensors, and sizes.

    queries, output  float32 [tokens, heads, head_dim]; queries are scaled already
    keys             [pages, kv_heads, head_dim, page_size]
    values           [pages, kv_heads, page_size, head_dim]
    bounds           int32 [sequences + 1]: the tokens of each sequence
    lengths          int32 [sequences]: its positions, those tokens being the last of them
    block_table      int32 [sequences, table_width]
    new_keys, new_values  [tokens, kv_heads, head_dim], to be written to slots (int64 [tokens])
    """

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


@intrinsic(prefer_literal=True)
def _attend_page(
    typing_context: Any,
    queries: Any,
    keys: Any,
    values: Any,
    next_keys: Any,
    next_values: Any,
    num_visible: Any,
    output: Any,
    state: Any,
    group: Any,
    head_dim: Any,
    page_size: Any,
    storage: Any,
) -> Any:
    """One page for one group of query heads.

    `output` float32 [group, head_dim] holds the values weighted so far, `state` float32 [2, group]
    the largest score and the sum of the weights. All but the last four are addresses and a count.
    """
    num_heads, dim = group.literal_value, head_dim.literal_value
    size, kind = page_size.literal_value, storage.literal_value

    def scores_of(builder: Any, query_address: Any, key_address: Any, next_address: Any) -> Any:
        sums = [cgutils.alloca_once_value(builder, _constant(0.0, size)) for _ in range(num_heads)]
        for place in sums:
            builder.store(_constant(0.0, size), place)
        with cgutils.for_range(builder, INT64(dim)) as loop:
            row = _load_row(builder, key_address, loop.index, size, kind)
            _prefetch_row(builder, next_address, loop.index, size * ELEMENT_BYTES[kind])
            for head, place in enumerate(sums):
                index = builder.add(loop.index, INT64(head * dim))
                query = builder.load(_float_pointer(builder, query_address, index))
                broadcast = _splat(builder, query, size)
                builder.store(_times_plus(builder, broadcast, row, builder.load(place)), place)
        return [builder.load(place) for place in sums]

    def weigh(builder: Any, scores: Any, visible: Any, state_address: Any, head: int) -> Any:
        """The weights of a page's positions, and what all weights before shrink by."""
        largest_place = _float_pointer(builder, state_address, INT64(head))
        sum_place = _float_pointer(builder, state_address, INT64(num_heads + head))
        scores = builder.select(visible, scores, _constant(HIDDEN, size))
        before, here = builder.load(largest_place), _reduce(builder, "fmax", scores, size)
        largest = builder.select(builder.fcmp_ordered(">", before, here), before, here)
        shift = builder.fsub(scores, _splat(builder, largest, size))
        weights = _exp(builder, shift, size)
        # A vector for one number, because the sum must shrink by just what the weights shrink by.
        shrink = _exp(builder, _splat(builder, builder.fsub(before, largest), 4), 4)
        shrink = builder.extract_element(shrink, INT32(0))
        total = _reduce(builder, "fadd", weights, size, FLOAT(0.0))
        builder.store(_times_plus(builder, builder.load(sum_place), shrink, total), sum_place)
        builder.store(largest, largest_place)
        return weights, shrink

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query_address, key_address, value_address, next_k, next_v, count, out, state_at = arguments[
            :8
        ]
        lanes = ir.Constant(_vector(INT32, size), list(range(size)))
        last = _splat(builder, builder.trunc(count, INT32), size)
        visible = builder.icmp_signed("<", lanes, last)
        weights, sums, targets = [], [], []
        for head, scores in enumerate(scores_of(builder, query_address, key_address, next_k)):
            weight, shrink = weigh(builder, scores, visible, state_at, head)
            place = cgutils.alloca_once(builder, _vector(FLOAT, size))
            builder.store(weight, place)
            weights.append(builder.bitcast(place, FLOAT.as_pointer()))
            target = _float_pointer(builder, out, INT64(head * dim))
            target = builder.bitcast(target, _vector(FLOAT, dim).as_pointer())
            total = cgutils.alloca_once(builder, _vector(FLOAT, dim))
            shrunk = builder.fmul(builder.load(target, align=4), _splat(builder, shrink, dim))
            builder.store(shrunk, total)
            sums.append(total)
            targets.append(target)
        with cgutils.for_range(builder, count) as loop:
            row = _load_row(builder, value_address, loop.index, dim, kind)
            _prefetch_row(builder, next_v, loop.index, dim * ELEMENT_BYTES[kind])
            for weight, total in zip(weights, sums, strict=True):
                scalar = builder.load(builder.gep(weight, [loop.index]))
                broadcast = _splat(builder, scalar, dim)
                builder.store(_times_plus(builder, broadcast, row, builder.load(total)), total)
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (num_heads, dim, size, kind)]
    return types.void(*[types.int64] * 8, *literals), generate


def compile_attend(*, group: int, head_dim: int, page_size: int, storage: int) -> Any:
    """The function that takes the address of `AttentionArguments` and fills `output`.

    Any number of threads may call it at the same time with the same arguments, whose `next_task`
    is 0 before: they share its tasks. It skips sequences of more than `max_queries` tokens.
    """
    hidden = np.float32(HIDDEN)
    one = np.float32(1.0)
    page_bytes = head_dim * page_size * ELEMENT_BYTES[storage]

    def attend(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_tasks, num_kv_heads = call[NUM_TASKS], call[NUM_KV_HEADS]
        keys, values, queries, output = call[KEYS], call[VALUES], call[QUERIES], call[OUTPUT]
        table_width, max_queries = call[TABLE_WIDTH], call[MAX_QUERIES]
        num_sequences = num_tasks // num_kv_heads
        bounds = carray(_pointer(call[BOUNDS]), (num_sequences + 1,), np.int32)
        lengths = carray(_pointer(call[LENGTHS]), (num_sequences,), np.int32)
        table = carray(_pointer(call[BLOCK_TABLE]), (num_sequences, table_width), np.int32)
        state = np.empty(2 * group, np.float32)
        while True:
            task = _fetch_add(next_task)
            if task >= num_tasks:
                break
            sequence = task // num_kv_heads
            kv_head = task % num_kv_heads
            first, stop = bounds[sequence], bounds[sequence + 1]
            if stop - first > max_queries:
                continue
            for token in range(first, stop):
                num_visible = np.int64(lengths[sequence] - (stop - 1 - token))
                start = ((token * num_kv_heads + kv_head) * group) * head_dim * 4
                result = carray(_pointer(output + start), (group, head_dim), np.float32)
                for head in range(group):
                    state[head] = hidden
                    state[group + head] = 0
                    for dimension in range(head_dim):
                        result[head, dimension] = 0
                num_pages = (num_visible + page_size - 1) // page_size
                for page in range(num_pages):
                    following = min(page + 1, num_pages - 1)
                    here = (np.int64(table[sequence, page]) * num_kv_heads + kv_head) * page_bytes
                    after = (
                        np.int64(table[sequence, following]) * num_kv_heads + kv_head
                    ) * page_bytes
                    _attend_page(
                        queries + start,
                        keys + here,
                        values + here,
                        keys + after,
                        values + after,
                        min(np.int64(page_size), num_visible - page * page_size),
                        output + start,
                        np.int64(state.ctypes.data),
                        group,
                        head_dim,
                        page_size,
                        storage,
                    )
                for head in range(group):
                    share = one / state[group + head]
                    for dimension in range(head_dim):
                        result[head, dimension] *= share

    return _compiled(attend)


def compile_write(*, head_dim: int, page_size: int, storage: int) -> Any:
    """The function that takes the address of the arguments and writes `new_keys`, `new_values`.

    To be called as `attend` is; a task is a token.
    """
    element_bytes = ELEMENT_BYTES[storage]
    page_bytes = head_dim * page_size * element_bytes
    element = np.float32 if storage == FLOAT32 else np.uint16

    def write(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_tokens, num_kv_heads = call[NUM_TASKS], call[NUM_KV_HEADS]
        row = (num_kv_heads, head_dim)
        slots = carray(_pointer(call[SLOTS]), (num_tokens,), np.int64)
        while True:
            token = _fetch_add(next_task)
            if token >= num_tokens:
                break
            page = slots[token] // page_size
            offset = slots[token] % page_size
            start = page * num_kv_heads * page_bytes
            new_start = token * num_kv_heads * head_dim * element_bytes
            new_keys = carray(_pointer(call[NEW_KEYS] + new_start), row, element)
            new_values = carray(_pointer(call[NEW_VALUES] + new_start), row, element)
            keys = carray(
                _pointer(call[KEYS] + start), (num_kv_heads, head_dim, page_size), element
            )
            values = carray(
                _pointer(call[VALUES] + start), (num_kv_heads, page_size, head_dim), element
            )
            for head in range(num_kv_heads):
                for dimension in range(head_dim):
                    keys[head, dimension, offset] = new_keys[head, dimension]
                    values[head, offset, dimension] = new_values[head, dimension]

    return _compiled(write)


# Between matrix products --------------------------------------------------------------------------
#
# A task is one row: of the hidden states, of gates and values, or of the heads of a token.

POINTWISE_FIELDS = ("next_task", "num_tasks", "rows", "cosines", "sines", "output", "row_bytes")
NUM_POINTWISE_FIELDS = len(POINTWISE_FIELDS)
ROWS, COSINES, SINES, ROW_OUTPUT, ROW_BYTES = range(2, NUM_POINTWISE_FIELDS)
WEIGHT = COSINES


class PointwiseArguments(ctypes.Structure):
    """What the three kernels are called with; addresses, and the bytes from one row to the next.

    `cosines` is the weight where rows are normed. Cosines and sines are float32, a row a token.
    """

    _fields_ = [(name, ctypes.c_int64) for name in POINTWISE_FIELDS]


def _width_for(size: int) -> int:
    """The widest vectors of at most 64 numbers that `size` numbers are made of."""
    return math.gcd(size, 64)


@intrinsic(prefer_literal=True)
def _norm_row(
    typing_context: Any, row: Any, weight: Any, output: Any, eps: Any, size: Any, storage: Any
) -> Any:
    """output = weight * row / sqrt(mean(row ** 2) + eps)"""
    num, kind = size.literal_value, storage.literal_value
    width = _width_for(num)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row_address, weight_address, output_address, epsilon = arguments[:4]
        squares = cgutils.alloca_once_value(builder, _constant(0.0, width))
        builder.store(_constant(0.0, width), squares)
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            values = _load_row(builder, row_address, loop.index, width, kind)
            builder.store(_times_plus(builder, values, values, builder.load(squares)), squares)
        total = _reduce(builder, "fadd", builder.load(squares), width, FLOAT(0.0))
        mean = builder.fmul(total, FLOAT(1.0 / num))
        root = builder.module.declare_intrinsic(
            "llvm.sqrt", [FLOAT], ir.FunctionType(FLOAT, [FLOAT])
        )
        scale = builder.fdiv(FLOAT(1.0), builder.call(root, [builder.fadd(mean, epsilon)]))
        scales = _splat(builder, scale, width)
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            values = _load_row(builder, row_address, loop.index, width, kind)
            weights = _load_row(builder, weight_address, loop.index, width, kind)
            values = builder.fmul(builder.fmul(values, scales), weights)
            _store_row(builder, values, output_address, loop.index, width, kind)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (num, kind)]
    return types.void(types.int64, types.int64, types.int64, types.float32, *literals), generate


@intrinsic(prefer_literal=True)
def _gate_row(typing_context: Any, row: Any, output: Any, size: Any, storage: Any) -> Any:
    """output [size] = SiLU of the first half of the row, times the second half"""
    num, kind = size.literal_value, storage.literal_value
    width = _width_for(num)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gate_address, output_address = arguments[:2]
        value_address = builder.add(gate_address, INT64(num * ELEMENT_BYTES[kind]))
        zeros, ones = _constant(0.0, width), _constant(1.0, width)
        with cgutils.for_range(builder, INT64(num // width)) as loop:
            gates = _load_row(builder, gate_address, loop.index, width, kind)
            values = _load_row(builder, value_address, loop.index, width, kind)
            # 1 / (1 + exp(-x)), and for negative x as exp(x) / (1 + exp(x)): never overflows.
            is_positive = builder.fcmp_ordered(">=", gates, zeros)
            powers = _exp(builder, builder.select(is_positive, builder.fneg(gates), gates), width)
            shares = builder.select(is_positive, ones, powers)
            shares = builder.fdiv(shares, builder.fadd(ones, powers))
            gated = builder.fmul(builder.fmul(gates, shares), values)
            _store_row(builder, gated, output_address, loop.index, width, kind)
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
            firsts = _load_row(builder, first_address, loop.index, width, kind)
            seconds = _load_row(builder, second_address, loop.index, width, kind)
            cosine = _load_row(builder, cosine_address, loop.index, width, FLOAT32)
            sine = _load_row(builder, sine_address, loop.index, width, FLOAT32)
            turned = builder.fsub(
                builder.fmul(firsts, cosine), builder.fmul(seconds, sine), flags=REORDERED
            )
            _store_row(builder, turned, output_address, loop.index, width, kind)
            turned = _times_plus(builder, firsts, sine, builder.fmul(seconds, cosine))
            _store_row(builder, turned, second_output, loop.index, width, kind)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (2 * half, kind)]
    return types.void(*[types.int64] * 4, *literals), generate


def compile_norm(*, size: int, eps: float, storage: int) -> Any:
    """The function that fills `output` with normed rows; see RMSNorm."""
    epsilon = np.float32(eps)
    output_bytes = size * ELEMENT_BYTES[storage]

    def norm(address: Any) -> None:
        call = carray(address, (NUM_POINTWISE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = _fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            row = call[ROWS] + task * call[ROW_BYTES]
            output = call[ROW_OUTPUT] + task * output_bytes
            _norm_row(row, call[WEIGHT], output, epsilon, size, storage)

    return _compiled(norm)


def compile_gate(*, size: int, storage: int) -> Any:
    """The function that makes rows of `size` out of rows of twice as many; see GatedMLP."""
    output_bytes = size * ELEMENT_BYTES[storage]

    def gate(address: Any) -> None:
        call = carray(address, (NUM_POINTWISE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = _fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            row = call[ROWS] + task * call[ROW_BYTES]
            _gate_row(row, call[ROW_OUTPUT] + task * output_bytes, size, storage)

    return _compiled(gate)


def compile_rotate(*, num_heads: int, head_dim: int, storage: int) -> Any:
    """The function that rotates the first `num_heads` heads of each row; see `rotate`."""
    head_bytes = head_dim * ELEMENT_BYTES[storage]
    angle_bytes = head_dim * ELEMENT_BYTES[FLOAT32]

    def rotate(address: Any) -> None:
        call = carray(address, (NUM_POINTWISE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        while True:
            task = _fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            row = call[ROWS] + task * call[ROW_BYTES]
            output = call[ROW_OUTPUT] + task * num_heads * head_bytes
            cosines = call[COSINES] + task * angle_bytes
            sines = call[SINES] + task * angle_bytes
            for head in range(num_heads):
                place = head * head_bytes
                _rotate_head(row + place, cosines, sines, output + place, head_dim, storage)

    return _compiled(rotate)


def _compiled(function: Callable[[Any], None]) -> Any:
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True)(function)
    except (RuntimeError, OSError):
        # There is nowhere to keep it: no folder can be written to, or the disk is full.
        return cfunc(signature)(function)
