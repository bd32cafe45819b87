"""The seam between the decoder and the kernels that attend over a paged cache.

`BACKENDS` names every implementation; `sdpa` is the reference that runs everywhere and that the
others are tested against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.attention import cpu, cpu_pairs, cuda
from server.attention.cpu import CpuBackend
from server.attention.cpu_pairs import PairBackend
from server.attention.cuda import CudaBackend
from server.attention.inputs import AskedTokens, AttentionInputs, LayerCache
from server.attention.sdpa import SdpaBackend
from server.errors import ConfigError

__all__ = [
    "BACKENDS",
    "AskedTokens",
    "AttentionBackend",
    "AttentionInputs",
    "LayerCache",
    "PairBackend",
    "choose_backend",
]


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


@dataclass(frozen=True, slots=True)
class BackendKind:
    """A row of `BACKENDS`."""

    build: Callable[[int], AttentionBackend]
    """page size -> backend"""
    page_size: int
    """Where none is asked for."""
    problem: Callable[[torch.device, torch.dtype, int | None, int | None], str | None]
    """Why there is none for this device, type of keys and values, size of a head if it is known,
    and page size if one is asked for; None where there is."""


BACKENDS: dict[str, BackendKind] = {
    "cuda": BackendKind(
        lambda page_size: CudaBackend(page_size=page_size), 256, cuda.problem_on_device
    ),
    "cpu-pairs": BackendKind(
        lambda page_size: PairBackend(), cpu_pairs.PAGE_SIZE, cpu_pairs.problem_on_device
    ),
    "cpu": BackendKind(
        lambda page_size: CpuBackend(page_size=page_size), 64, cpu.problem_on_device
    ),
    "sdpa": BackendKind(
        lambda page_size: SdpaBackend(page_size=page_size),
        64,
        lambda device, dtype, head_dim, page_size: None,
    ),
}
"""By name, the fastest first."""


def choose_backend(
    name: str = "auto",
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = None,
    page_size: int | None = None,
) -> AttentionBackend:
    """The backend called `name`, or the fastest for the device; ConfigError where there is none."""
    place = torch.device(device)
    if name == "auto":
        name = next(
            each
            for each, kind in BACKENDS.items()
            if not kind.problem(place, dtype, head_dim, page_size)
        )
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ConfigError(f"engine.attention_backend is '{name}'; it can be one of: {known}")
    kind = BACKENDS[name]
    problem = kind.problem(place, dtype, head_dim, page_size)
    if problem is not None:
        raise ConfigError(f"engine.attention_backend '{name}' {problem}")
    return kind.build(page_size or kind.page_size)
