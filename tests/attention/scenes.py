"""Sequences over scattered pages, and dense attention in float64 to compare a backend with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.attention.backend import BACKENDS, AttentionBackend, AttentionInputs
from server.attention.sdpa import MAX_QUERY_ROWS

HEAD_DIM = 16


@dataclass
class Scene:
    """Sequences with their full keys and values, and the cache that holds them in random pages."""

    backend: AttentionBackend
    inputs: AttentionInputs
    queries: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    new_keys: Tensor
    new_values: Tensor


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One sequence: queries [q, h, d] are the last q positions of keys [k, kv, d]. Float64."""
    group = queries.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) / keys.shape[2] ** 0.5
    query_positions = torch.arange(len(queries), device=queries.device) + len(keys) - len(queries)
    hidden = torch.arange(len(keys), device=queries.device)[None, :] > query_positions[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def build_scene(
    name: str,
    lengths: list[tuple[int, int]],
    *,
    page_size: int = 4,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Scene:
    """`lengths` holds (new tokens, all tokens) for each sequence; the older ones are cached."""
    generator = torch.Generator().manual_seed(len(lengths) + page_size)

    def normal(count: int, num_heads: int) -> Tensor:
        return torch.randn(count, num_heads, head_dim, generator=generator).to(device, dtype)

    num_heads, num_kv_heads = heads
    backend = BACKENDS[name].build(page_size)
    pages_needed = [-(-total // page_size) for _, total in lengths]
    num_pages = sum(pages_needed) + 3
    order = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    caches = backend.allocate(
        2, num_pages, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device
    )
    # columns that must not be read point at a page that does not exist
    table = torch.full((len(lengths), max(pages_needed) + 1), 10_000, dtype=torch.int32)
    taken = 0
    for index, count in enumerate(pages_needed):
        table[index, :count] = order[taken : taken + count]
        taken += count

    def slots(index: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)
        return table[index, positions // page_size].long() * page_size + positions % page_size

    def inputs_for(spans: list[tuple[int, int]]) -> AttentionInputs:
        counts = torch.tensor([stop - start for start, stop in spans], dtype=torch.int32)
        ends = torch.tensor([stop for _, stop in spans], dtype=torch.int32)
        return AttentionInputs(
            caches=caches,
            cu_seq_q=torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]).to(
                device
            ),
            seqused_k=ends.to(device),
            block_table=table.to(device),
            slot_mapping=torch.cat([slots(i, *span) for i, span in enumerate(spans)]).to(device),
            max_q=int(counts.max()),
            max_k=int(ends.max()),
        )

    keys = [normal(total, num_kv_heads) for _, total in lengths]
    values = [normal(total, num_kv_heads) for _, total in lengths]
    old = inputs_for([(0, total - new) for new, total in lengths])
    backend.write(
        torch.cat([k[: len(k) - new] for k, (new, _) in zip(keys, lengths, strict=True)]),
        torch.cat([v[: len(v) - new] for v, (new, _) in zip(values, lengths, strict=True)]),
        caches[1],
        old,
    )
    return Scene(
        backend=backend,
        inputs=inputs_for([(total - new, total) for new, total in lengths]),
        queries=normal(sum(new for new, _ in lengths), num_heads),
        keys=keys,
        values=values,
        new_keys=torch.cat([k[len(k) - new :] for k, (new, _) in zip(keys, lengths, strict=True)]),
        new_values=torch.cat(
            [v[len(v) - new :] for v, (new, _) in zip(values, lengths, strict=True)]
        ),
    )


def attend(scene: Scene) -> Tensor:
    cache = scene.inputs.caches[1]
    scene.backend.write(scene.new_keys, scene.new_values, cache, scene.inputs)
    return scene.backend.attend(scene.queries, cache, scene.inputs)


def expected(scene: Scene) -> Tensor:
    bounds = scene.inputs.cu_seq_q.tolist()
    return torch.cat(
        [
            dense_attention(scene.queries[bounds[i] : bounds[i + 1]], keys, values)
            for i, (keys, values) in enumerate(zip(scene.keys, scene.values, strict=True))
        ]
    )


LENGTHS = {
    "one_token": [(1, 1)],
    "decode": [(1, 9), (1, 4), (1, 17)],
    "prefill": [(11, 11), (4, 4)],
    "chunked": [(5, 12), (4, 8), (3, 20)],
    "mixed": [(1, 30), (7, 7), (6, 19), (1, 1)],
    "long": [(MAX_QUERY_ROWS + 40, MAX_QUERY_ROWS + 55)],
}
