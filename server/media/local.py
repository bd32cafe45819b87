"""Files of this machine that the operator opened to callers: those under `media.local_root`.

What counts is where a file really is, after every link, and what it really is: a regular file
inside the root. All that is not one reads the same to the caller, whether it is missing, outside or
forbidden. Must not know what a request is or what the bytes mean. Calls block.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from pathlib import Path
from urllib.parse import unquote_to_bytes

from server.config import MediaConfig
from server.errors import EmptyMediaFile, InvalidMediaUrl, MediaError, MediaFileTooLarge
from server.media.file import MediaFile
from server.media.kinds import SourceKind, max_bytes

_REFUSAL = "There is no such local file, or local files are not allowed."
_MAX_PATH_CHARS = 8_192
_PIECE_BYTES = 1024 * 1024
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# Their regular files are not files: a size says nothing there, and reading may do something.
_SYSTEM_FOLDERS = ("/proc", "/sys", "/dev")


def open_local(source: str, config: MediaConfig, *, kind: SourceKind) -> MediaFile:
    """The file a path or a file: URL names; relative paths start at the root.

    InvalidMediaUrl for everything that is not a readable regular file under the root; for one that
    is, EmptyMediaFile or MediaFileTooLarge where it has no bytes or more than its kind may.
    """
    limit = max_bytes(config, kind)
    path = _path_in(source.strip())
    if config.local_root is None or path is None:
        raise InvalidMediaUrl(_REFUSAL, kind=kind)
    try:
        root = os.path.realpath(config.local_root, strict=True)
        descriptor = _opened(_existing(Path(root), path), root)
    except (OSError, ValueError):
        raise InvalidMediaUrl(_REFUSAL, kind=kind) from None
    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes > limit:
            raise MediaFileTooLarge(
                f"The {kind} has {num_bytes} bytes; the limit is {limit}.", kind=kind
            )
        if num_bytes == 0:
            raise EmptyMediaFile(f"The {kind} is empty.", kind=kind)
        return MediaFile(file, num_bytes=num_bytes, digest=_digest(descriptor, num_bytes))
    except OSError:
        file.close()
        raise InvalidMediaUrl(_REFUSAL, kind=kind) from None
    except MediaError:
        file.close()
        raise


def _path_in(source: str) -> str | None:
    """The path that a source spells, None where it spells none of this machine's."""
    if len(source) > _MAX_PATH_CHARS:
        return None
    path = source
    if source[:5].lower() == "file:":
        rest = source[5:]
        if "?" in rest or "#" in rest:
            return None
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            if host.lower() not in ("", "localhost"):
                return None
            rest = slash + rest
        try:
            path = unquote_to_bytes(rest).decode("utf-8")
        except UnicodeError:
            return None
    # Without steps up: whether they lead through a folder outside would tell that it is there.
    is_plain = "\0" not in path and ".." not in path.split("/")
    return path if path and is_plain else None


def _existing(root: Path, path: str) -> Path:
    """The path in the spelling the folders hold: as given, else composed or decomposed.

    One Korean name is different bytes on the systems that write it; a name is tried in each form.
    """
    found = Path("/") if path.startswith("/") else root
    for part in Path(path).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next(
            (found / form for form in forms if os.path.lexists(found / form)), found / part
        )
    return found


def _opened(path: Path, root: str) -> int:
    """A descriptor of a regular file inside the root; OSError for all else."""
    real = os.path.realpath(path, strict=True)
    # Asked before opening too, because opening a device can already do something.
    if not _is_inside(real, root) or not stat.S_ISREG(os.lstat(real).st_mode):
        raise OSError
    descriptor = os.open(real, _OPEN_FLAGS)
    try:
        # A folder may have been swapped for a link meanwhile: what counts is what was opened.
        opened = os.readlink(f"/proc/self/fd/{descriptor}")
        if not _is_inside(opened, root) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_inside(path: str, root: str) -> bool:
    if any(path.startswith(f"{folder}/") for folder in _SYSTEM_FOLDERS):
        return False
    return path.startswith(root.rstrip("/") + "/")


def _digest(descriptor: int, num_bytes: int) -> str:
    """SHA-256 (hex) of the first bytes; OSError where there are fewer."""
    digest = hashlib.sha256()
    start = 0
    while start < num_bytes:
        piece = os.pread(descriptor, min(_PIECE_BYTES, num_bytes - start), start)
        if not piece:
            raise OSError
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()
