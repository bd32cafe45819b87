"""The encoded bytes of one medium, in a file that has no name.

Whether they came in a URL, by a fetch or in an upload, they end in a `MediaFile`: in memory, or on
disk where they are large. Whoever decodes them gets the descriptor. Must not know what the bytes
mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from server.errors import StorageFull, Unavailable

_DISK_IS_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MACHINE_IS_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@contextlib.contextmanager
def asking_for_room(*, in_memory: bool = False) -> Iterator[None]:
    """StorageFull or Unavailable in place of the OSErrors that mean: there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno in _MACHINE_IS_FULL or (in_memory and error.errno in _DISK_IS_FULL):
            raise Unavailable(shortage="memory") from None
        if error.errno in _DISK_IS_FULL:
            raise StorageFull("The server's disk has no room for this file.") from None
        raise


class MediaFile:
    """Bytes that will not change any more: at least `num_bytes` long, with their SHA-256 (hex).

    The file is closed with the last reference to it. Reading moves no offset, so one file may be
    read by several at once.
    """

    def __init__(self, file: BinaryIO, *, num_bytes: int, digest: str) -> None:
        """`file` is open for reading, and from now on belongs to this object."""
        self.num_bytes = num_bytes
        self.digest = digest
        # A plain number: a file object may be finalized before this one where both are garbage,
        # and would complain that nobody closed it.
        self._descriptor = -1
        with file:
            self._descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @classmethod
    def of_bytes(cls, data: bytes) -> MediaFile:
        writer = MediaFileWriter()
        writer.write(data)
        return writer.finish()

    def fileno(self) -> int:
        return self._descriptor

    def head(self, num_bytes: int) -> bytes:
        """The first bytes, fewer where there are fewer."""
        return os.pread(self.fileno(), min(num_bytes, self.num_bytes), 0)

    def read(self, start: int = 0, num_bytes: int | None = None) -> bytes:
        """All bytes from `start`, or so many of them. OSError where the file has become shorter."""
        stop = self.num_bytes if num_bytes is None else min(start + num_bytes, self.num_bytes)
        pieces: list[bytes] = []
        while start < stop:
            piece = os.pread(self.fileno(), stop - start, start)
            if not piece:
                raise OSError("the file is shorter than it was")
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)


class MediaFileWriter:
    """A `MediaFile` while its bytes arrive: in memory, or without a name in a folder.

    StorageFull or Unavailable where there is no room. One that is dropped leaves nothing behind.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """None is memory."""
        self._is_finished = True  # until there is something to close
        self._is_memory = folder is None
        with asking_for_room(in_memory=self._is_memory):
            self._file: BinaryIO = _new_file(folder)
        self._is_finished = False
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def __del__(self) -> None:
        if not self._is_finished:
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Blocks for as long as the disk does, where the file is on one."""
        rest = memoryview(data)
        with asking_for_room(in_memory=self._is_memory):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self.num_bytes += len(data)

    def finish(self) -> MediaFile:
        """The bytes written so far, read-only from here on."""
        file = self._file
        if self._is_memory:
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, seals)
        else:
            # Opened again, so that whoever is given the descriptor cannot write through it.
            with asking_for_room():
                file = open(f"/proc/self/fd/{file.fileno()}", "rb", buffering=0)  # noqa: SIM115
            self._file.close()
        self._is_finished = True  # the file is no longer this object's to close
        return MediaFile(file, num_bytes=self.num_bytes, digest=self._digest.hexdigest())


def _new_file(folder: Path | None) -> BinaryIO:
    if folder is not None:
        return tempfile.TemporaryFile(dir=folder, buffering=0)
    descriptor = os.memfd_create("media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    return os.fdopen(descriptor, "r+b", buffering=0)
