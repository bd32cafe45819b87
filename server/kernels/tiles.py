"""Products of bfloat16 matrices by the CPU's units for whole tiles of them (AMX).

The blocks are those of `pairs`, [pairs, 64, 2]: sixteen pairs of sixteen columns are a tile as they
lie. So are sixteen rows' 32 numbers; tiles of fewer rows are as good. A step multiplies one tile of
rows by the four of a block, and adds to four tiles of sums. Every sum is made in the order of the
steps, whatever rows are computed beside it. Within a step the processor sums the first and the
second numbers of the pairs apart: where steps begin and end makes a difference, zeros do not.

Intel's Architecture Instruction Set Extensions Programming Reference says what the instructions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from server.kernels.pairs import LINE_BYTES, PAIR_BYTES, SUMS_ROW_BYTES
from server.kernels.vectors import (
    BYTE_POINTER,
    CACHE_LINE_BYTES,
    INT64,
    own_function,
    prefetch,
)

TILE_ROWS = 16
TILE_ROW_BYTES = 64
PAIRS_OF_STEP = TILE_ROW_BYTES // PAIR_BYTES
FEW_ROWS = 3
"""With so few, a block is multiplied in less time than memory takes for the next one."""

STEP_BYTES = PAIRS_OF_STEP * LINE_BYTES

STEPS_AT_ONCE = 8
"""For which many rows are multiplied before the next ones: so much of a block, 32 KiB, stays in the
nearest cache meanwhile."""

# The eight tiles, by number. A block's tiles are loaded into one after another of the same number:
# the processor renames it. The last two are for what is less than a step.
SUMS = (0, 1, 2, 3)
ROWS, BLOCK, LAST_ROWS, LAST_BLOCK = 4, 5, 6, 7

INT8 = ir.IntType(8)
CONFIGURATION_BYTES = 64


def _configuration(num_rows: int, last_pairs: int) -> bytearray:
    """What the tiles are: `num_rows` rows, and `last_pairs` pairs in the last step's, of 0 to 15.

    Palette 1; from byte 16 on the bytes of a row, two for each tile; from byte 48 on its rows.
    """
    shapes = {tile: (num_rows, TILE_ROW_BYTES) for tile in (*SUMS, ROWS)}
    shapes[BLOCK] = (PAIRS_OF_STEP, TILE_ROW_BYTES)
    if last_pairs:
        shapes[LAST_ROWS] = (num_rows, last_pairs * PAIR_BYTES)
        shapes[LAST_BLOCK] = (last_pairs, TILE_ROW_BYTES)
    configuration = bytearray(CONFIGURATION_BYTES)
    configuration[0] = 1
    for tile, (rows, row_bytes) in shapes.items():
        configuration[16 + 2 * tile] = row_bytes
        configuration[48 + tile] = rows
    return configuration


def product_function(module: Any, *, adds: bool, ahead: bool) -> Any:
    """The module's own function that `products.multiply` calls: as `pairs.product_function`'s.

    For any number of rows. The process must have been allowed to use tiles, as it has been after
    `machine.product_units` has said that there are some.
    """
    name = f"multiply_tiles_{'added' if adds else 'new'}{'_ahead' if ahead else ''}"
    function, builder = own_function(module, name, num_arguments=7)
    if builder is None:
        return function
    rows, row_bytes, count, block, num_pairs, sums, next_block = function.args
    num_steps = builder.udiv(num_pairs, INT64(PAIRS_OF_STEP))
    last_pairs = builder.urem(num_pairs, INT64(PAIRS_OF_STEP))
    num_full = builder.udiv(count, INT64(TILE_ROWS))
    num_others = builder.urem(count, INT64(TILE_ROWS))

    def multiply(first_row: Any, first: Any, stop: Any, *, calls_next: bool) -> None:
        _multiply_steps(
            builder,
            rows=builder.add(rows, builder.mul(first_row, row_bytes)),
            row_bytes=row_bytes,
            block=block,
            sums=builder.add(sums, builder.mul(first_row, INT64(SUMS_ROW_BYTES))),
            steps=(first, stop),
            last_pairs=builder.select(
                builder.icmp_signed("==", stop, num_steps), last_pairs, INT64(0)
            ),
            next_block=next_block if calls_next else None,
            adds=adds,
        )

    with builder.if_then(builder.icmp_signed(">", num_full, INT64(0))):
        _configure(builder, INT64(TILE_ROWS), last_pairs)
        # Once at least: there may be no whole step.
        is_any = builder.icmp_signed(">", num_steps, INT64(0))
        end = builder.select(is_any, num_steps, INT64(1))
        width = INT64(STEPS_AT_ONCE)
        with cgutils.for_range_slice(builder, INT64(0), end, width, INT64) as (first, _):
            stop = builder.add(first, width)
            stop = builder.select(builder.icmp_signed("<", stop, num_steps), stop, num_steps)
            with cgutils.for_range(builder, num_full) as loop:
                first_row = builder.mul(loop.index, INT64(TILE_ROWS))
                multiply(first_row, first, stop, calls_next=False)
    with builder.if_then(builder.icmp_signed(">", num_others, INT64(0))):
        _configure(builder, num_others, last_pairs)
        first_row = builder.mul(num_full, INT64(TILE_ROWS))
        if ahead:
            is_few = builder.icmp_signed("<=", count, INT64(FEW_ROWS))
            with builder.if_else(is_few) as (few, many):
                with few:
                    multiply(first_row, INT64(0), num_steps, calls_next=True)
                with many:
                    multiply(first_row, INT64(0), num_steps, calls_next=False)
        else:
            multiply(first_row, INT64(0), num_steps, calls_next=False)
    _tile_call(builder, "tilerelease", [])
    builder.ret_void()
    return function


def _multiply_steps(
    builder: Any,
    *,
    rows: Any,
    row_bytes: Any,
    block: Any,
    sums: Any,
    steps: tuple[Any, Any],
    last_pairs: Any,
    next_block: Any | None,
    adds: bool,
) -> None:
    """Up to sixteen rows times the steps from the first up to another, and what is left behind it.

    What is multiplied before the first step, and what is added to, lies in `sums`.
    """
    first, stop = steps

    def load_sums() -> None:
        for part, tile in enumerate(SUMS):
            _load(builder, tile, sums, part, INT64(SUMS_ROW_BYTES))

    def multiply_block(step: Any, rows_tile: int, block_tile: int) -> None:
        line = builder.add(rows, builder.mul(step, INT64(TILE_ROW_BYTES)))
        _load(builder, rows_tile, line, 0, row_bytes)
        start = builder.add(block, builder.mul(step, INT64(STEP_BYTES)))
        for part, tile in enumerate(SUMS):
            _load(builder, block_tile, start, part, INT64(LINE_BYTES))
            numbers = [INT8(tile), INT8(rows_tile), INT8(block_tile)]
            _tile_call(builder, "tdpbf16ps", numbers)

    if adds:
        load_sums()
    else:
        is_first = builder.icmp_signed("==", first, INT64(0))
        with builder.if_else(is_first) as (new, further):
            with new:
                for tile in SUMS:
                    _tile_call(builder, "tilezero", [INT8(tile)])
            with further:
                load_sums()
    with cgutils.for_range_slice(builder, first, stop, INT64(1), INT64) as (step, _):
        if next_block is not None:
            following = builder.add(next_block, builder.mul(step, INT64(STEP_BYTES)))
            prefetch(builder, following, STEP_BYTES, level=2)
        multiply_block(step, ROWS, BLOCK)
    with builder.if_then(builder.icmp_signed(">", last_pairs, INT64(0))):
        multiply_block(stop, LAST_ROWS, LAST_BLOCK)
    for part, tile in enumerate(SUMS):
        place = builder.add(sums, INT64(part * TILE_ROW_BYTES))
        pointer = builder.inttoptr(place, BYTE_POINTER)
        _tile_call(builder, "tilestored64", [INT8(tile), pointer, INT64(SUMS_ROW_BYTES)])


def _load(builder: Any, tile: int, address: Any, part: int, row_bytes: Any) -> None:
    place = builder.add(address, INT64(part * TILE_ROW_BYTES))
    pointer = builder.inttoptr(place, BYTE_POINTER)
    _tile_call(builder, "tileloadd64", [INT8(tile), pointer, row_bytes])


def _configure(builder: Any, num_rows: Any, last_pairs: Any) -> None:
    """Shapes all tiles, and empties them."""
    table = _configurations(builder.module)
    places = [INT64(0), builder.sub(num_rows, INT64(1)), last_pairs]
    pointer = builder.bitcast(builder.gep(table, places), BYTE_POINTER)
    _tile_call(builder, "ldtilecfg", [pointer])


def _configurations(module: Any) -> Any:
    """The module's own table of them, by rows and by last pairs."""
    name = "tile_configurations"
    if name in module.globals:
        return module.globals[name]
    rows = [
        [_configuration(num_rows, last_pairs) for last_pairs in range(PAIRS_OF_STEP)]
        for num_rows in range(1, TILE_ROWS + 1)
    ]
    one = ir.ArrayType(INT8, CONFIGURATION_BYTES)
    kind = ir.ArrayType(ir.ArrayType(one, PAIRS_OF_STEP), TILE_ROWS)
    table = ir.GlobalVariable(module, kind, name)
    table.linkage, table.global_constant, table.align = "internal", True, CACHE_LINE_BYTES
    table.initializer = ir.Constant(kind, rows)
    return table


def _tile_call(builder: Any, name: str, arguments: Sequence[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), arguments)
