"""Products of bfloat16 matrices, where the CPU has an instruction for pairs of them (AVX-512 BF16).

The right matrix lies in blocks of 64 columns, each with its rows in pairs: [pairs, 64, 2]. That is
how oneDNN packs weights for such a CPU. A block is walked once for up to six rows of the left
matrix, whose 24 vectors of sums stay in registers. Every sum is made in the order of the pairs,
whatever rows are computed beside it, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels.vectors import (
    BFLOAT16,
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    compiled,
    constant,
    fetch_add,
    load_row,
    prefetch_row,
    silu,
    splat,
    stack_room,
    store_row,
    vector,
)

COLUMNS = 64
"""Of a block."""

MAX_ROWS = 6
"""Multiplied together: with one more, sums, weights and factor would not fit in 32 registers."""

SUMS_BYTES = MAX_ROWS * COLUMNS * 4

FEW_ROWS = 3
"""With so few, a block is multiplied in less time than memory takes for the next one."""

WIDTH = 16
NUM_VECTORS = COLUMNS // WIDTH
PAIR_BYTES = 4
ROWS_AT_ONCE = 16 * MAX_ROWS
"""Of one task: the block then lies in a cache for all but the first."""


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite says no types
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * WIDTH)
_SUMS = vector(FLOAT, WIDTH)


@intrinsic(prefer_literal=True)
def multiply(
    typing_context: Any,
    rows: Any,
    row_bytes: Any,
    num_rows: Any,
    block: Any,
    num_pairs: Any,
    sums: Any,
    next_block: Any,
    is_added: Any,
    calls_ahead: Any,
) -> Any:
    """sums [num_rows, 64] = rows [num_rows, 2 * num_pairs] times a block, or that much more.

    `sums` is the address of float32 [MAX_ROWS, 64], rows and block of bfloat16; there are 1 to
    MAX_ROWS rows, `row_bytes` apart. With FEW_ROWS at most the next block is called into the cache,
    where asked for: for blocks that lie one behind the other the processor does it itself.
    """
    adds, ahead = bool(is_added.literal_value), bool(calls_ahead.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(_multiply_function(builder.module, adds=adds, ahead=ahead), arguments[:7])
        return context.get_dummy_value()

    literals = [types.literal(int(each)) for each in (adds, ahead)]
    return types.void(*[types.int64] * 7, *literals), generate


def _multiply_function(module: Any, *, adds: bool, ahead: bool) -> Any:
    """The module's own function for all calls of `multiply`: compiled once, and not inlined."""
    name = f"multiply_{'added' if adds else 'new'}{'_ahead' if ahead else ''}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * 7), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    row_address, bytes_apart, count, block, *others = function.args
    cases = [function.append_basic_block(f"rows{n}") for n in range(1, MAX_ROWS + 1)]
    choice = builder.switch(count, cases[-1])
    for number, case in enumerate(cases, start=1):
        if case is not cases[-1]:
            choice.add_case(INT64(number), case)
        builder.position_at_end(case)
        places = [
            builder.add(row_address, builder.mul(bytes_apart, INT64(row))) for row in range(number)
        ]
        _multiply_rows(builder, places, block, *others, adds=adds, ahead=ahead)
        builder.ret_void()
    return function


