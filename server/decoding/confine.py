"""Taking away from a process what decoding does not need.

`isolate` is for the forker, once: away with the network, the files and the rights of root; all its
children inherit that. `confine` is for a decoder before it sees a stranger's byte: no descriptors,
no further processes, no system call but those of a decoder at work. Both go as far as the host lets
them and return the names of what they could not have. Linux only; must not know what is decoded.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final

NOBODY: Final = 65_534
MAX_DESCRIPTORS: Final = 16

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWNS: Final = 0x0002_0000
_CLONE_NEWIPC: Final = 0x0800_0000
_CLONE_NEWUSER: Final = 0x1000_0000
_CLONE_NEWNET: Final = 0x4000_0000
_MS_RDONLY_NOSUID_NODEV_NOEXEC: Final = 1 | 2 | 4 | 8
_MS_REC_PRIVATE: Final = 0x4000 | 0x4_0000
_MNT_DETACH: Final = 2
_CAPABILITY_VERSION_3: Final = 0x2008_0522

# The system calls of CPython, Pillow and FFmpeg while they decode bytes in memory, by number on
# x86-64 and on 64-bit ARM (None: there is no such call). `prlimit64` is let through for the process
# itself only.
_ALLOWED: Final[dict[str, tuple[int, int | None]]] = {
    "read": (0, 63),
    "pread64": (17, 67),
    "recvmsg": (47, 212),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "close": (3, 57),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "poll": (7, None),
    "ppoll": (271, 73),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getrusage": (98, 165),
    "times": (100, 153),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_OF_ITSELF_ONLY: Final = {"prlimit64": (302, 261)}
_PIVOT_ROOT: Final = (155, 41)
_ARCHITECTURES: Final = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""By machine: the place in the pairs above, and the kernel's own name for it."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Be killed when the parent ends. Forgotten by the kernel when rights change."""
    _call(_LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def isolate() -> tuple[str, ...]:
    """Leave the network, the file system and root behind. Nothing can be opened afterwards."""
    missing: list[str] = []
    namespaces = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC
    is_apart = False
    if os.geteuid() == 0:
        is_apart = _is_done(lambda: _enter(namespaces))
        if not _is_done(_become_nobody):
            missing.append("an unprivileged user")
    if not is_apart and not _is_done(lambda: _enter(namespaces | _CLONE_NEWUSER)):
        missing.append("namespaces without network and files")
    return tuple(missing)


def confine(keep: int, *, max_memory_bytes: int) -> tuple[str, ...]:
    """Give up all but the descriptor `keep`; `max_memory_bytes` bounds what can be asked for later.

    Standard input, output and error must already lead nowhere.
    """
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("resource limits", lambda: _limit_resources(max_memory_bytes)),
        ("no capabilities", _drop_capabilities),
        ("no new privileges", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        ("no inspection", lambda: _prctl(_PR_SET_DUMPABLE, 0)),
        ("a filter of system calls", _filter_system_calls),
    )
    os.closerange(3, keep)
    os.closerange(keep + 1, _max_descriptor())
    return tuple(name for name, step in steps if not _is_done(step))


def limit_job(*, memory_bytes: int, cpu_s: float) -> None:
    """What this process may have in all, and for how long from now it may compute."""
    _lower(resource.RLIMIT_AS, memory_bytes)
    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s) + 1)


def _is_done(step: Callable[[], None]) -> bool:
    try:
        step()
    except (OSError, ValueError):  # denied, or unknown here
        return False
    return True


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _prctl(option: int, value: int) -> None:
    _call(_LIBC.prctl, option, value, 0, 0, 0)


def _enter(namespaces: int) -> None:
    _call(_LIBC.unshare, namespaces)
    _call(_LIBC.mount, None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None)
    # An empty file system that cannot be written to becomes the root; any folder will do for it.
    flags = ctypes.c_ulong(_MS_RDONLY_NOSUID_NODEV_NOEXEC)
    _call(_LIBC.mount, b"tmpfs", b"/proc", b"tmpfs", flags, b"size=4k,nr_inodes=2")
    os.chdir("/proc")
    _call(_LIBC.syscall, ctypes.c_long(_PIVOT_ROOT[_machine()[0]]), b".", b".")
    _call(_LIBC.umount2, b".", _MNT_DETACH)
    os.chdir("/")


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call(_LIBC.capset, header, bytes(24))


def _limit_resources(max_memory_bytes: int) -> None:
    for limit, value in (
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_AS, max_memory_bytes),
    ):
        _lower(limit, value, is_final=True)


def _lower(limit: int, value: int, *, is_final: bool = False) -> None:
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value if is_final else hard))


def _max_descriptor() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _machine() -> tuple[int, int]:
    found = _ARCHITECTURES.get(os.uname().machine)
    if found is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, "no numbers of system calls for this machine")
    return found


# Instructions of the kernel's packet filter (linux/filter.h), which also filters system calls.
_LOAD: Final = 0x20  # the 32-bit word at an offset of struct seccomp_data
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW: Final = 0x7FFF_0000
_KILL_PROCESS: Final = 0x8000_0000
_DENY: Final = 0x0005_0000 | errno.EPERM


def _filter_system_calls() -> None:
    place, architecture = _machine()
    allowed = [number for pair in _ALLOWED.values() if (number := pair[place]) is not None]
    of_itself = [pair[place] for pair in _OF_ITSELF_ONLY.values()]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in _instructions(architecture, allowed, of_itself)
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _call(_LIBC.prctl, _PR_SET_SECCOMP, 2, header, 0, 0)


def _instructions(
    architecture: int, allowed: Iterable[int], of_itself: Iterable[int]
) -> Iterable[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, value), one after another; jumps skip so many."""
    yield _LOAD, 0, 0, _ARCHITECTURE_AT
    yield _JUMP_IF_EQUAL, 1, 0, architecture
    yield _RETURN, 0, 0, _KILL_PROCESS
    yield _LOAD, 0, 0, _NUMBER_AT
    for number in allowed:
        yield _JUMP_IF_EQUAL, 0, 1, number
        yield _RETURN, 0, 0, _ALLOW
    for number in of_itself:
        yield _JUMP_IF_EQUAL, 0, 6, number
        yield _LOAD, 0, 0, _FIRST_ARGUMENT_AT
        yield _JUMP_IF_EQUAL, 0, 2, 0
        yield _LOAD, 0, 0, _FIRST_ARGUMENT_AT + 4
        yield _JUMP_IF_EQUAL, 1, 0, 0
        yield _RETURN, 0, 0, _DENY
        yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _DENY
