"""The seam between the decoder and the kernels that attend over a paged cache.

`BACKENDS` names every implementation; `sdpa` is the reference that runs everywhere and that the
others are tested against.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from server.attention.cpu import CpuBackend, load_kernels
from server.attention.inputs import AttentionInputs, LayerCache
from server.attention.sdpa import SdpaBackend
from server.errors import ConfigError

__all__ = ["BACKENDS", "AttentionBackend", "AttentionInputs", "LayerCache", "choose_backend"]


class AttentionBackend(Protocol):
    """Owns the layout of the cache pages: allocates them, writes to them, attends over them."""

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        ...

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
        """One cache for each layer, of `num_pages` pages."""
        ...

    def write(
        self, keys: Tensor, values: Tensor, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] at the slots of their tokens."""
        ...

    def attend(self, queries: Tensor, cache: LayerCache, inputs: AttentionInputs) -> Tensor:
        """Causal attention of queries [tokens, heads, head_dim] -> the same shape.

        Query head h reads key/value head h // (heads / kv_heads); scores are scaled by
        head_dim ** -0.5. This step's keys and values must have been written before.
        """
        ...


BACKENDS: dict[str, Callable[[int], AttentionBackend]] = {
    "sdpa": lambda page_size: SdpaBackend(page_size=page_size),
    "cpu": lambda page_size: CpuBackend(page_size=page_size),
}
"""By name: page size -> backend."""


def choose_backend(name: str = "auto", *, device: str, page_size: int = 64) -> AttentionBackend:
    """The backend called `name`, or the best one for the device."""
    is_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        name = "cpu" if is_cpu and load_kernels() is not None else "sdpa"
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ConfigError(f"engine.attention_backend is '{name}'; it can be one of: {known}")
    if name == "cpu" and not is_cpu:
        raise ConfigError(f"engine.attention_backend 'cpu' does not run on the device '{device}'")
    if name == "cpu" and load_kernels() is None:
        raise ConfigError("engine.attention_backend 'cpu' needs numba, which is not installed")
    return BACKENDS[name](page_size)
