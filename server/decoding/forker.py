"""The process that all decoders are forked from: small, single-threaded, and warm.

It is started before anything is decoded, imports and tries out every decoder once, so that nothing
has to be opened later, and then shuts itself off from network and files. After that it only forks,
kills and buries. Run as a module with the number of a socket; it ends when that is closed, and its
decoders with it. It never sees a byte of anybody's medium.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from server.decoding import child
from server.decoding.confine import die_with_parent, isolate
from server.decoding.messages import (
    MAX_TASK_BYTES,
    Fork,
    Kill,
    Ready,
    Start,
    decode_start,
    decode_to_forker,
    encode,
)
from server.decoding.warm_up import warm_up

NICENESS = 5
"""Answers that are running come before media of those to come."""


class Serve(Protocol):
    def __call__(self, connection: socket.socket, start: Start, *, base_bytes: int) -> None:
        """The life of a decoder."""


def main(serve: Serve = child.serve, prepare: Callable[[], None] = lambda: None) -> None:
    """One life of the forker. Tests put other decoders in, and prepare another kind of host."""
    die_with_parent()
    # The whole group of processes may be interrupted: how this one ends, its parent says.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # to print one, Python would open files
    os.nice(NICENESS)
    control = socket.socket(fileno=int(sys.argv[1]))
    message = control.recv(MAX_TASK_BYTES)
    if not message:
        return
    start = decode_start(message)
    warm_up(start.spec)
    prepare()
    nowhere = os.open(os.devnull, os.O_RDWR)
    base_bytes = _mapped_bytes()
    missing = isolate()
    die_with_parent()  # again: it was forgotten with the rights
    try:
        control.send(encode(Ready(missing)))
    except BrokenPipeError:
        return  # whoever asked for decoders has gone meanwhile
    gc.collect()
    gc.freeze()  # so that decoders share the pages for longer
    _Forker(control, start, serve, nowhere=nowhere, base_bytes=base_bytes).run()


def _mapped_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


class _Forker:
    def __init__(
        self, control: socket.socket, start: Start, serve: Serve, *, nowhere: int, base_bytes: int
    ) -> None:
        self._control = control
        self._start = start
        self._serve = serve
        self._nowhere = nowhere
        self._base_bytes = base_bytes
        self._pid_of: dict[int, int] = {}

    def run(self) -> None:
        """Until the other end of the control socket is closed."""
        reading, writing = os.pipe2(os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(reading, select.POLLIN)
        while True:
            for ready, _ in poll.poll():
                if ready == reading:
                    os.read(reading, 4096)
                    self._bury()
                elif not self._obey():
                    return

    def _bury(self) -> None:
        number_of = {pid: number for number, pid in self._pid_of.items()}
        while self._pid_of:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            del self._pid_of[number_of[pid]]

    def _obey(self) -> bool:
        message, files, _, _ = socket.recv_fds(self._control, MAX_TASK_BYTES, 1)
        if not message:
            return False
        match decode_to_forker(message):
            case Fork(number):
                self._pid_of[number] = self._fork(files[0])
                os.close(files[0])
            case Kill(number):
                # Not waited for yet, so the number of the process is still its own.
                if number in self._pid_of:
                    os.kill(self._pid_of[number], signal.SIGKILL)
        return True

    def _fork(self, connection: int) -> int:
        pid = os.fork()
        if pid != 0:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for standard in (0, 1, 2):
                os.dup2(self._nowhere, standard)
            with socket.socket(fileno=connection) as own:
                self._serve(own, self._start, base_bytes=self._base_bytes)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
