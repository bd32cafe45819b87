"""The reference backend: gathers each sequence's pages and lets torch attend over them.

Pages are [page_size, kv_heads, head_dim]. Each sequence is attended alone, so its result does not
depend on its neighbours in the batch.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from server.attention.inputs import AttentionInputs, LayerCache

MAX_QUERY_ROWS = 256
"""Query tokens attended at once: bounds the mask and the scores, and skips keys of the future."""


class SdpaBackend:
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
        shape = (num_pages, self.page_size, num_kv_heads, head_dim)

        def pages() -> Tensor:
            return zero_pages(shape, dtype=dtype, device=device)

        return [LayerCache(keys=pages(), values=pages()) for _ in range(num_layers)]

    def write(
        self, keys: Tensor, values: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        cache.keys.flatten(0, 1).index_copy_(0, inputs.slot_mapping, keys)
        cache.values.flatten(0, 1).index_copy_(0, inputs.slot_mapping, values)

    def attend(self, queries: Tensor, cache: LayerCache, inputs: AttentionInputs) -> Tensor:
        output = torch.empty_like(queries)
        bounds = inputs.cu_seq_q.tolist()
        for index, num_keys in enumerate(inputs.seqused_k.tolist()):
            start, stop = bounds[index], bounds[index + 1]
            if start == stop:
                continue
            num_pages = -(-num_keys // self.page_size)
            pages = inputs.block_table[index, :num_pages]
            keys = cache.keys.index_select(0, pages).flatten(0, 1)[:num_keys]
            values = cache.values.index_select(0, pages).flatten(0, 1)[:num_keys]
            output[start:stop] = attend_causally(queries[start:stop], keys, values)
        return output


def zero_pages(shape: tuple[int, ...], *, dtype: torch.dtype, device: str) -> Tensor:
    """Zeros, and not just memory: what lies behind a sequence's end must never be NaN."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros take no memory before they are written to; torch's take it at once
    zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(zeros).view(dtype).view(shape)


def attend_causally(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries [q, heads, d], keys and values [k, kv_heads, d] with k >= q -> [q, heads, d].

    The queries are the last q of the k positions.
    """
    num_queries, num_keys = len(queries), len(keys)
    chunks = []
    for start in range(0, num_queries, MAX_QUERY_ROWS):
        chunk = queries[start : start + MAX_QUERY_ROWS]
        num_visible = num_keys - num_queries + start + len(chunk)
        chunks.append(_attend_folded(chunk, keys[:num_visible], values[:num_visible]))
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _attend_folded(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with the query heads that share a key/value head folded into its rows.

    Several times faster on a CPU than letting torch expand the keys (`enable_gqa`).
    """
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    rows = queries.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(1, num_kv_heads, group * num_queries, head_dim)
    mask = None
    if num_queries > 1:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device)
        mask = visible.tril(num_keys - num_queries).repeat(group, 1)
    attended = F.scaled_dot_product_attention(
        rows, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask
    )
    attended = attended.view(num_kv_heads, group, num_queries, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
