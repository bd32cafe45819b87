"""The backend for CPUs that multiply bfloat16: one compiled loop, however many queries."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from server.attention.inputs import AttentionInputs, LayerCache
from server.attention.sdpa import zero_pages
from server.kernels.machine import Call, ProductUnits, choose_units, product_units, run

PAGE_SIZE = 64
"""The width of a block of `server.kernels.pairs`."""


def problem_on_device(
    device: torch.device, dtype: torch.dtype, head_dim: int | None, page_size: int | None
) -> str | None:
    """Why this backend cannot be had; None where it can."""
    if device.type != "cpu":
        return f"does not run on the device '{device}'"
    if not product_units(dtype):
        return "needs bfloat16, numba, and a CPU with AVX-512 BF16"
    if page_size not in (None, PAGE_SIZE):
        return f"has pages of {PAGE_SIZE} tokens only"
    if head_dim is None or head_dim % 2:
        return "needs heads of an even number of dimensions"
    return None


class PairBackend:
    """Keys lie as [pages, kv_heads, stored / 2, 64, 2], values as
    [pages, kv_heads, stored / 64, 32, 64, 2], where `stored` is head_dim filled up to a multiple of
    64; see `server.kernels.pair_attention`."""

    page_size = PAGE_SIZE

    def __init__(self, units: ProductUnits | None = None) -> None:
        """With the CPU's fastest units, or those named; ValueError where it has not those."""
        chosen = choose_units(torch.bfloat16, units)
        if chosen is None:
            raise ValueError("this CPU does not multiply bfloat16")
        self._units = chosen

    def allocate(
        self,
        num_layers: int,
        num_pages: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> list[LayerCache]:
        from server.kernels.pair_attention import stored_head_dim

        stored = stored_head_dim(head_dim)
        keys = (num_pages, num_kv_heads, stored // 2, PAGE_SIZE, 2)
        values = (num_pages, num_kv_heads, stored // PAGE_SIZE, PAGE_SIZE // 2, PAGE_SIZE, 2)
        return [
            LayerCache(
                keys=zero_pages(keys, dtype=dtype, device=device),
                values=zero_pages(values, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        ]

    def write(
        self, keys: Tensor, values: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        run([self.write_call(keys, values, cache, inputs)])

    def attend(self, queries: Tensor, cache: LayerCache, inputs: AttentionInputs) -> Tensor:
        output = queries.new_empty(queries.shape)
        run([self.attend_call(queries, output, cache, inputs)])
        return output

    def write_call(
        self, keys: Tensor, values: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> Call:
        from server.kernels.pair_attention import PairWriteArguments, num_write_tasks
        from server.kernels.vectors import CACHE_LINE_BYTES

        num_tokens, num_kv_heads, head_dim = keys.shape
        arguments = PairWriteArguments(
            num_tasks=num_write_tasks(num_tokens=num_tokens, num_kv_heads=num_kv_heads),
            num_tokens=num_tokens,
            num_kv_heads=num_kv_heads,
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            new_keys=keys.data_ptr(),
            new_values=values.data_ptr(),
            key_bytes=_token_bytes(keys),
            value_bytes=_token_bytes(values),
            slots=inputs.slot_mapping.data_ptr(),
        )
        # Every pair goes to a cache line of its own.
        num_bytes = CACHE_LINE_BYTES * keys.numel()
        return Call(_compiled_write(head_dim=head_dim), arguments, num_bytes)

    def attend_call(
        self, queries: Tensor, output: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> Call:
        """Into `output`, contiguous."""
        from server.kernels.pair_attention import PairAttentionArguments, most_tasks

        num_tokens, num_heads, head_dim = queries.shape
        num_kv_heads, num_sequences = cache.keys.shape[1], inputs.seqused_k.shape[0]
        group = num_heads // num_kv_heads
        table = inputs.block_table
        if not table.is_contiguous() or not output.is_contiguous():
            raise ValueError("the block table or the output is not contiguous")
        arguments = PairAttentionArguments(
            num_tasks=most_tasks(
                self._units,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                num_kv_heads=num_kv_heads,
                group=group,
            ),
            num_sequences=num_sequences,
            num_kv_heads=num_kv_heads,
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            queries=queries.data_ptr(),
            query_bytes=_token_bytes(queries),
            output=output.data_ptr(),
            bounds=inputs.cu_seq_q.data_ptr(),
            lengths=inputs.seqused_k.data_ptr(),
            block_table=table.data_ptr(),
            table_width=table.shape[1],
            heads_of_task=_heads_of_task(num_sequences, num_kv_heads),
        )
        most_read = 2 * num_sequences * inputs.max_k * num_kv_heads * head_dim * 2
        function = _compiled_attend(self._units, group=group, head_dim=head_dim)
        return Call(function, arguments, most_read)


def _heads_of_task(num_sequences: int, num_kv_heads: int) -> int:
    wanted = 2 * torch.get_num_threads()
    return next(
        heads
        for heads in range(num_kv_heads, 0, -1)
        if num_kv_heads % heads == 0
        and (heads == 1 or num_sequences * (num_kv_heads // heads) >= wanted)
    )


def _token_bytes(heads: Tensor) -> int:
    """From one token to the next of [tokens, heads, head_dim], whose tokens alone may be apart."""
    if heads.dtype != torch.bfloat16 or heads.stride()[1:] != (heads.shape[2], 1):
        raise ValueError("heads are not bfloat16, or those of a token do not lie side by side")
    return heads.stride(0) * heads.element_size()


@cache
def _compiled_attend(units: ProductUnits, *, group: int, head_dim: int) -> Any:
    from server.kernels import pair_attention

    return pair_attention.compile_attend(units, group=group, head_dim=head_dim)


@cache
def _compiled_write(*, head_dim: int) -> Any:
    from server.kernels import pair_attention

    return pair_attention.compile_write(head_dim=head_dim)
