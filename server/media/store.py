"""Uploaded files on disk: they survive a restart, belong to one owner each, and expire.

A file is two files in the folder: its bytes under its id, and beside them `ID.json`, which is
written last and makes it exist. Everything here blocks and may be called from several threads. One
process at a time may use a folder. Must not know HTTP, nor what the bytes mean.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final, Literal

import msgspec

from server.errors import FileNotFound, StorageFull
from server.media.file import MediaFile, asking_for_room

logger = logging.getLogger(__name__)

MAX_FILES_PER_OWNER: Final = 10_000

_ALPHABET = string.ascii_letters + string.digits
_ID_CHARS = 32
_ID = re.compile(rf"file-[A-Za-z0-9]{{{_ID_CHARS}}}", re.ASCII)
_DESCRIPTION = ".json"
_UNFINISHED = ".part"
_MAX_DESCRIPTION_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file; `digest` is the SHA-256 of its bytes, times are since 1970."""

    id: str
    owner: str
    filename: str
    purpose: str
    num_bytes: int
    digest: str
    created_at_s: float
    expires_at_s: float


def owner_digest(tenant: str) -> str:
    """The owner whose files those of `tenant` are: nothing on disk names a key."""
    name = tenant.encode("utf-8")
    return hashlib.sha256(len(name).to_bytes(8, "big") + name).hexdigest()


@dataclass(frozen=True, slots=True)
class FilePage:
    """Some files in order, and whether there are more behind the last of them."""

    files: tuple[StoredFile, ...]
    has_more: bool


@dataclass(slots=True)
class _Owned:
    """What one owner has: files by id, and what of new ones has arrived."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    num_arriving: int = 0
    num_bytes_arriving: int = 0


class FileStore:
    """All uploaded files. What is not there, expired or another owner's is one FileNotFound."""

    def __init__(
        self,
        folder: Path,
        ttl_s: float,
        max_bytes_per_owner: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes up what an earlier process left. OSError where the folder cannot be used."""
        self.ttl_s = ttl_s
        self._folder = folder
        self._max_bytes_per_owner = max_bytes_per_owner
        self._clock = clock
        self._lock = threading.Lock()
        self._owned: dict[str, _Owned] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in _take_up(folder):
            self._owned.setdefault(file.owner, _Owned()).files[file.id] = file
        probe = folder / (_new_id() + _UNFINISHED)
        _new_file(probe).close()
        probe.unlink()
        self.sweep()

    def now_s(self) -> float:
        return self._clock()

    def begin(self, owner: str) -> FileWriter:
        """A file that is to arrive. StorageFull where the owner or the disk has no room."""
        self.sweep()
        self._reserve(owner, num_files=1)
        try:
            with asking_for_room():
                return FileWriter(self, self._folder, owner, _new_id())
        except BaseException:
            self._release(owner, num_files=1)
            raise

    def get(self, file_id: str, owner: str) -> StoredFile:
        with self._lock:
            owned = self._owned.get(owner)
            file = owned.files.get(file_id) if owned is not None else None
            if file is None or file.expires_at_s <= self._clock():
                raise FileNotFound()
            return file

    def page(
        self,
        owner: str,
        *,
        limit: int,
        purpose: str | None = None,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> FilePage:
        """The owner's files by age, at most `limit`, those behind the one with the id `after`."""
        with self._lock:
            now_s = self._clock()
            owned = self._owned.get(owner, _Owned())
            files = [file for file in owned.files.values() if file.expires_at_s > now_s]
        files.sort(key=lambda file: (file.created_at_s, file.id), reverse=order == "desc")
        if after is not None:
            places = [place for place, file in enumerate(files) if file.id == after]
            if not places:
                raise FileNotFound()
            files = files[places[0] + 1 :]
        files = [file for file in files if purpose is None or file.purpose == purpose]
        return FilePage(tuple(files[:limit]), has_more=len(files) > limit)

    def open(self, file_id: str, owner: str) -> MediaFile:
        """The file's bytes, which stay readable when it is deleted meanwhile."""
        stored = self.get(file_id, owner)
        try:
            with asking_for_room():
                opened = open(self._folder / stored.id, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:  # deleted since, or by hand
            raise FileNotFound() from None
        file = MediaFile(opened, num_bytes=stored.num_bytes, digest=stored.digest)
        if os.fstat(file.fileno()).st_size != stored.num_bytes:
            logger.error("an uploaded file has changed on disk and is not served")
            raise FileNotFound()
        return file

    def delete(self, file_id: str, owner: str) -> None:
        """FileNotFound where it is not there. OSError where the disk does not let it go."""
        file = self.get(file_id, owner)
        _remove(self._folder / file.id)
        self._forget(file)  # now: what is still on the disk comes back with the next start

    def sweep(self) -> None:
        """Remove from the disk what has expired."""
        with self._lock:
            now_s = self._clock()
            expired = [
                file
                for owned in self._owned.values()
                for file in owned.files.values()
                if file.expires_at_s <= now_s
            ]
        for file in expired:
            self._forget(file)
            try:
                _remove(self._folder / file.id)
            except OSError as error:
                logger.error("an expired file cannot be removed: %s", error.strerror)

    def _forget(self, file: StoredFile) -> None:
        with self._lock:
            owned = self._owned.get(file.owner)
            if owned is None or owned.files.pop(file.id, None) is None:
                return
            self._drop_if_empty(file.owner)

    def _drop_if_empty(self, owner: str) -> None:
        owned = self._owned[owner]
        if not owned.files and not owned.num_arriving:
            del self._owned[owner]

    # What a `FileWriter` asks of its store --------------------------------------------------------

    def _reserve(self, owner: str, *, num_files: int = 0, num_bytes: int = 0) -> None:
        """Count what arrives; StorageFull, and nothing counted, where the owner has no room."""
        with self._lock:
            now_s = self._clock()
            owned = self._owned.get(owner) or _Owned()
            held = [file.num_bytes for file in owned.files.values() if file.expires_at_s > now_s]
            if len(held) + owned.num_arriving + num_files > MAX_FILES_PER_OWNER:
                raise StorageFull(f"There are {MAX_FILES_PER_OWNER} files already; delete some.")
            if sum(held) + owned.num_bytes_arriving + num_bytes > self._max_bytes_per_owner:
                raise StorageFull(
                    f"All files together may have {self._max_bytes_per_owner} bytes; delete some."
                )
            owned.num_arriving += num_files
            owned.num_bytes_arriving += num_bytes
            self._owned[owner] = owned

    def _release(self, owner: str, *, num_files: int = 0, num_bytes: int = 0) -> None:
        with self._lock:
            self._owned[owner].num_arriving -= num_files
            self._owned[owner].num_bytes_arriving -= num_bytes
            self._drop_if_empty(owner)

    def _add(self, file: StoredFile) -> None:
        """What was arriving is now a file."""
        with self._lock:
            self._owned[file.owner].files[file.id] = file
            self._owned[file.owner].num_arriving -= 1
            self._owned[file.owner].num_bytes_arriving -= file.num_bytes


class FileWriter:
    """A file while it arrives, made by `FileStore.begin`.

    It must end in `finish` or `discard`. A second end does nothing to the first, so that `discard`
    may be called whatever happened, also while another thread still writes: it waits for it.
    """

    def __init__(self, store: FileStore, folder: Path, owner: str, file_id: str) -> None:
        self._store = store
        self._owner = owner
        self._id = file_id
        self._path = folder / file_id
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._is_ended = False
        self._file = _new_file(_with_suffix(self._path, _UNFINISHED))
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """StorageFull where the owner or the disk has no room for it."""
        with self._lock:
            self._check_running()
            self._store._reserve(self._owner, num_bytes=len(data))
            self.num_bytes += len(data)
            self._digest.update(data)
            with asking_for_room():
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]

    def finish(self, *, filename: str, purpose: str, ttl_s: float | None = None) -> StoredFile:
        """The file, which exists from now on. A `ttl_s` may only shorten the store's."""
        with self._lock:
            self._check_running()
            now_s = self._store.now_s()
            stored = StoredFile(
                id=self._id,
                owner=self._owner,
                filename=filename,
                purpose=purpose,
                num_bytes=self.num_bytes,
                digest=self._digest.hexdigest(),
                created_at_s=now_s,
                expires_at_s=now_s + min(ttl_s or self._store.ttl_s, self._store.ttl_s),
            )
            with asking_for_room():
                self._file.close()
                self._publish(msgspec.json.encode(stored))
            self._is_ended = True
            self._store._add(stored)
            return stored

    def _publish(self, description: bytes) -> None:
        unfinished = _with_suffix(self._path, _DESCRIPTION + _UNFINISHED)
        with _new_file(unfinished) as file:
            rest = memoryview(description)
            while rest:
                rest = rest[file.write(rest) :]
        os.rename(_with_suffix(self._path, _UNFINISHED), self._path)
        os.rename(unfinished, _with_suffix(self._path, _DESCRIPTION))

    def discard(self) -> None:
        """Leave nothing of the file behind, unless it is finished."""
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
            self._store._release(self._owner, num_files=1, num_bytes=self.num_bytes)
            # Removed first: closing may fail where the disk is full.
            _remove(self._path)
            self._file.close()

    def _check_running(self) -> None:
        if self._is_ended:
            raise ValueError("the file has been finished or discarded")


# On disk ------------------------------------------------------------------------------------------


def _new_id() -> str:
    return "file-" + "".join(secrets.choice(_ALPHABET) for _ in range(_ID_CHARS))


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.parent / (path.name + suffix)


def _new_file(path: Path) -> FileIO:
    return FileIO(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))


