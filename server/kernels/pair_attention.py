"""Attention over pages by the multipliers of `products`: prompts and answers by the same loop.

A page has 64 tokens. Its keys lie as a block, [head_dim / 2, 64 tokens, 2], so that a product of
queries with it is their scores; its values as blocks of 64 dimensions, each [32, 64, 2] with the
tokens in pairs, so that a product of weights with them is what is attended. A head that is no whole
number of blocks has room for one (`stored_head_dim`): the rest is never written, and never felt.

The pages are walked with a running maximum (the online softmax of FlashAttention,
arXiv:2205.14135). As in the model's own code, scores and sums are float32 and the weights are
rounded to bfloat16.

What a query does not see changes nothing of its result, to the bit: so a token gets the same
whatever tokens are computed beside it. Only infinite values, and what is not a number, reach the
tokens of the same sequence that are computed together with theirs.
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

from server.kernels.machine import ProductUnits
from server.kernels.pairs import (
    COLUMNS,
    NUM_VECTORS,
    PAIR_BYTES,
    SUMS_ROW_BYTES,
    WIDTH,
    store_rounded,
)
from server.kernels.products import MULTIPLIERS, STEP_PAIRS, UNITS, multiply
from server.kernels.vectors import (
    EXP2_COEFFICIENTS,
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    compiled,
    constant,
    fetch_add,
    float_pointer,
    greatest_of,
    load_row,
    pointer,
    splat,
    stack_room,
    store_row,
    times_plus,
    total_of,
    vector,
)

PAGE_SIZE = COLUMNS
SCORES_BYTES, WEIGHTS_BYTES = SUMS_ROW_BYTES, 2 * PAGE_SIZE
"""Of one query with one page."""

STATE_BYTES = 8
"""Of a query: two float32."""

MOST_POWER, LEAST_POWER = 8.0, -200.0
"""Of two, that a weight may be. Less than the least is 0 in float32."""

FIELDS = (
    "next_task",
    "num_tasks",
    "num_sequences",
    "num_kv_heads",
    "keys",
    "values",
    "queries",
    "query_bytes",
    "output",
    "bounds",
    "lengths",
    "block_table",
    "table_width",
    "heads_of_task",
)
NUM_FIELDS = len(FIELDS)
NEXT_TASK, NUM_TASKS, NUM_SEQUENCES, NUM_KV_HEADS, KEYS, VALUES, QUERIES, QUERY_BYTES = range(8)
OUTPUT, BOUNDS, LENGTHS, BLOCK_TABLE, TABLE_WIDTH, HEADS_OF_TASK = range(8, NUM_FIELDS)


class PairAttentionArguments(ctypes.Structure):
    """What `attend` is called with; addresses, and sizes.

    queries      bfloat16 [tokens, heads, head_dim], of which only tokens may be apart
    keys         bfloat16 [pages, kv_heads, stored_head_dim / 2, 64, 2]
    values       bfloat16 [pages, kv_heads, stored_head_dim / 64, 32, 64, 2]
    output       bfloat16 [tokens, heads, head_dim]
    bounds       int32 [sequences + 1]: the tokens of each sequence
    lengths      int32 [sequences]: its positions, those tokens being the last of them
    block_table  int32 [sequences, table_width]

    A task is a key/value head for some tokens of a sequence; `num_tasks` may be too many.
    """

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def stored_head_dim(head_dim: int) -> int:
    """The dimensions that a page's keys and values have room for: whole blocks of them."""
    return -(-head_dim // COLUMNS) * COLUMNS


def most_tasks(
    units: ProductUnits, *, num_tokens: int, num_sequences: int, num_kv_heads: int, group: int
) -> int:
    return (num_tokens // _tokens_of_task(units, group) + num_sequences) * num_kv_heads


def _tokens_of_task(units: ProductUnits, group: int) -> int:
    return max(1, MULTIPLIERS[units].attention_rows // group)


@intrinsic
def _weigh(
    typing_context: Any,
    scores: Any,
    num_visible: Any,
    scale: Any,
    state: Any,
    weights: Any,
) -> Any:
    """Scores of one query with a page -> weights bfloat16 [64]; what all before them shrinks by.

    A weight is 2 ** (scale * (score - level)). `state` holds the level and the sum of the weights.
    The level is a score; it is raised, and all before shrinks, only where weights would otherwise
    grow over 2 ** MOST_POWER. Larger weights are as exact, and at most pages nothing shrinks.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        score_address, count, scale_value, state_address, weight_address = arguments
        factor = splat(builder, scale_value, WIDTH)
        level_place = float_pointer(builder, state_address, INT64(0))
        sum_place = float_pointer(builder, state_address, INT64(1))
        shrink_place = cgutils.alloca_once(builder, FLOAT)
        rows = [
            load_row(builder, score_address, INT64(part), WIDTH, FLOAT32)
            for part in range(NUM_VECTORS)
        ]

        def weigh(seen: list[Any] | None) -> None:
            """With what is seen of each part; None where all is."""
            parts = rows
            if seen is not None:
                hidden = constant(-math.inf, WIDTH)
                parts = [builder.select(*each, hidden) for each in zip(seen, rows, strict=True)]
            greatest = parts[0]
            for part in parts[1:]:
                is_greater = builder.fcmp_ordered(">", part, greatest)
                greatest = builder.select(is_greater, part, greatest)
            here, before = greatest_of(builder, greatest, WIDTH), builder.load(level_place)
            power = builder.fmul(builder.fsub(here, before), scale_value)
            is_over = builder.fcmp_ordered(">", power, FLOAT(MOST_POWER))
            level = builder.select(is_over, here, before)
            levels = splat(builder, level, WIDTH)
            total = constant(0.0, WIDTH)
            for index, part in enumerate(parts):
                # Not multiplied first: the level itself has to weigh 1, however large it is.
                power_of_each = builder.fmul(builder.fsub(part, levels), factor)
                weight = _power_of_two(builder, power_of_each)
                if seen is not None:
                    # Not nearly 0, but 0, or what is hidden would be felt.
                    weight = builder.select(seen[index], weight, constant(0.0, WIDTH))
                total = builder.fadd(total, weight)
                store_rounded(builder, weight, weight_address, INT64(index))
            summed = total_of(builder, total, WIDTH)
            builder.store(FLOAT(1.0), shrink_place)
            with builder.if_then(is_over):
                shrunk = _power_of_two(builder, splat(builder, builder.fneg(power), WIDTH))
                builder.store(builder.extract_element(shrunk, INT32(0)), shrink_place)
            shrink = builder.load(shrink_place)
            builder.store(times_plus(builder, builder.load(sum_place), shrink, summed), sum_place)
            builder.store(level, level_place)

        with builder.if_else(builder.icmp_signed(">=", count, INT64(PAGE_SIZE))) as (whole, partly):
            with whole:
                weigh(None)
            with partly:
                last = splat(builder, builder.trunc(count, INT32), WIDTH)
                lanes = [
                    ir.Constant(
                        vector(INT32, WIDTH), [part * WIDTH + lane for lane in range(WIDTH)]
                    )
                    for part in range(NUM_VECTORS)
                ]
                weigh([builder.icmp_signed("<", each, last) for each in lanes])
        return builder.load(shrink_place)

    signature = types.float32(types.int64, types.int64, types.float32, types.int64, types.int64)
    return signature, generate


def _power_of_two(builder: Any, powers: Any) -> Any:
    """Two to the power of sixteen float32, about 3e-6 off; what is not a number stays so."""
    # Of an infinite one, what is left beside its whole part would be no number.
    least = constant(LEAST_POWER, WIDTH)
    powers = builder.select(builder.fcmp_ordered("<", powers, least), least, powers)
    kind = powers.type
    round_to_even = builder.module.declare_intrinsic(
        "llvm.roundeven.v16f32", (), ir.FunctionType(kind, [kind])
    )
    whole = builder.call(round_to_even, [powers])
    rest = builder.fsub(powers, whole)
    series = constant(EXP2_COEFFICIENTS[1], WIDTH)
    for coefficient in (*EXP2_COEFFICIENTS[2:], math.log(2), 1.0):
        series = times_plus(builder, series, rest, constant(coefficient, WIDTH))
    mask, rounding = ir.IntType(16), INT32
    scale_by = builder.module.declare_intrinsic(
        "llvm.x86.avx512.mask.scalef.ps.512",
        (),
        ir.FunctionType(kind, [kind, kind, kind, mask, rounding]),
    )
    every, as_set = mask(0xFFFF), rounding(4)
    return builder.call(scale_by, [series, whole, constant(0.0, WIDTH), every, as_set])


@intrinsic
def _shrink(typing_context: Any, row: Any, factor: Any) -> Any:
    """Multiply float32 [64] in its place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, scalar = arguments
        for part, values in enumerate(_scaled(builder, address, scalar)):
            store_row(builder, values, address, INT64(part), WIDTH, FLOAT32)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic(prefer_literal=True)
def _store_attended(
    typing_context: Any, row: Any, output: Any, factor: Any, num_columns: Any
) -> Any:
    """Multiply float32 [64] and store the first `num_columns` as bfloat16, and nothing behind."""
    num = num_columns.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, target, scalar = arguments[:3]
        for part, values in enumerate(_scaled(builder, address, scalar)):
            count = min(WIDTH, num - part * WIDTH)
            if count > 0:
                store_rounded(builder, values, target, INT64(part), count=count)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.literal(num)), generate


def _scaled(builder: Any, address: Any, scalar: Any) -> list[Any]:
    factors = splat(builder, scalar, WIDTH)
    parts = [load_row(builder, address, INT64(part), WIDTH, FLOAT32) for part in range(NUM_VECTORS)]
    return [builder.fmul(values, factors) for values in parts]


def compile_attend(units: ProductUnits, *, group: int, head_dim: int) -> Any:
    """The function that takes the address of `PairAttentionArguments` and fills `output`.

    `group` query heads share a key/value head; `head_dim` is even. The rows of a task
    are the queries of its tokens, by key/value head.
    """
    lowest, one = np.float32(-np.inf), np.float32(1.0)
    scale = np.float32(head_dim**-0.5 * math.log2(math.e))
    row_bytes = 2 * head_dim
    page_bytes = 2 * stored_head_dim(head_dim) * PAGE_SIZE
    num_blocks = stored_head_dim(head_dim) // COLUMNS  # of a page's values and what is attended
    last_columns = head_dim - (num_blocks - 1) * COLUMNS
    last_block = num_blocks - 1
    block_bytes = page_bytes // num_blocks
    kind = UNITS.index(units)
    tokens_of_task = _tokens_of_task(units, group)
    max_rows = tokens_of_task * group
    scores_bytes, weights_bytes = max_rows * SCORES_BYTES, max_rows * WEIGHTS_BYTES
    sums_bytes = max_rows * SUMS_ROW_BYTES
    last_step_bytes = STEP_PAIRS * COLUMNS * PAIR_BYTES

    def attend(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_sequences, num_kv_heads = call[NUM_SEQUENCES], call[NUM_KV_HEADS]
        bounds = carray(pointer(call[BOUNDS]), (num_sequences + 1,), np.int32)
        lengths = carray(pointer(call[LENGTHS]), (num_sequences,), np.int32)
        table = carray(pointer(call[BLOCK_TABLE]), (num_sequences, call[TABLE_WIDTH]), np.int32)
        token_bytes = num_kv_heads * group * row_bytes
        most_heads = call[HEADS_OF_TASK]
        rows = np.empty((most_heads, max_rows, head_dim), np.uint16)
        state = np.empty((most_heads, max_rows, 2), np.float32)  # level, sum of weights
        sums = np.empty((most_heads, num_blocks, max_rows, COLUMNS), np.float32)
        scores_at, weights_at = stack_room(scores_bytes), stack_room(weights_bytes)
        last_step_at = stack_room(last_step_bytes)
        last_step = carray(pointer(last_step_at), (STEP_PAIRS, COLUMNS), np.uint32)  # pairs
        sequence, first_task = 0, 0  # of that sequence
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            num_heads: Any = 1
            num_chunks: Any = 1
            while sequence < num_sequences:
                num_tokens = bounds[sequence + 1] - bounds[sequence]
                num_heads = most_heads if num_tokens == 1 else 1
                num_chunks = np.int64((num_tokens + tokens_of_task - 1) // tokens_of_task)
                num_tasks = num_chunks * (num_kv_heads // num_heads)
                if task < first_task + num_tasks:
                    break
                first_task += num_tasks
                sequence += 1
            if sequence == num_sequences:
                break
            first_head = (task - first_task) // num_chunks * num_heads
            chunk = (task - first_task) % num_chunks
            first = np.int64(bounds[sequence]) + chunk * tokens_of_task
            stop = min(first + tokens_of_task, np.int64(bounds[sequence + 1]))
            num_rows = (stop - first) * group
            # By the chunk's first token; each further one sees one more.
            num_seen = np.int64(lengths[sequence]) - np.int64(bounds[sequence + 1]) + first + 1
            most_seen = num_seen + stop - first - 1

            for token in range(first, stop):
                start = call[QUERIES] + token * call[QUERY_BYTES] + first_head * group * row_bytes
                own = carray(pointer(start), (num_heads, group, head_dim), np.uint16)
                for kv_head in range(num_heads):
                    for head in range(group):
                        row = (token - first) * group + head
                        for dimension in range(head_dim):
                            rows[kv_head, row, dimension] = own[kv_head, head, dimension]
            state[:num_heads, :num_rows, 0] = lowest
            state[:num_heads, :num_rows, 1] = 0
            sums[:num_heads, :, :num_rows] = 0

            num_pages = (most_seen + PAGE_SIZE - 1) // PAGE_SIZE
            for page in range(num_pages):
                here = (np.int64(table[sequence, page]) * num_kv_heads + first_head) * page_bytes
                after = np.int64(table[sequence, min(page + 1, num_pages - 1)])
                after = (after * num_kv_heads + first_head) * page_bytes
                # What lies behind the last position that is seen is somebody else's, or nothing.
                num_used = min(most_seen - page * PAGE_SIZE, np.int64(PAGE_SIZE))
                for kv_head in range(num_heads):
                    keys = call[KEYS] + here + kv_head * page_bytes
                    values = call[VALUES] + here + kv_head * page_bytes
                    # From this head's keys and values to those that are computed next.
                    ahead = page_bytes
                    if kv_head + 1 == num_heads:
                        ahead = after - here - kv_head * page_bytes
                    # Taken here, by name, because numba frees an array after its last use.
                    rows_at, state_at = np.int64(rows.ctypes.data), np.int64(state.ctypes.data)
                    sums_at = np.int64(sums.ctypes.data)
                    queries = rows_at + kv_head * max_rows * row_bytes
                    states = state_at + kv_head * max_rows * STATE_BYTES
                    attended = sums_at + kv_head * num_blocks * sums_bytes
                    following = keys + ahead
                    multiply(
                        queries,
                        row_bytes,
                        num_rows,
                        keys,
                        head_dim // 2,
                        scores_at,
                        following,
                        0,
                        1,
                        kind,
                    )
                    for row in range(num_rows):
                        shrink = _weigh(
                            scores_at + row * SCORES_BYTES,
                            num_seen + row // group - page * PAGE_SIZE,
                            scale,
                            states + row * STATE_BYTES,
                            weights_at + row * WEIGHTS_BYTES,
                        )
                        if shrink != one:
                            for block in range(num_blocks):
                                _shrink(
                                    attended + block * sums_bytes + row * SUMS_ROW_BYTES, shrink
                                )
                    for block in range(num_blocks):
                        place, stored = attended + block * sums_bytes, values + block * block_bytes
                        following, pairs = stored + ahead, num_used // 2
                        if num_used % 2:
                            pairs -= pairs % STEP_PAIRS
                        if pairs:
                            multiply(
                                weights_at,
                                WEIGHTS_BYTES,
                                num_rows,
                                stored,
                                pairs,
                                place,
                                following,
                                1,
                                1,
                                kind,
                            )
                        if num_used % 2:
                            # What lies beside the last value may be anything, and that times 0 too.
                            num_last = num_used // 2 - pairs + 1
                            half = carray(pointer(stored), (PAGE_SIZE // 2, COLUMNS), np.uint32)
                            # In loops: slices that could be of two sizes take 2 s to compile.
                            for pair in range(num_last):
                                for column in range(COLUMNS):
                                    last_step[pair, column] = half[pairs + pair, column]
                            for column in range(COLUMNS):
                                last_step[num_last - 1, column] &= np.uint32(0xFFFF)
                            multiply(
                                weights_at + pairs * PAIR_BYTES,
                                WEIGHTS_BYTES,
                                num_rows,
                                last_step_at,
                                num_last,
                                place,
                                following,
                                1,
                                1,
                                kind,
                            )

            for turn in range(num_heads * num_rows):
                kv_head, row = turn // num_rows, turn % num_rows
                place = np.int64(sums.ctypes.data) + kv_head * num_blocks * sums_bytes
                place += row * SUMS_ROW_BYTES
                head = (first_head + kv_head) * group + row % group
                target = call[OUTPUT] + (first + row // group) * token_bytes + head * row_bytes
                share = one / state[kv_head, row, 1]
                for block in range(last_block):
                    columns = target + block * COLUMNS * 2
                    _store_attended(place + block * sums_bytes, columns, share, COLUMNS)
                # Right behind this head lies the next one, which another thread may have stored.
                columns = target + last_block * COLUMNS * 2
                _store_attended(place + last_block * sums_bytes, columns, share, last_columns)

    return compiled(attend)


# Writing ------------------------------------------------------------------------------------------

TOKENS_AT_ONCE = 64
"""Written by one task, for one key/value head: neighbours share the lines they are written to."""

WRITE_FIELDS = (
    "next_task",
    "num_tasks",
    "num_tokens",
    "num_kv_heads",
    "keys",
    "values",
    "new_keys",
    "new_values",
    "key_bytes",
    "value_bytes",
    "slots",
)
NUM_WRITE_FIELDS = len(WRITE_FIELDS)
NUM_TOKENS, NEW_KEYS, NEW_VALUES = 2, 6, 7
KEY_BYTES, VALUE_BYTES, SLOTS = 8, 9, 10


class PairWriteArguments(ctypes.Structure):
    """What `write` is called with; keys and values as above.

    new_keys, new_values   bfloat16 [tokens, kv_heads, head_dim], of which only tokens may be apart
    key_bytes, value_bytes  from one token to the next
    slots                  int64 [tokens]: page * 64 + offset
    """

    _fields_ = [(name, ctypes.c_int64) for name in WRITE_FIELDS]


def num_write_tasks(*, num_tokens: int, num_kv_heads: int) -> int:
    return -(-num_tokens // TOKENS_AT_ONCE) * num_kv_heads


def compile_write(*, head_dim: int) -> Any:
    """The function that takes the address of `PairWriteArguments` and fills slots."""
    num_pairs, num_parts = head_dim // 2, stored_head_dim(head_dim) // COLUMNS
    row_bytes = 2 * head_dim
    page_bytes = 2 * stored_head_dim(head_dim) * PAGE_SIZE

    def write(address: Any) -> None:
        call = carray(address, (NUM_WRITE_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_tokens, num_kv_heads = call[NUM_TOKENS], call[NUM_KV_HEADS]
        slots = carray(pointer(call[SLOTS]), (num_tokens,), np.int64)
        while True:
            task = fetch_add(next_task)
            if task >= call[NUM_TASKS]:
                break
            head = task % num_kv_heads
            first = task // num_kv_heads * TOKENS_AT_ONCE
            for token in range(first, min(first + TOKENS_AT_ONCE, num_tokens)):
                page, offset = slots[token] // PAGE_SIZE, slots[token] % PAGE_SIZE
                block = (page * num_kv_heads + head) * page_bytes
                start = token * call[KEY_BYTES] + head * row_bytes
                new_key = carray(pointer(call[NEW_KEYS] + start), (num_pairs,), np.uint32)
                keys = carray(pointer(call[KEYS] + block), (num_pairs, PAGE_SIZE), np.uint32)
                for pair in range(num_pairs):
                    keys[pair, offset] = new_key[pair]
                start = token * call[VALUE_BYTES] + head * row_bytes
                new_value = carray(pointer(call[NEW_VALUES] + start), (head_dim,), np.uint16)
                values = carray(
                    pointer(call[VALUES] + block),
                    (num_parts, PAGE_SIZE // 2, COLUMNS, 2),
                    np.uint16,
                )
                for part in range(num_parts):
                    first_column = part * COLUMNS
                    for column in range(min(COLUMNS, head_dim - first_column)):
                        number = new_value[first_column + column]
                        values[part, offset // 2, column, offset % 2] = number

    return compiled(write)
