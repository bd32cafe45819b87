"""The life of one decoder: confined first, then one task after another until its socket ends.

It holds a socket and, while it works, the medium and the file for the tiles. Whatever it says or
writes may be a stranger's doing, and its parent takes it so.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable

import numpy as np

from server.core import Tiles
from server.decoding.confine import confine, die_with_parent, limit_job
from server.decoding.jobs import kind_of
from server.decoding.messages import (
    MAX_TASK_BYTES,
    Answer,
    Ready,
    Start,
    Task,
    decode_task,
    encode,
)
from server.decoding.work import do

Work = Callable[[Task, bytes, Start], tuple[Answer, Tiles | None]]


def serve(connection: socket.socket, start: Start, *, base_bytes: int, work: Work = do) -> None:
    """Returns when the other end is closed. `base_bytes` is what the process is mapped to already.

    Tests put other work in.
    """
    die_with_parent()
    limits = start.limits
    most_bytes = max(limits.image_decode_memory_bytes, limits.video_decode_memory_bytes)
    missing = confine(connection.fileno(), max_memory_bytes=base_bytes + most_bytes)
    connection.send(encode(Ready(missing)))
    while True:
        message, files, _, _ = socket.recv_fds(connection, MAX_TASK_BYTES, 2)
        if not message:
            return
        try:
            answer = _answer(decode_task(message), files, start, base_bytes, work)
        finally:
            for file in files:
                os.close(file)
        connection.send(encode(answer))


def _answer(task: Task, files: list[int], start: Start, base_bytes: int, work: Work) -> Answer:
    kind = kind_of(task.job)
    limits = start.limits
    if kind == "image":
        memory_bytes, timeout_s = limits.image_decode_memory_bytes, limits.image_decode_timeout_s
    else:
        memory_bytes, timeout_s = limits.video_decode_memory_bytes, limits.video_decode_timeout_s
    limit_job(memory_bytes=base_bytes + memory_bytes, cpu_s=timeout_s)
    try:
        answer, tiles = work(task, _read(files[0], task.num_bytes), start)
        if tiles is not None:
            with mmap.mmap(files[1], tiles.nbytes) as out:
                np.copyto(np.frombuffer(out, dtype=np.uint8), tiles.reshape(-1))
    except Exception:  # out of memory, most likely
        return Answer(error="damaged", message=f"The {kind} cannot be decoded.")
    return answer


def _read(file: int, num_bytes: int) -> bytes:
    """The whole file, without moving the offset that others share."""
    pieces: list[bytes] = []
    position = 0
    while position < num_bytes:
        piece = os.pread(file, num_bytes - position, position)
        if not piece:
            raise OSError("the file is shorter than it was")
        pieces.append(piece)
        position += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
