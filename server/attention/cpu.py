"""The backend for CPUs: few queries at a time by a compiled kernel, many by torch.

Answering is bound by reading keys and values; the kernel reads them once, from pages laid out for
it. A long chunk of a prompt is bound by multiplications, which are left to torch.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from server.attention.inputs import AttentionInputs, LayerCache
from server.attention.sdpa import zero_pages
from server.kernels.machine import Call, has_compiler, has_half_units, run

MAX_KERNEL_QUERIES = 8
"""Of one sequence in one step; with more, torch's matrix products are faster."""


def problem_on_device(
    device: torch.device, dtype: torch.dtype, head_dim: int | None, page_size: int | None
) -> str | None:
    """Why this backend cannot be had; None where it can."""
    if device.type != "cpu":
        return f"does not run on the device '{device}'"
    return None if has_compiler() else "needs numba, which is not installed"


PRODUCT_QUERIES = 64
"""Of one sequence, multiplied at once with all keys they see: fewer hidden ones are computed."""


class CpuBackend:
    """Keys lie as [pages, kv_heads, head_dim, page_size], values with the last two exchanged."""

    def __init__(self, *, page_size: int) -> None:
        self.page_size = page_size

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
        keys = (num_pages, num_kv_heads, head_dim, self.page_size)
        values = (num_pages, num_kv_heads, self.page_size, head_dim)
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
        num_tokens, _, head_dim = keys.shape
        keys, values = keys.contiguous(), values.contiguous()
        write = _compiled_write(head_dim, self.page_size, keys.dtype)
        arguments = self._arguments(cache, num_tasks=num_tokens)
        arguments.new_keys, arguments.new_values = keys.data_ptr(), values.data_ptr()
        arguments.slots = inputs.slot_mapping.data_ptr()
        run([Call(write, arguments, num_bytes=keys.nbytes + values.nbytes)])

    def attend(self, queries: Tensor, cache: LayerCache, inputs: AttentionInputs) -> Tensor:
        num_sequences = len(inputs.seqused_k)
        num_kv_heads, head_dim = cache.keys.shape[1:3]
        output = torch.empty(queries.shape, dtype=torch.float32)
        bounds = inputs.cu_seq_q.tolist() if inputs.max_q > MAX_KERNEL_QUERIES else []
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if not lengths or min(lengths) <= MAX_KERNEL_QUERIES:
            scaled = (queries.float() * head_dim**-0.5).contiguous()
            group = queries.shape[1] // num_kv_heads
            attend = _compiled_attend(group, head_dim, self.page_size, cache.keys.dtype)
            arguments = self._arguments(cache, num_tasks=num_sequences * num_kv_heads)
            table = inputs.block_table.contiguous()
            arguments.queries, arguments.output = scaled.data_ptr(), output.data_ptr()
            arguments.bounds = inputs.cu_seq_q.data_ptr()
            arguments.lengths = inputs.seqused_k.data_ptr()
            arguments.block_table, arguments.table_width = table.data_ptr(), table.shape[1]
            arguments.max_queries = MAX_KERNEL_QUERIES
            most_read = 2 * num_sequences * inputs.max_k * cache.keys[0, :, :, 0].nbytes
            run([Call(attend, arguments, num_bytes=most_read)])
        for index, length in enumerate(lengths):
            if length > MAX_KERNEL_QUERIES:
                keys, values = self._gathered(cache, inputs, index)
                start = bounds[index]
                own = queries[start : start + length]
                if own.dtype != torch.float32 and not has_half_units(own.dtype):
                    own, keys, values = own.float(), keys.float(), values.float()
                output[start : start + length] = attend_by_products(own, keys, values)
        return output.to(queries.dtype)

    def _gathered(
        self, cache: LayerCache, inputs: AttentionInputs, index: int
    ) -> tuple[Tensor, Tensor]:
        """Of a sequence, keys [kv_heads, head_dim, positions], values with the last two swapped."""
        num_keys = int(inputs.seqused_k[index])
        pages = inputs.block_table[index, : -(-num_keys // self.page_size)]
        keys = cache.keys.index_select(0, pages).permute(1, 2, 0, 3).flatten(2, 3)
        values = cache.values.index_select(0, pages).transpose(0, 1).flatten(1, 2)
        return keys[:, :, :num_keys], values[:, :num_keys]

    def _arguments(self, cache: LayerCache, *, num_tasks: int) -> Any:
        from server.kernels.attention import AttentionArguments

        return AttentionArguments(
            num_tasks=num_tasks,
            num_kv_heads=cache.keys.shape[1],
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
        )


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries [q, heads, d], keys [kv_heads, d, k], values [kv_heads, k, d] -> [q, heads, d].

    As `sdpa.attend_causally`, which keeps scores in float32 where these are rounded to 16 bits; but
    a CPU that multiplies those itself takes half the time.
    """
    num_queries, num_heads, head_dim = queries.shape
    num_kv_heads, _, num_keys = keys.shape
    group = num_heads // num_kv_heads
    output = torch.empty_like(queries)
    for start in range(0, num_queries, PRODUCT_QUERIES):
        part = queries[start : start + PRODUCT_QUERIES]
        num_rows, num_visible = len(part), num_keys - num_queries + start + len(part)
        rows = part.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        rows = rows.reshape(num_kv_heads, group * num_rows, head_dim)
        scores = torch.baddbmm(
            rows.new_empty(1), rows, keys[:, :, :num_visible], beta=0, alpha=head_dim**-0.5
        )
        hidden = scores.new_full((num_rows, num_rows), -torch.inf).triu_(1)
        scores.view(num_kv_heads, group, num_rows, -1)[..., -num_rows:].add_(hidden)
        attended = torch.bmm(scores.softmax(-1), values[:, :num_visible])
        attended = attended.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
        output[start : start + num_rows] = attended.reshape(num_rows, num_heads, head_dim)
    return output


@cache
def _compiled_attend(group: int, head_dim: int, page_size: int, dtype: torch.dtype) -> Any:
    from server.kernels import attention as kernels

    return kernels.compile_attend(
        group=group, head_dim=head_dim, page_size=page_size, dtype=str(dtype)
    )


@cache
def _compiled_write(head_dim: int, page_size: int, dtype: torch.dtype) -> Any:
    from server.kernels import attention as kernels

    return kernels.compile_write(head_dim=head_dim, page_size=page_size, dtype=str(dtype))
