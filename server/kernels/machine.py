"""What this CPU can: compiled loops, called from torch's threads, and 16-bit multiplications.

Needs numba; without it, everything here that is compiled has a slower twin written with torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

MIN_BYTES_TO_SHARE = 256 * 1024
"""Less than this is read or written by the calling thread alone: it takes some 10 microseconds,
and the others, should the machine be busy, can make it wait for milliseconds."""

_log = logging.getLogger(__name__)


@cache
def has_compiler() -> bool:
    """Whether the rest of this folder can be imported; False, with a warning, without numba."""
    try:
        import numba  # noqa: F401
    except ImportError:
        _log.warning("numba cannot be imported: this CPU computes without compiled loops, slower")
        return False
    return True


@cache
def has_half_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit matrices itself: without, float32 is many times faster."""
    mkldnn = torch.ops.mkldnn
    checks = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(checks[dtype]())


ProductUnits = Literal["pairs", "tiles"]


@cache
def product_units(dtype: torch.dtype) -> tuple[ProductUnits, ...]:
    """What multiplies matrices in the loops of `products`, of what this CPU has the fastest first.

    Whole tiles of bfloat16 (AMX), which the kernel is asked to allow; and pairs of it (AVX-512
    BF16), without which neither is used.
    """
    if dtype != torch.bfloat16 or not has_compiler():
        return ()
    features = _compiled_features()
    if not torch.cpu._is_avx512_bf16_supported() or "+avx512bf16" not in features:
        return ()
    has_tiles = torch.cpu._is_amx_tile_supported() and "+amx-bf16" in features
    return ("tiles", "pairs") if has_tiles and torch.cpu._init_amx() else ("pairs",)


def choose_units(dtype: torch.dtype, wanted: ProductUnits | None) -> ProductUnits | None:
    """Those that are wanted, or else the fastest; ValueError where this CPU has not those."""
    units = product_units(dtype)
    if wanted is None:
        return units[0] if units else None
    if wanted not in units:
        raise ValueError(f"this CPU multiplies no {wanted} of {dtype}")
    return wanted


def _compiled_features() -> str:
    """What numba compiles for; NUMBA_CPU_NAME and others can make it another than this CPU."""
    from numba.core.registry import cpu_target

    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return str(features)


@dataclass(frozen=True, slots=True)
class Call:
    """A compiled function and what it is called with, once.

    Any number of threads call it at the same time with the same arguments, whose `next_task` is 0
    before: they share its tasks. All that the arguments hold the address of has to live until then.
    """

    function: Any
    arguments: ctypes.Structure
    num_bytes: int
    """About as many are read and written."""


def run(calls: Sequence[Call]) -> None:
    """One after another, in torch's own threads: a second pool would fight them for the cores."""
    team, num_threads = _openmp(), torch.get_num_threads()
    num_bytes = sum(call.num_bytes for call in calls)
    if team is None or num_bytes < MIN_BYTES_TO_SHARE or num_threads == 1:
        for call in calls:
            call.function.ctypes(ctypes.addressof(call.arguments))
        return
    if len(calls) == 1:
        function, arguments = calls[0].function, calls[0].arguments
    else:
        function, arguments = _compiled_program(), _program(team, calls)
    team.GOMP_parallel(ctypes.c_void_p(function.address), ctypes.byref(arguments), num_threads, 0)


def _program(team: ctypes.CDLL, calls: Sequence[Call]) -> Any:
    from server.kernels.program import program

    barrier = ctypes.cast(team.GOMP_barrier, ctypes.c_void_p).value
    assert barrier is not None  # the library has it
    return program(
        barrier, [(call.function.address, ctypes.addressof(call.arguments)) for call in calls]
    )


@cache
def _compiled_program() -> Any:
    from server.kernels.program import compile_program

    return compile_program()


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch brought and loaded; None where it is another kind."""
    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder.parent / "torch.libs"):
        for path in sorted(place.glob("libgomp*.so*")):
            return ctypes.CDLL(str(path))
    _log.warning("torch has no libgomp of its own: compiled loops run in one thread")
    return None
