"""Pools of real decoders, and what the operating system knows of them."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from server.config import MediaConfig
from server.core import VisionSpec
from server.decoding.pool import DecoderPool
from server.decoding.processes import ENTRY_MODULE
from tests.decoding.samples import SPEC


def children_of(pid: int) -> list[int]:
    """The processes whose parent that is, those that have ended and are not buried included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = (entry / "stat").read_text()
                if int(status.rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return sorted(found)


def forker_pid() -> int:
    (pid,) = (
        pid
        for pid in children_of(os.getpid())
        if b"_forker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        or b"decoding.forker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return pid


def decoder_pids() -> list[int]:
    return children_of(forker_pid())


def descriptors() -> list[str]:
    """What they refer to: pipes and sockets have numbers of their own."""
    gc.collect()  # what pytest remembers of exceptions
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@contextlib.asynccontextmanager
async def running_pool(
    entry_module: str = ENTRY_MODULE, spec: VisionSpec = SPEC, **settings: Any
) -> AsyncIterator[DecoderPool]:
    """A started pool of one decoder, unless the settings say otherwise."""
    config = MediaConfig(**{"decode_processes": 1, **settings})
    pool = DecoderPool(config, spec, entry_module=entry_module)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