def _multiply_rows(
    builder: Any,
    rows: list[Any],
    block: Any,
    num_pairs: Any,
    sums: Any,
    next_block: Any,
    *,
    adds: bool,
    ahead: bool,
) -> None:
    """The loop for this number of rows; `rows` are their addresses."""
    multiply_pairs = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    )
    places = [(row, part) for row in range(len(rows)) for part in range(NUM_VECTORS)]
    before = builder.block
    zeros = constant(0.0, WIDTH)
    first = [
        load_row(builder, sums, INT64(row * NUM_VECTORS + part), WIDTH, FLOAT32) if adds else zeros
        for row, part in places
    ]
    loop, done = builder.append_basic_block("pairs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(INT64)
    index.add_incoming(INT64(0), before)
    carried = [builder.phi(_SUMS) for _ in places]
    for phi, value in zip(carried, first, strict=True):
        phi.add_incoming(value, before)
    current = list(carried)
    line = builder.add(block, builder.mul(index, INT64(COLUMNS * PAIR_BYTES)))
    weights = [_load_pairs(builder, line, part) for part in range(NUM_VECTORS)]
    if ahead and len(rows) <= FEW_ROWS:
        prefetch_row(builder, next_block, index, COLUMNS * PAIR_BYTES)
    for row, address in enumerate(rows):
        place = builder.add(address, builder.mul(index, INT64(PAIR_BYTES)))
        both = builder.load(builder.inttoptr(place, INT32.as_pointer()), align=2)
        factor = builder.bitcast(splat(builder, both, WIDTH), _PAIRS)
        for part, weight in enumerate(weights):
            at = row * NUM_VECTORS + part
            current[at] = builder.call(multiply_pairs, [current[at], weight, factor])
    following = builder.add(index, INT64(1))
    index.add_incoming(following, loop)
    for phi, value in zip(carried, current, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, done)
    builder.position_at_end(done)
    for (row, part), value in zip(places, current, strict=True):
        store_row(builder, value, sums, INT64(row * NUM_VECTORS + part), WIDTH, FLOAT32)


def _load_pairs(builder: Any, line: Any, part: int) -> Any:
    place = builder.add(line, INT64(part * WIDTH * PAIR_BYTES))
    pointer = builder.inttoptr(place, vector(INT32, WIDTH).as_pointer())
    return builder.bitcast(builder.load(pointer, align=4), _PAIRS)


def store_rounded(builder: Any, values: Any, address: Any, index: Any) -> None:
    """Sixteen float32 as bfloat16 to the nearest, the `index`-th sixteen from an address on."""
    kind = ir.VectorType(_BFloat(), WIDTH)
    function = ir.FunctionType(kind, [_SUMS])
    intrinsic_name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    rounded = builder.call(builder.module.declare_intrinsic(intrinsic_name, (), function), [values])
    place = builder.add(address, builder.mul(index, INT64(2 * WIDTH)))
    builder.store(rounded, builder.inttoptr(place, kind.as_pointer()), align=2)


# Linear layers ------------------------------------------------------------------------------------

FIELDS = (
    "next_task",
    "num_tasks",
    "rows",
    "row_bytes",
    "num_rows",
    "weight",
    "block_bytes",
    "num_pairs",
    "bias",
    "output",
    "output_bytes",
    "num_columns",
)
NUM_FIELDS = len(FIELDS)
NEXT_TASK, NUM_TASKS, ROWS, ROW_BYTES, NUM_ROWS, WEIGHT, BLOCK_BYTES, NUM_PAIRS = range(8)
BIAS, OUTPUT, OUTPUT_BYTES, NUM_COLUMNS = range(8, NUM_FIELDS)


class LinearArguments(ctypes.Structure):
    """What the linear layers are called with: addresses, counts, and bytes between neighbours.

    rows    bfloat16 [num_rows, 2 * num_pairs], of which only rows may be apart
    weight  bfloat16, blocks as above, the last of them filled up
    bias    bfloat16 [num_columns]; [2 * num_columns] where gated
    output  bfloat16 [num_rows, num_columns], num_columns a multiple of 16

    A gated layer's weight has the gates' blocks first, then as many of the values. A task is a
    block of the output for ROWS_AT_ONCE rows: `num_tasks_of` says how many there are.
    """

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def num_tasks_of(*, num_rows: int, num_columns: int) -> int:
    return -(-num_columns // COLUMNS) * -(-num_rows // ROWS_AT_ONCE)


@intrinsic(prefer_literal=True)
def _store_row_of_sums(
    typing_context: Any,
    sums: Any,
    bias: Any,
    values_bias: Any,
    output: Any,
    num_vectors: Any,
    has_bias: Any,
    is_gated: Any,
) -> Any:
    """A row of sums, with the bias, to its place; gated by SiLU of it the sums of the second block.

    The second block's sums stand behind all rows of the first one's.
    """
    biased, gated = bool(has_bias.literal_value), bool(is_gated.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_address, bias_address, values_bias_address, output_address, count = arguments[:5]

        def summed(address: Any, bias_at: Any, part: Any) -> Any:
            values = load_row(builder, address, part, WIDTH, FLOAT32)
            if not biased:
                return values
            return builder.fadd(values, load_row(builder, bias_at, part, WIDTH, BFLOAT16))

        with cgutils.for_range(builder, count) as loop:
            result = summed(sums_address, bias_address, loop.index)
            if gated:
                second = builder.add(sums_address, INT64(SUMS_BYTES))
                values = summed(second, values_bias_address, loop.index)
                result = builder.fmul(silu(builder, result, WIDTH), values)
            store_rounded(builder, result, output_address, loop.index)
        return context.get_dummy_value()

    literals = [types.literal(int(each)) for each in (biased, gated)]
    return types.void(*[types.int64] * 5, *literals), generate


def compile_linear(*, has_bias: bool, is_gated: bool) -> Any:
    """The function that takes the address of `LinearArguments` and fills `output`.

    Gated, it makes SiLU(gates) * values of the sums themselves, before any rounding.
    """
    biased, gated = int(has_bias), int(is_gated)
    room_bytes = 2 * SUMS_BYTES

    def linear(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_rows, num_columns, num_pairs = call[NUM_ROWS], call[NUM_COLUMNS], call[NUM_PAIRS]
        num_chunks = (num_rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE
        sums = stack_room(room_bytes)
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            block = task // num_chunks
            chunk = task % num_chunks
            column = block * COLUMNS
            num_vectors = min(COLUMNS, num_columns - column) // WIDTH
            weight = call[WEIGHT] + block * call[BLOCK_BYTES]
            values_weight = weight + (num_columns // COLUMNS) * call[BLOCK_BYTES]
            bias = call[BIAS] + column * 2
            first = chunk * num_rows // num_chunks
            num_here = (chunk + 1) * num_rows // num_chunks - first
            num_groups = (num_here + MAX_ROWS - 1) // MAX_ROWS
            for group in range(num_groups):
                start = first + group * num_here // num_groups
                count = first + (group + 1) * num_here // num_groups - start
                rows = call[ROWS] + start * call[ROW_BYTES]
                multiply(rows, call[ROW_BYTES], count, weight, num_pairs, sums, weight, 0, 0)
                if gated:
                    second = sums + SUMS_BYTES
                    multiply(
                        rows, call[ROW_BYTES], count, values_weight, num_pairs, second, weight, 0, 0
                    )
                output = call[OUTPUT] + start * call[OUTPUT_BYTES] + column * 2
                for row in range(count):
                    _store_row_of_sums(
                        sums + row * COLUMNS * 4,
                        bias,
                        bias + num_columns * 2,
                        output + row * call[OUTPUT_BYTES],
                        num_vectors,
                        biased,
                        gated,
                    )

    return compiled(linear)
