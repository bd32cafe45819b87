"""Decoders that do what a taken-over one would try, in full confinement.

A "picture" of the bytes `do:WHAT ARGUMENT` makes its decoder try that and answer what came of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from server.core import Tiles
from server.decoding import child
from server.decoding.forker import main
from server.decoding.messages import Answer, Start, Task
from server.decoding.work import do

MODULE = "tests.decoding.hostile_forker"


def opened(path: str) -> str:
    with open(path, "rb") as file:
        return f"read {len(file.read())}"


def listed(path: str) -> str:
    return f"listed {len(os.listdir(path))}"


def created(path: str) -> str:
    with open(path, "wb") as file:
        file.write(b"x")
    return "written"


def connected(port: str) -> str:
    with socket.socket() as caller:
        caller.connect(("127.0.0.1", int(port)))
    return "connected"


def bound(_: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
    return "bound"


def forked(_: str) -> str:
    if os.fork() == 0:
        os._exit(0)
    return "forked"


def executed(path: str) -> str:
    os.execv(path, [path])


def signalled(pid: str) -> str:
    os.kill(int(pid), 0)
    return "signalled"


def written(_: str) -> str:
    """To any descriptor there is, beyond where it ends and within."""
    for descriptor in descriptors():
        for offset in (0, 1 << 30):
            with contextlib.suppress(OSError):
                os.pwrite(descriptor, b"x", offset)
                return f"wrote to {descriptor}"
    raise PermissionError


def descriptors() -> list[int]:
    found = []
    for number in range(3, 256):
        with contextlib.suppress(OSError):
            fcntl.fcntl(number, fcntl.F_GETFD)
            found.append(number)
    return found


def counted(_: str) -> str:
    return f"{len(descriptors())} descriptors, variables {' '.join(sorted(os.environ))}"


def duplicated(_: str) -> str:
    while True:
        fcntl.fcntl(0, fcntl.F_DUPFD, 3)


def allocated(num_bytes: str) -> str:
    return f"{len(bytearray(int(num_bytes)))} bytes"


def spun(_: str) -> str:
    while True:
        pass


def slept(seconds: str) -> str:
    time.sleep(float(seconds))
    return "slept"


def crashed(number: str) -> str:
    if number == str(int(signal.SIGSEGV)):
        ctypes.string_at(0)
    os._exit(3)


DEEDS: dict[str, Callable[[str], str]] = {
    "open": opened,
    "list": listed,
    "create": created,
    "connect": connected,
    "bind": bound,
    "fork": forked,
    "exec": executed,
    "signal": signalled,
    "write": written,
    "count": counted,
    "duplicate": duplicated,
    "allocate": allocated,
    "spin": spun,
    "sleep": slept,
    "crash": crashed,
}


def work(task: Task, data: bytes, start: Start) -> tuple[Answer, Tiles | None]:
    if not data.startswith(b"do:"):
        return do(task, data, start)
    what, _, argument = data.decode()[3:].partition(" ")
    try:
        outcome = DEEDS[what](argument)
    except (OSError, MemoryError) as error:
        outcome = type(error).__name__
    return Answer(error="damaged", message=outcome), None


serve = partial(child.serve, work=work)

if __name__ == "__main__":
    main(serve)
