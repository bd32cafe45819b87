"""Compiled functions one after another, by one team of threads.

A team that is called for each function anew falls asleep between two of them, and waking it takes
as long as a small one. Here it only waits until all have ended one function to begin the next.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from server.kernels.vectors import BYTE_POINTER, compiled

NUM_FUNCTIONS, BARRIER, FIRST = range(3)


def program(barrier: int, calls: Sequence[tuple[int, int]]) -> Any:
    """What the function below is called with: pairs of a function's address and its arguments'."""
    numbers = [len(calls), barrier, *(number for call in calls for number in call)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@intrinsic
def _call(typing_context: Any, function: Any, argument: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [BYTE_POINTER])
        address, argument_address = arguments
        callee = builder.inttoptr(address, kind.as_pointer())
        builder.call(callee, [builder.inttoptr(argument_address, BYTE_POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def compile_program() -> Any:
    """The function that every thread of a team calls with the same `program`."""

    def run(address: Any) -> None:
        head = carray(address, (FIRST,), np.int64)
        num_functions, barrier = head[NUM_FUNCTIONS], head[BARRIER]
        numbers = carray(address, (FIRST + 2 * num_functions,), np.int64)
        for index in range(num_functions):
            _call(numbers[FIRST + 2 * index], numbers[FIRST + 2 * index + 1])
            _call(barrier, 0)

    return compiled(run)
