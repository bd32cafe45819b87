"""Products of bfloat16 matrices by an instruction for pairs of numbers (AVX-512 BF16).

The right matrix lies in blocks of 64 columns, each with its rows in pairs: [pairs, 64, 2]. A block
is walked once for up to six rows of the left matrix, whose 24 vectors of sums stay in registers.
Every sum is made in the order of the pairs, whatever rows are computed beside it, so that a row's
result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from server.kernels.vectors import (
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    constant,
    load_row,
    own_function,
    prefetch_row,
    splat,
    store_row,
    vector,
)

COLUMNS = 64
"""Of a block."""

MAX_ROWS = 6
"""Multiplied together: with one more, sums, weights and factor would not fit in 32 registers."""

FEW_ROWS = 3
"""With so few, a block is multiplied in less time than memory takes for the next one."""

WIDTH = 16
NUM_VECTORS = COLUMNS // WIDTH
PAIR_BYTES = 4
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

    For 1 to MAX_ROWS rows. With FEW_ROWS at most the next block is called into the cache, where
    asked for: for blocks that lie one behind the other the processor does it itself.
    """
    name = f"multiply_pairs_{'added' if adds else 'new'}{'_ahead' if ahead else ''}"
    function, builder = own_function(module, name, num_arguments=7)
    if builder is None:
        return function
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