def _remove(path: Path) -> None:
    """Everything of one file; its description first, because with that it exists."""
    for suffix in (_DESCRIPTION, "", _UNFINISHED, _DESCRIPTION + _UNFINISHED):
        _with_suffix(path, suffix).unlink(missing_ok=True)


def _take_up(folder: Path) -> Iterator[StoredFile]:
    """The files of an earlier process. Removes what it left half done and what is damaged.

    What does not have a name of ours is somebody else's and stays as it is.
    """
    names = {entry.name for entry in os.scandir(folder)}
    for file_id in sorted({name.partition(".")[0] for name in names}):
        if not _ID.fullmatch(file_id):
            continue
        path = folder / file_id
        try:
            if file_id + _DESCRIPTION not in names:
                _remove(path)
            elif (file := _described(path)) is not None:
                yield file
            else:
                logger.warning("an uploaded file is damaged and is removed")
                _remove(path)
        except OSError as error:
            logger.warning("an uploaded file is left out: %s", error.strerror)


def _described(path: Path) -> StoredFile | None:
    """None where bytes and description are not what `FileWriter` wrote."""
    try:
        descriptor = os.open(
            _with_suffix(path, _DESCRIPTION), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        )
        with FileIO(descriptor) as file:
            description = file.read(_MAX_DESCRIPTION_BYTES)
        stored = msgspec.json.decode(description, type=StoredFile)
        status = path.lstat()
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    is_ours = stored.id == path.name and stat.S_ISREG(status.st_mode)
    return stored if is_ours and stored.num_bytes == status.st_size else None
