"""What stands between the decoder's matrix products, as compiled loops on CPUs.

Each function has its twin, written with torch, in `layers`, which asks `is_compiled` first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from server.kernels.machine import load_kernels, run_in_threads


def is_compiled(hidden: Tensor) -> bool:
    """Whether the functions below can be called on such a tensor."""
    return hidden.device.type == "cpu" and load_kernels() is not None


def norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """hidden [tokens, size], contiguous, and weight [size] -> RMS-normed [tokens, size]."""
    output = torch.empty_like(hidden)
    _run(
        _compiled_norm(hidden.shape[1], eps, hidden.dtype),
        hidden,
        output,
        cosines=weight.data_ptr(),
    )
    return output


def gate(gates_and_values: Tensor) -> Tensor:
    """[tokens, 2 * size], contiguous -> SiLU of the first halves times the second ones."""
    size = gates_and_values.shape[1] // 2
    output = gates_and_values.new_empty(len(gates_and_values), size)
    _run(_compiled_gate(size, gates_and_values.dtype), gates_and_values, output)
    return output


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """heads [tokens, heads, head_dim], of which only tokens may be apart -> rotated."""
    num_heads, head_dim = heads.shape[1:]
    cosine, signed_sine = rotation
    output = heads.new_empty(heads.shape)
    _run(
        _compiled_rotate(num_heads, head_dim, heads.dtype),
        heads,
        output,
        cosines=cosine.data_ptr(),
        # The second half has the sine as it is.
        sines=signed_sine[..., head_dim // 2 :].data_ptr(),
    )
    return output


def _run(function: Any, rows: Tensor, output: Tensor, *, cosines: int = 0, sines: int = 0) -> None:
    kernels = load_kernels()
    assert kernels is not None  # is_compiled was asked
    arguments = kernels.PointwiseArguments(
        num_tasks=len(rows),
        rows=rows.data_ptr(),
        cosines=cosines,
        sines=sines,
        output=output.data_ptr(),
        row_bytes=rows.stride(0) * rows.element_size(),
    )
    run_in_threads(function, arguments, num_bytes=rows.nbytes + output.nbytes)


@cache
def _compiled_norm(size: int, eps: float, dtype: torch.dtype) -> Any:
    kernels = load_kernels()
    assert kernels is not None
    return kernels.compile_norm(size=size, eps=eps, storage=kernels.STORAGE[str(dtype)])


@cache
def _compiled_gate(size: int, dtype: torch.dtype) -> Any:
    kernels = load_kernels()
    assert kernels is not None
    return kernels.compile_gate(size=size, storage=kernels.STORAGE[str(dtype)])


@cache
def _compiled_rotate(num_heads: int, head_dim: int, dtype: torch.dtype) -> Any:
    kernels = load_kernels()
    assert kernels is not None
    return kernels.compile_rotate(
        num_heads=num_heads, head_dim=head_dim, storage=kernels.STORAGE[str(dtype)]
    )
