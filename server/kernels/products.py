"""Linear layers of bfloat16, by whichever units of the CPU multiply the fastest."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from server.kernels import pairs, tiles
from server.kernels.machine import ProductUnits
from server.kernels.pairs import COLUMNS, SUMS_ROW_BYTES, WIDTH, store_rounded
from server.kernels.vectors import (
    BFLOAT16,
    FLOAT32,
    compiled,
    fetch_add,
    load_row,
    silu,
    stack_room,
)

STEP_PAIRS = tiles.PAIRS_OF_STEP


@dataclass(frozen=True, slots=True)
class Multiplier:
    """How rows are multiplied by a block of weights.

    Whatever rows are multiplied together, each one's result is to the bit the same; and so it is
    where a block is multiplied in parts, if these end between steps of STEP_PAIRS pairs.
    """

    function: Callable[..., Any]
    """(module, *, adds, ahead) -> LLVM's function of the first seven arguments of `multiply`."""

    task_rows: int
    """Of a linear layer, for which a block is read once."""

    attention_rows: int
    """Queries that walk a sequence's pages together, of which each page is read once for all."""


MULTIPLIERS: dict[ProductUnits, Multiplier] = {
    "pairs": Multiplier(
        pairs.product_function,
        task_rows=16 * pairs.MAX_ROWS,
        attention_rows=4 * pairs.MAX_ROWS,
    ),
    "tiles": Multiplier(tiles.product_function, task_rows=192, attention_rows=64),
}

UNITS: tuple[ProductUnits, ...] = tuple(MULTIPLIERS)
"""By the number that compiled functions know them by. (Numba keeps no function that was compiled
with another Python object.)"""


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
    units: Any,
) -> Any:
    """sums [num_rows, 64] = rows [num_rows, 2 * num_pairs] times a block, or that much more.

    `sums` is the address of float32 [num_rows, 64], rows and block of bfloat16; rows are
    `row_bytes` apart. The next block may be called into the cache, where asked for.
    """
    adds, ahead = bool(is_added.literal_value), bool(calls_ahead.literal_value)
    number = int(units.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_of = MULTIPLIERS[UNITS[number]].function
        builder.call(function_of(builder.module, adds=adds, ahead=ahead), arguments[:7])
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (int(adds), int(ahead), number)]
    return types.void(*[types.int64] * 7, *literals), generate


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
    block of the output for `task_rows` rows: `num_tasks_of` says how many there are.
    """

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def num_tasks_of(units: ProductUnits, *, num_rows: int, num_columns: int) -> int:
    return -(-num_columns // COLUMNS) * -(-num_rows // MULTIPLIERS[units].task_rows)


@intrinsic(prefer_literal=True)
def _store_row_of_sums(
    typing_context: Any,
    sums: Any,
    bias: Any,
    values_bias: Any,
    output: Any,
    num_vectors: Any,
    second_sums: Any,
    has_bias: Any,
    is_gated: Any,
) -> Any:
    """A row of sums, with the bias, to its place; gated by SiLU of it the second block's sums."""
    biased, gated = bool(has_bias.literal_value), bool(is_gated.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_address, bias_address, values_bias_address, output_address, count, second = arguments[
            :6
        ]

        def summed(address: Any, bias_at: Any, part: Any) -> Any:
            values = load_row(builder, address, part, WIDTH, FLOAT32)
            if not biased:
                return values
            return builder.fadd(values, load_row(builder, bias_at, part, WIDTH, BFLOAT16))

        with cgutils.for_range(builder, count) as loop:
            result = summed(sums_address, bias_address, loop.index)
            if gated:
                values = summed(second, values_bias_address, loop.index)
                result = builder.fmul(silu(builder, result, WIDTH), values)
            store_rounded(builder, result, output_address, loop.index)
        return context.get_dummy_value()

    literals = [types.literal(int(each)) for each in (biased, gated)]
    return types.void(*[types.int64] * 6, *literals), generate


def compile_linear(units: ProductUnits, *, has_bias: bool, is_gated: bool) -> Any:
    """The function that takes the address of `LinearArguments` and fills `output`.

    Gated, it makes SiLU(gates) * values of the sums themselves, before any rounding.
    """
    biased, gated = int(has_bias), int(is_gated)
    kind = UNITS.index(units)
    task_rows = MULTIPLIERS[units].task_rows
    sums_bytes = task_rows * SUMS_ROW_BYTES
    second_bytes = sums_bytes if is_gated else 0

    def linear(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_rows, num_columns, num_pairs = call[NUM_ROWS], call[NUM_COLUMNS], call[NUM_PAIRS]
        num_chunks = (num_rows + task_rows - 1) // task_rows
        num_blocks = (num_columns + COLUMNS - 1) // COLUMNS
        sums, second = stack_room(sums_bytes), stack_room(second_bytes)
        following = fetch_add(next_task)
        while following < call[NUM_TASKS]:
            task = following
            # Taken now already, for its weights to be called into the cache meanwhile.
            following = fetch_add(next_task)
            # All blocks for some rows before the next ones: these rows stay in the second cache,
            # and the weights that are read meanwhile have been called.
            chunk, block = task // num_blocks, task % num_blocks
            column = block * COLUMNS
            num_vectors = min(COLUMNS, num_columns - column) // WIDTH
            weight = call[WEIGHT] + block * call[BLOCK_BYTES]
            values_weight = weight + (num_columns // COLUMNS) * call[BLOCK_BYTES]
            next_weight = weight
            if following < call[NUM_TASKS]:
                next_weight = call[WEIGHT] + following % num_blocks * call[BLOCK_BYTES]
            bias = call[BIAS] + column * 2
            first = chunk * num_rows // num_chunks
            count = (chunk + 1) * num_rows // num_chunks - first
            row_bytes = call[ROW_BYTES]
            rows = call[ROWS] + first * row_bytes
            after = values_weight if gated else next_weight
            multiply(rows, row_bytes, count, weight, num_pairs, sums, after, 0, 0, kind)
            if gated:
                after = next_weight
                multiply(
                    rows, row_bytes, count, values_weight, num_pairs, second, after, 0, 0, kind
                )
            output = call[OUTPUT] + first * call[OUTPUT_BYTES] + column * 2
            for row in range(count):
                _store_row_of_sums(
                    sums + row * SUMS_ROW_BYTES,
                    bias,
                    bias + num_columns * 2,
                    output + row * call[OUTPUT_BYTES],
                    num_vectors,
                    second + row * SUMS_ROW_BYTES,
                    biased,
                    gated,
                )

    return compiled(linear)
