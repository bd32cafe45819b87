"""Decoders that do not keep to what was agreed: the medium's bytes say how."""

from __future__ import annotations

import os
import socket
import time

import msgspec

from server.decoding.forker import main
from server.decoding.messages import MAX_TASK_BYTES, Answer, Ready, Start, decode_task, encode

MODULE = "tests.decoding.lying_forker"

GOOD = Answer(size=(28, 28), num_tiles=2)
GOOD_VIDEO = Answer(size=(28, 28), num_tiles=3, num_frames=3, duration_s=1.5)


def raw(**changes: object) -> bytes:
    """An answer whose fields break the rules of their types."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(GOOD), **changes})


ANSWERS: dict[str, list[bytes]] = {
    "good": [encode(GOOD)],
    "good video": [encode(GOOD_VIDEO)],
    "empty": [b""],
    "nonsense": [b"\xc1\xff\x00nonsense"],
    "another type": [encode("hello")],
    "huge": [bytes(100_000)],
    "flood": [bytes(100_000)] * 50,
    "twice": [encode(GOOD), encode(GOOD)],
    "fewer tiles": [raw(num_tiles=1)],
    "more tiles": [raw(num_tiles=10)],
    "many tiles": [raw(num_tiles=1_000_000)],
    "negative tiles": [raw(num_tiles=-2)],
    "another size": [raw(size=(100, 28))],
    "size zero": [raw(size=(0, 28))],
    "endless size": [raw(size=(2**60, 28))],
    "size of three": [raw(size=(28, 28, 28))],
    "not a number": [raw(decode_s=float("nan"))],
    "infinite": [raw(duration_s=float("inf"))],
    "negative time": [raw(preprocess_s=-1.0)],
    "unknown error": [raw(error="internal")],
    "error without words": [raw(error="damaged", message="")],
    "unprintable error": [raw(error="damaged", message="a\x1b[31m\r\nforged: line")],
    "wordy error": [raw(error="damaged", message="x" * 3000)],
    "no frames": [encode(msgspec.structs.replace(GOOD_VIDEO, num_frames=0, num_tiles=0))],
    "frames unknown": [encode(msgspec.structs.replace(GOOD_VIDEO, num_frames=None))],
    "more frames": [encode(msgspec.structs.replace(GOOD_VIDEO, num_frames=109, num_tiles=109))],
    "fewer frames": [encode(msgspec.structs.replace(GOOD_VIDEO, num_frames=2))],
}


def serve(connection: socket.socket, start: Start, *, base_bytes: int) -> None:
    connection.send(encode(Ready(())))
    while True:
        message, files, _, _ = socket.recv_fds(connection, MAX_TASK_BYTES, 2)
        if not message:
            return
        name = os.pread(files[0], decode_task(message).num_bytes, 0).decode()
        if name == "never":
            time.sleep(3600)
        if name == "shorter":
            os.ftruncate(files[1], 0)  # sealed: raises, and that is the end of this decoder
        for answer in ANSWERS[name]:
            connection.send(answer)


if __name__ == "__main__":
    main(serve)
