"""Lists of compiled functions, run by a team of threads."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numba import carray, cfunc, types

from server.kernels import machine
from server.kernels.machine import Call, run
from server.kernels.vectors import fetch_add, pointer

NUM_TASKS = 8
FIELDS = ("next_task", "before", "after", "idle_turns")
NEXT_TASK, BEFORE, AFTER, IDLE_TURNS = range(4)


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


@cfunc(types.void(types.voidptr))
def add_up(address: Any) -> None:
    """Each task leaves 1 + the sum of all that was left before; the last one takes longer."""
    call = carray(address, (4,), np.int64)
    before = carray(pointer(call[BEFORE]), (NUM_TASKS,), np.int64)
    after = carray(pointer(call[AFTER]), (NUM_TASKS,), np.int64)
    while True:
        task = fetch_add(call[NEXT_TASK:].ctypes.data)
        if task >= NUM_TASKS:
            break
        if task == NUM_TASKS - 1:
            for turn in range(call[IDLE_TURNS]):
                after[task] = (after[task] * 7 + turn) % 1_000_003
        total = 1
        for each in range(NUM_TASKS):
            total += before[each]
        after[task] = total


@cfunc(types.void(types.voidptr))
def meet(address: Any) -> None:
    """Counts who comes, and waits for a second one, though not for ever."""
    call = carray(address, (4,), np.int64)
    fetch_add(call[NEXT_TASK:].ctypes.data)
    after = carray(pointer(call[AFTER]), (NUM_TASKS,), np.int64)
    for _ in range(500_000_000):
        # Adding nothing, because the compiler would read it only once.
        if fetch_add(np.int64(after.ctypes.data)) < 0 or call[NEXT_TASK] >= 2:
            break


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    yield
    torch.set_num_threads(before)


def chain(length: int, *, idle_turns: int) -> list[int]:
    """What a list of functions has left, of which each reads what the one before it has."""
    rooms = np.zeros((length + 1, NUM_TASKS), np.int64)
    places = [room.ctypes.data for room in rooms]
    calls = [
        Call(add_up, Arguments(before=before, after=after, idle_turns=idle_turns), num_bytes=1)
        for before, after in itertools.pairwise(places)
    ]
    run(calls)
    assert (rooms[1:] == rooms[1:, :1]).all()
    left: list[int] = rooms[1:, 0].tolist()
    return left


@pytest.mark.usefixtures("two_threads")
def test_a_function_begins_when_all_of_the_one_before_has_ended() -> None:
    expected = [(8**n - 1) // 7 for n in range(1, 11)]
    for _ in range(20):
        assert chain(10, idle_turns=20_000) == expected


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("is_list", [False, True])
def test_two_threads_run_a_function_together(is_list: bool) -> None:
    room = np.zeros(NUM_TASKS, np.int64)
    arguments = Arguments(after=room.ctypes.data)
    calls = [Call(meet, arguments, num_bytes=1)]
    if is_list:
        other = np.zeros(NUM_TASKS, np.int64)
        place = other.ctypes.data
        calls.append(Call(add_up, Arguments(before=place, after=place), num_bytes=1))
    run(calls)
    assert arguments.next_task == 2


def test_few_bytes_are_computed_by_one_thread() -> None:
    room = np.zeros(NUM_TASKS, np.int64)
    arguments = Arguments(before=room.ctypes.data, after=room.ctypes.data)
    run([Call(add_up, arguments, num_bytes=1)])
    assert arguments.next_task == NUM_TASKS + 1  # one more for each thread that found no task left
