"""Products of bfloat16 matrices by an instruction for pairs of numbers (AVX-512 BF16).

The right matrix lies in blocks of 64 columns, each with its rows in pairs: [pairs, 64, 2]. A block
is walked once for up to six rows of the left matrix, whose 24 vectors of sums stay in registers.
For more rows it is walked in panels, one group of rows after the other, and meanwhile the next
panel is called into the cache: else memory would be read for the first group only, and the others
wait. Every sum is made in the order of the pairs, whatever rows are computed beside it, so that a
row's result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from server.kernels.vectors import (
    CACHE_LINE_BYTES,
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    constant,
    load_row,
    own_function,
    prefetch,
    splat,
    store_row,
    vector,
)

COLUMNS = 64
"""Of a block."""

MAX_ROWS = 6
"""Multiplied together: with one more, sums, weights and factor would not fit in 32 registers."""

PANEL_PAIRS = 64
"""16 KiB of a block: this panel and the next one fit in the nearest cache."""

WIDTH = 16
NUM_VECTORS = COLUMNS // WIDTH
PAIR_BYTES = 4
LINE_BYTES = COLUMNS * PAIR_BYTES
"""Of a block, for one pair."""

SUMS_ROW_BYTES = 4 * COLUMNS


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


def product_function(module: Any, *, adds: bool, ahead: bool) -> Any:
    """The module's own function that `products.multiply` calls.

    For any number of rows. More than MAX_ROWS call the next block's first panel into the cache, and
    fewer the whole of it where asked for: for blocks that lie one behind the other the processor
    does that itself.
    """
    name = f"multiply_pairs_{'added' if adds else 'new'}{'_ahead' if ahead else ''}"
    function, builder = own_function(module, name, num_arguments=7)
    if builder is None:
        return function
    rows, row_bytes, count, block, num_pairs, sums, next_block = function.args
    with builder.if_then(builder.icmp_signed("<=", count, INT64(MAX_ROWS))):
        num_lines = LINE_BYTES // CACHE_LINE_BYTES if ahead else 2
        # Else it calls what it is reading anyway.
        called, called_each = (next_block, LINE_BYTES) if ahead else (block, 0)
        walk = _walk_function(module, num_lines=num_lines)
        whole = [rows, row_bytes, count, block, num_pairs, sums]
        builder.call(walk, [*whole, INT64(int(adds)), called, INT64(called_each)])
        builder.ret_void()
    walk = _walk_function(module, num_lines=2)
    num_groups = builder.udiv(builder.add(count, INT64(MAX_ROWS - 1)), INT64(MAX_ROWS))
    # Two groups or more: each calls as much, and for each pair at most two lines.
    called_each = builder.udiv(builder.add(num_groups, INT64(LINE_BYTES - 1)), num_groups)
    width = INT64(PANEL_PAIRS)
    with cgutils.for_range_slice(builder, INT64(0), num_pairs, width, INT64) as (first, _):
        stop = builder.add(first, width)
        is_last = builder.icmp_signed(">=", stop, num_pairs)
        num_here = builder.sub(builder.select(is_last, num_pairs, stop), first)
        panel = builder.add(block, builder.mul(first, INT64(LINE_BYTES)))
        following = builder.add(panel, INT64(PANEL_PAIRS * LINE_BYTES))
        following = builder.select(is_last, next_block, following)
        is_added = INT64(1)
        if not adds:
            is_added = builder.zext(builder.icmp_signed(">", first, INT64(0)), INT64)
        columns = builder.add(rows, builder.mul(first, INT64(PAIR_BYTES)))
        with cgutils.for_range(builder, num_groups) as loop:
            start = builder.udiv(builder.mul(loop.index, count), num_groups)
            next_index = builder.add(loop.index, INT64(1))
            end = builder.udiv(builder.mul(next_index, count), num_groups)
            called = builder.mul(builder.mul(loop.index, called_each), num_here)
            arguments = [
                builder.add(columns, builder.mul(start, row_bytes)),
                row_bytes,
                builder.sub(end, start),
                panel,
                num_here,
                builder.add(sums, builder.mul(start, INT64(SUMS_ROW_BYTES))),
                is_added,
                builder.add(following, called),
                called_each,
            ]
            builder.call(walk, arguments)
    builder.ret_void()
    return function


def _walk_function(module: Any, *, num_lines: int) -> Any:
    """The module's own function for 1 to MAX_ROWS rows and a number of pairs.

    Its arguments are the first six of `products.multiply`; whether it adds to the sums; and from
    where on, at each pair, `num_lines` lines are called into the cache, and how far apart.
    """
    function, builder = own_function(module, f"walk_pairs_{num_lines}", num_arguments=9)
    if builder is None:
        return function
    row_address, bytes_apart, count, *others = function.args
    cases = [function.append_basic_block(f"rows{n}") for n in range(1, MAX_ROWS + 1)]
    choice = builder.switch(count, cases[-1])
    for number, case in enumerate(cases, start=1):
        if case is not cases[-1]:
            choice.add_case(INT64(number), case)
        builder.position_at_end(case)
        places = [
            builder.add(row_address, builder.mul(bytes_apart, INT64(row))) for row in range(number)
        ]
        _walk_rows(builder, places, *others, num_lines=num_lines)
        builder.ret_void()
    return function


def _walk_rows(
    builder: Any,
    rows: list[Any],
    block: Any,
    num_pairs: Any,
    sums: Any,
    is_added: Any,
    called: Any,
    called_each: Any,
    *,
    num_lines: int,
) -> None:
    """The loop for this number of rows; `rows` are their addresses."""
    multiply_pairs = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    )
    places = [(row, part) for row in range(len(rows)) for part in range(NUM_VECTORS)]
    before = builder.block
    adds = builder.icmp_signed("!=", is_added, INT64(0))
    first = []
    for row, part in places:
        already = load_row(builder, sums, INT64(row * NUM_VECTORS + part), WIDTH, FLOAT32)
        first.append(builder.select(adds, already, constant(0.0, WIDTH)))
    loop, done = builder.append_basic_block("pairs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(INT64)
    index.add_incoming(INT64(0), before)
    carried = [builder.phi(_SUMS) for _ in places]
    for phi, value in zip(carried, first, strict=True):
        phi.add_incoming(value, before)
    current = list(carried)
    line = builder.add(block, builder.mul(index, INT64(LINE_BYTES)))
    weights = [_load_pairs(builder, line, part) for part in range(NUM_VECTORS)]
    from_here = builder.add(called, builder.mul(index, called_each))
    prefetch(builder, from_here, num_lines * CACHE_LINE_BYTES, level=1)
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


def store_rounded(
    builder: Any, values: Any, address: Any, index: Any, *, count: int = WIDTH
) -> None:
    """Sixteen float32 as bfloat16 to the nearest, the `index`-th sixteen from an address on.

    Only the first `count` of them, and nothing behind.
    """
    kind = ir.VectorType(_BFloat(), WIDTH)
    function = ir.FunctionType(kind, [_SUMS])
    intrinsic_name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    rounded = builder.call(builder.module.declare_intrinsic(intrinsic_name, (), function), [values])
    if count < WIDTH:
        first = ir.Constant(vector(INT32, count), list(range(count)))
        rounded = builder.shuffle_vector(rounded, ir.Constant(kind, ir.Undefined), first)
        kind = ir.VectorType(_BFloat(), count)
    place = builder.add(address, builder.mul(index, INT64(2 * WIDTH)))
    builder.store(rounded, builder.inttoptr(place, kind.as_pointer()), align=2)
