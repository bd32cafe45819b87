"""What may be asked for again: kept in memory, and as files in a folder.

Both are bounded in bytes, forget the least recently used first and nothing is used after its time.
A key is a digest over everything that decides about the value, the tenant first of all, so that no
tenant is ever answered from what another one asked for. Must not know what the values mean.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

_Value = TypeVar("_Value")

logger = logging.getLogger(__name__)

ENTRY_BYTES = 512
"""What an entry is taken to cost beside its value: the key and the tables that hold it."""

_FILE_NAME = re.compile(r"[0-9a-f]{64}\.media", re.ASCII)
_PART_NAME = re.compile(r"[0-9a-f]{64}\.[0-9]+\.part", re.ASCII)
_PART_AGE_S = 3600.0
_HEADER = struct.Struct(">8sd32s")
"""Mark, time of storing (seconds since 1970), SHA-256 of what follows."""
_MARK = b"hcxmedia"


def cache_key(*fields: bytes | str, secret: bytes = b"") -> str:
    """A digest (64 hex digits) that differs wherever any field does.

    Fields are framed by their length, so that none can reach into the next. With a `secret` of this
    process nobody can compute a key; a key that must outlive the process has none.
    """
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for field in fields:
        data = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update(struct.pack(">?Q", isinstance(field, str), len(data)))
        digest.update(data)
    return digest.hexdigest()


class MediaCache(Generic[_Value]):
    """Values of stated sizes by key. For one thread, which for a server is its event loop's."""

    def __init__(
        self, max_bytes: int, ttl_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`max_bytes` 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[str, tuple[_Value, int, float]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> _Value | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, _, stored_at_s = entry
        if self._clock() - stored_at_s >= self._ttl_s:
            self.remove(key)
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: _Value, num_bytes: int) -> None:
        """Keep a value in place of an earlier one; nothing is kept that would not fit alone."""
        self.remove(key)
        num_bytes += ENTRY_BYTES
        if num_bytes > self._max_bytes:
            return
        while self.num_bytes + num_bytes > self._max_bytes:
            self.remove(next(iter(self._entries)))
        self._entries[key] = (value, num_bytes, self._clock())
        self.num_bytes += num_bytes

    def remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]


class DiskCache:
    """Bytes by key in a folder, one file each, which the next process finds again.

    Calls block, and may come from several threads. The first OSError turns it off for good: then
    nothing is found and nothing stored, and no call ever fails. A file that is damaged, or too old,
    is removed; files of others in the folder are left alone.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is touched before the first call."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] | None = None
        self._num_bytes = 0
        self.is_on = True

    def get(self, key: str) -> bytes | None:
        return self._guarded(lambda: self._get(key))

    def put(self, key: str, data: bytes) -> None:
        self._guarded(lambda: self._put(key, data))

    def remove(self, key: str) -> None:
        self._guarded(lambda: self._forget(key))

    def turn_off(self, reason: str) -> None:
        """For good, with one line in the log. Does not wait for calls under way."""
        if self.is_on:
            self.is_on = False
            logger.warning("the media cache on disk is off until the next start: %s", reason)

    def _guarded(self, call: Callable[[], _Value | None]) -> _Value | None:
        with self._lock:
            if not self.is_on:
                return None
            try:
                return call()
            except OSError as error:
                # The name of the error only: its text would hold a path.
                self.turn_off(errno.errorcode.get(error.errno or 0, "an error without a number"))
                return None

    def _get(self, key: str) -> bytes | None:
        sizes = self._known()
        if key not in sizes:
            return None
        path = self._path(key)
        data = self._read(path)
        if data is None:
            self._forget(key)
            return None
        sizes.move_to_end(key)
        os.utime(path)
        return data

    def _put(self, key: str, data: bytes) -> None:
        sizes = self._known()
        self._forget(key)
        num_bytes = _HEADER.size + len(data)
        if num_bytes > self._max_bytes:
            return
        while self._num_bytes + num_bytes > self._max_bytes:
            self._forget(next(iter(sizes)))
        self._write(self._path(key), data)
        sizes[key] = num_bytes
        self._num_bytes += num_bytes

    def _forget(self, key: str) -> None:
        num_bytes = self._known().pop(key, None)
        if num_bytes is not None:
            self._num_bytes -= num_bytes
            self._path(key).unlink(missing_ok=True)

    def _known(self) -> OrderedDict[str, int]:
        """Sizes by key, the least recently used first; the folder is read at the first call."""
        if self._sizes is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sizes = self._found()
            self._num_bytes = sum(self._sizes.values())
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._sizes)))
        return self._sizes

    def _found(self) -> OrderedDict[str, int]:
        found: list[tuple[float, str, int]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _PART_NAME.fullmatch(entry.name):
                    # Of a process that died while it wrote, or of one that writes right now.
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _PART_AGE_S:
                        os.unlink(entry.path)
                elif _FILE_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, entry.name[:64], status.st_size))
        return OrderedDict((key, num_bytes) for _, key, num_bytes in sorted(found))

    def _read(self, path: Path) -> bytes | None:
        """None where the file is gone, damaged, or too old by a clock that may have been set."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            header = file.read(_HEADER.size)
            data = file.read(self._max_bytes)
        if len(header) < _HEADER.size:
            return None
        mark, stored_at_s, digest = _HEADER.unpack(header)
        is_young = 0 <= self._clock() - stored_at_s < self._ttl_s
        is_whole = mark == _MARK and hashlib.sha256(data).digest() == digest
        return data if is_young and is_whole else None

    def _write(self, path: Path, data: bytes) -> None:
        """Under another name first, so that nobody ever finds half of a file."""
        part = path.with_suffix(f".{os.getpid()}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(part, flags, mode=0o600), "wb") as file:
                file.write(_HEADER.pack(_MARK, self._clock(), hashlib.sha256(data).digest()))
                file.write(data)
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.media"
