"""What this CPU can: compiled loops, called from torch's threads, and 16-bit multiplications.

Needs numba; without it, everything here that is compiled has a slower twin written with torch.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MIN_BYTES_TO_SHARE = 256 * 1024
"""Less than this is read or written by the calling thread alone: it takes some 10 microseconds,
and the others, should the machine be busy, can make it wait for milliseconds."""

_log = logging.getLogger(__name__)


@cache
def load_kernels() -> ModuleType | None:
    """The module of compiled kernels; None, with a warning, where numba is not to be had."""
    try:
        from server.kernels import cpu
    except ImportError:
        _log.warning("numba cannot be imported: this CPU computes without compiled loops, slower")
        return None
    return cpu


@cache
def has_half_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit matrices itself: without, float32 is many times faster."""
    mkldnn = torch.ops.mkldnn
    checks = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(checks[dtype]())


def run_in_threads(function: Any, arguments: Any, *, num_bytes: int) -> None:
    """Calls a kernel from torch's own threads: a second pool would fight them for the cores."""
    team = _openmp()
    num_threads = torch.get_num_threads()
    if team is None or num_bytes < MIN_BYTES_TO_SHARE or num_threads == 1:
        function.ctypes(ctypes.addressof(arguments))
    else:
        team.GOMP_parallel(
            ctypes.c_void_p(function.address), ctypes.byref(arguments), num_threads, 0
        )


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch brought and loaded; None where it is another kind."""
    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder.parent / "torch.libs"):
        for path in sorted(place.glob("libgomp*.so*")):
            return ctypes.CDLL(str(path))
    _log.warning("torch has no libgomp of its own: compiled loops run in one thread")
    return None
