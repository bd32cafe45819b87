"""What stands between the decoder's matrix products, as compiled loops on CPUs.

Each function has its twin, written with torch, in `layers`, which asks `is_compiled` first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from server.kernels.machine import Call, has_compiler, run


def is_compiled(hidden: Tensor) -> bool:
    """Whether the functions below can be called on such a tensor."""
    return hidden.device.type == "cpu" and has_compiler()


def norm(hidden: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """hidden [tokens, size], contiguous, and weight [size] -> RMS-normed [tokens, size]."""
    output = torch.empty_like(hidden)
    run([norm_call(hidden, weight, output, eps=eps)])
    return output


def norm_call(
    hidden: Tensor, weight: Tensor, output: Tensor, *, eps: float, added: Tensor | None = None
) -> Call:
    """As `norm`, into `output`; first `added`, contiguous too, is added to hidden in its place."""
    from server.kernels.pointwise import NormArguments

    arguments = NormArguments(
        num_tasks=hidden.shape[0],
        rows=hidden.data_ptr(),
        added=0 if added is None else added.data_ptr(),
        weight=weight.data_ptr(),
        output=output.data_ptr(),
    )
    function = _compiled_norm(hidden.shape[1], eps, hidden.dtype, added is not None)
    return Call(function, arguments, num_bytes=2 * hidden.nbytes)


def gate(gates_and_values: Tensor) -> Tensor:
    """[tokens, 2 * size], contiguous -> SiLU of the first halves times the second ones."""
    output = gates_and_values.new_empty(len(gates_and_values), gates_and_values.shape[1] // 2)
    run([gate_call(gates_and_values, output)])
    return output


def gate_call(gates_and_values: Tensor, output: Tensor) -> Call:
    """As `gate`, into `output`, contiguous."""
    function = _compiled_gate(output.shape[1], gates_and_values.dtype)
    return _call(function, gates_and_values, output)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """heads [tokens, heads, head_dim], of which only tokens may be apart -> rotated."""
    output = heads.new_empty(heads.shape)
    run([rotate_call(heads, rotation, output)])
    return output


def rotate_call(heads: Tensor, rotation: tuple[Tensor, Tensor], output: Tensor) -> Call:
    """As `rotate`, into `output`, contiguous."""
    num_heads, head_dim = heads.shape[1:]
    cosine, signed_sine = rotation
    return _call(
        _compiled_rotate(num_heads, head_dim, heads.dtype),
        heads,
        output,
        cosines=cosine.data_ptr(),
        # The second half has the sine as it is.
        sines=signed_sine[..., head_dim // 2 :].data_ptr(),
    )


def _call(function: Any, rows: Tensor, output: Tensor, *, cosines: int = 0, sines: int = 0) -> Call:
    from server.kernels.pointwise import PointwiseArguments

    arguments = PointwiseArguments(
        num_tasks=rows.shape[0],
        rows=rows.data_ptr(),
        cosines=cosines,
        sines=sines,
        output=output.data_ptr(),
        row_bytes=rows.stride(0) * rows.element_size(),
    )
    return Call(function, arguments, num_bytes=2 * output.nbytes)


@cache
def _compiled_norm(size: int, eps: float, dtype: torch.dtype, adds: bool) -> Any:
    from server.kernels import pointwise as kernels

    return kernels.compile_norm(size=size, eps=eps, dtype=str(dtype), adds=adds)


@cache
def _compiled_gate(size: int, dtype: torch.dtype) -> Any:
    from server.kernels import pointwise as kernels

    return kernels.compile_gate(size=size, dtype=str(dtype))


@cache
def _compiled_rotate(num_heads: int, head_dim: int, dtype: torch.dtype) -> Any:
    from server.kernels import pointwise as kernels

    return kernels.compile_rotate(num_heads=num_heads, head_dim=head_dim, dtype=str(dtype))
