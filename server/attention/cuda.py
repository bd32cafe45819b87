"""The backend for CUDA: torch's FlashAttention reads the pages itself.

A thin call, and not yet seen to run: no GPU was at hand. What it is called with is tested on the
CPU against a twin of `torch.nn.attention.varlen.varlen_attn`, whose documentation it follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.attention.inputs import AttentionInputs, LayerCache
from server.attention.sdpa import SdpaBackend

PAGE_SIZE_UNIT = 256
"""FlashAttention 2 takes pages of a multiple of this only."""

LEAST_CAPABILITY = (8, 0)
"""The first GPUs (Ampere) that FlashAttention 2 runs on."""


def problem_on_device(
    device: torch.device, dtype: torch.dtype, head_dim: int | None, page_size: int | None
) -> str | None:
    """Why this backend cannot be had; None where it can."""
    if device.type != "cuda":
        return f"does not run on the device '{device}'"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs model.dtype float16 or bfloat16"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more"
    if page_size is not None and page_size % PAGE_SIZE_UNIT:
        return f"needs engine.block_size to be a multiple of {PAGE_SIZE_UNIT}, not {page_size}"
    return None


class CudaBackend:
    """Pages are [page_size, kv_heads, head_dim], laid out and written as the reference does."""

    def __init__(self, *, page_size: int) -> None:
        # Here, because importing it takes seconds and nobody else needs it.
        from torch.nn.attention.varlen import varlen_attn

        self.page_size = page_size
        self._pages = SdpaBackend(page_size=page_size)
        self._attend = varlen_attn

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
        return self._pages.allocate(
            num_layers,
            num_pages,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )

    def write(
        self, keys: Tensor, values: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        self._pages.write(keys, values, cache, inputs)

    def attend(self, queries: Tensor, cache: LayerCache, inputs: AttentionInputs) -> Tensor:
        if not len(queries):
            return queries
        attended = self._attend(
            queries.contiguous(),
            cache.keys,
            cache.values,
            inputs.cu_seq_q,
            None,  # how many keys there are, seqused_k says
            inputs.max_q,
            inputs.max_k,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
            seqused_k=inputs.seqused_k,
            block_table=inputs.block_table,
            num_splits=1,  # so that a sequence's result does not depend on its neighbours
        )
        assert isinstance(attended, Tensor)  # nothing beside it was asked for
        return attended
