"""Attention over pages in float32, a key/value head of a sequence at a time.

Its query heads are computed together, so that keys and values are read once. The pages are walked
with a running maximum (the online softmax of FlashAttention, arXiv:2205.14135). A page holds its
keys as [head_dim, page_size], so that a vector runs across tokens, and its values as
[page_size, head_dim], so that one runs across dimensions; while a page is computed the next one is
called into the cache.
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
    ELEMENT_BYTES,
    FLOAT,
    FLOAT32,
    INT32,
    INT64,
    STORAGE,
    compiled,
    constant,
    exp,
    fetch_add,
    float_pointer,
    greatest_of,
    load_row,
    pointer,
    prefetch,
    splat,
    times_plus,
    total_of,
    vector,
)

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
        sums = [cgutils.alloca_once_value(builder, constant(0.0, size)) for _ in range(num_heads)]
        for place in sums:
            builder.store(constant(0.0, size), place)
        with cgutils.for_range(builder, INT64(dim)) as loop:
            row = load_row(builder, key_address, loop.index, size, kind)
            row_bytes = size * ELEMENT_BYTES[kind]
            next_row = builder.add(next_address, builder.mul(loop.index, INT64(row_bytes)))
            prefetch(builder, next_row, row_bytes, level=2)
            for head, place in enumerate(sums):
                index = builder.add(loop.index, INT64(head * dim))
                query = builder.load(float_pointer(builder, query_address, index))
                broadcast = splat(builder, query, size)
                builder.store(times_plus(builder, broadcast, row, builder.load(place)), place)
        return [builder.load(place) for place in sums]

    def weigh(builder: Any, scores: Any, visible: Any, state_address: Any, head: int) -> Any:
        """The weights of a page's positions, and what all weights before shrink by."""
        largest_place = float_pointer(builder, state_address, INT64(head))
        sum_place = float_pointer(builder, state_address, INT64(num_heads + head))
        scores = builder.select(visible, scores, constant(HIDDEN, size))
        before, here = builder.load(largest_place), greatest_of(builder, scores, size)
        largest = builder.select(builder.fcmp_ordered(">", before, here), before, here)
        shift = builder.fsub(scores, splat(builder, largest, size))
        weights = exp(builder, shift, size)
        # A vector for one number, because the sum must shrink by just what the weights shrink by.
        shrink = exp(builder, splat(builder, builder.fsub(before, largest), 4), 4)
        shrink = builder.extract_element(shrink, INT32(0))
        total = total_of(builder, weights, size)
        builder.store(times_plus(builder, builder.load(sum_place), shrink, total), sum_place)
        builder.store(largest, largest_place)
        return weights, shrink

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query_address, key_address, value_address, next_k, next_v, count, out, state_at = arguments[
            :8
        ]
        lanes = ir.Constant(vector(INT32, size), list(range(size)))
        last = splat(builder, builder.trunc(count, INT32), size)
        visible = builder.icmp_signed("<", lanes, last)
        weights, sums, targets = [], [], []
        for head, scores in enumerate(scores_of(builder, query_address, key_address, next_k)):
            weight, shrink = weigh(builder, scores, visible, state_at, head)
            place = cgutils.alloca_once(builder, vector(FLOAT, size))
            builder.store(weight, place)
            weights.append(builder.bitcast(place, FLOAT.as_pointer()))
            target = float_pointer(builder, out, INT64(head * dim))
            target = builder.bitcast(target, vector(FLOAT, dim).as_pointer())
            total = cgutils.alloca_once(builder, vector(FLOAT, dim))
            shrunk = builder.fmul(builder.load(target, align=4), splat(builder, shrink, dim))
            builder.store(shrunk, total)
            sums.append(total)
            targets.append(target)
        with cgutils.for_range(builder, count) as loop:
            row = load_row(builder, value_address, loop.index, dim, kind)
            row_bytes = dim * ELEMENT_BYTES[kind]
            next_row = builder.add(next_v, builder.mul(loop.index, INT64(row_bytes)))
            prefetch(builder, next_row, row_bytes, level=2)
            for weight, total in zip(weights, sums, strict=True):
                scalar = builder.load(builder.gep(weight, [loop.index]))
                broadcast = splat(builder, scalar, dim)
                builder.store(times_plus(builder, broadcast, row, builder.load(total)), total)
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    literals = [types.literal(each) for each in (num_heads, dim, size, kind)]
    return types.void(*[types.int64] * 8, *literals), generate


def compile_attend(*, group: int, head_dim: int, page_size: int, dtype: str) -> Any:
    """The function that takes the address of `AttentionArguments` and fills `output`.

    Any number of threads may call it at the same time with the same arguments, whose `next_task`
    is 0 before: they share its tasks. It skips sequences of more than `max_queries` tokens.
    """
    storage = STORAGE[dtype]
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
        bounds = carray(pointer(call[BOUNDS]), (num_sequences + 1,), np.int32)
        lengths = carray(pointer(call[LENGTHS]), (num_sequences,), np.int32)
        table = carray(pointer(call[BLOCK_TABLE]), (num_sequences, table_width), np.int32)
        state = np.empty(2 * group, np.float32)
        while True:
            task = fetch_add(next_task)
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
                result = carray(pointer(output + start), (group, head_dim), np.float32)
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

    return compiled(attend)


def compile_write(*, head_dim: int, page_size: int, dtype: str) -> Any:
    """The function that takes the address of the arguments and writes `new_keys`, `new_values`.

    To be called as `attend` is; a task is a token.
    """
    storage = STORAGE[dtype]
    element_bytes = ELEMENT_BYTES[storage]
    page_bytes = head_dim * page_size * element_bytes
    element = np.float32 if storage == FLOAT32 else np.uint16

    def write(address: Any) -> None:
        call = carray(address, (NUM_FIELDS,), np.int64)
        next_task = call[NEXT_TASK:].ctypes.data
        num_tokens, num_kv_heads = call[NUM_TASKS], call[NUM_KV_HEADS]
        row = (num_kv_heads, head_dim)
        slots = carray(pointer(call[SLOTS]), (num_tokens,), np.int64)
        while True:
            token = fetch_add(next_task)
            if token >= num_tokens:
                break
            page = slots[token] // page_size
            offset = slots[token] % page_size
            start = page * num_kv_heads * page_bytes
            new_start = token * num_kv_heads * head_dim * element_bytes
            new_keys = carray(pointer(call[NEW_KEYS] + new_start), row, element)
            new_values = carray(pointer(call[NEW_VALUES] + new_start), row, element)
            keys = carray(pointer(call[KEYS] + start), (num_kv_heads, head_dim, page_size), element)
            values = carray(
                pointer(call[VALUES] + start), (num_kv_heads, page_size, head_dim), element
            )
            for head in range(num_kv_heads):
                for dimension in range(head_dim):
                    keys[head, dimension, offset] = new_keys[head, dimension]
                    values[head, offset, dimension] = new_values[head, dimension]

    return compiled(write)
