"""The same on a host that has neither namespaces nor filters of system calls.

The kernel itself denies them here, by a filter that lies around the whole forker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from server.decoding.forker import main
from tests.decoding.hostile_forker import serve

MODULE = "tests.decoding.bare_forker"

UNSHARE, PRCTL, SECCOMP = {"x86_64": (272, 157, 317), "aarch64": (97, 167, 277)}[os.uname().machine]
SET_NO_NEW_PRIVS, SET_SECCOMP = 38, 22
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
DENY, ALLOW = 0x0005_0000 | errno.EPERM, 0x7FFF_0000


def deny(*, namespaces: bool = True) -> None:
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (LOAD, 0, 0, 0),
            (EQUAL, 4, 0, UNSHARE if namespaces else SECCOMP),
            (EQUAL, 3, 0, SECCOMP),
            (EQUAL, 0, 3, PRCTL),
            (LOAD, 0, 0, 16),
            (EQUAL, 0, 1, SET_SECCOMP),
            (RETURN, 0, 0, DENY),
            (RETURN, 0, 0, ALLOW),
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    assert libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(SET_SECCOMP, 2, header, 0, 0) == 0


if __name__ == "__main__":
    main(serve, prepare=deny)
