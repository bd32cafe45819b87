"""multipart/form-data as it arrives: events for each piece, and attachments of a chat request.

Nothing is held that was not asked for: a part's bytes are handed on as they come. What follows the
closing boundary is ignored. Must not know what parts mean beyond their names.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import unicodedata
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from starlette.types import Message, Receive

from server.api.middleware import ClientGone
from server.errors import AttachmentNotFound, InvalidRequest, MediaFileTooLarge, quoted
from server.media.file import MediaFile, MediaFileWriter

Result = TypeVar("Result")

MAX_BOUNDARY_CHARS: Final = 70
MAX_NAME_CHARS: Final = 255
MAX_HEADERS: Final = 16
MAX_HEADER_BYTES: Final = 16 * 1024
WRITE_BYTES: Final = 1024 * 1024
"""Bytes are written to disk in pieces of about this size."""

_MALFORMED: Final = (
    "The request body is not well-formed multipart/form-data, "
    "or the headers of a part are too long or too many."
)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", re.ASCII)
_PARAMETER = re.compile(
    r";[ \t]*([0-9A-Za-z!#$%&'*+.^_`|~-]+)=(?:\"([^\"\\]*+(?:\\.[^\"\\]*+)*+)\"|([^\s;\"]+))[ \t]*",
    re.DOTALL,
)
_EXTENDED = re.compile(r"(utf-8|iso-8859-1)'[A-Za-z0-9-]*'([!#$&+.^_`|~0-9A-Za-z%-]*)", re.I | re.A)
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})", re.ASCII)
# A backslash before anything else stands for itself: browsers do not escape it.
_ESCAPED = re.compile(r'\\(["\\])')
_IDENTITY_ENCODINGS = frozenset({"", "7bit", "8bit", "binary"})


# The form as events -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartBegin:
    """`filename` without folders; None where the part is no file. `content_type` in lower case."""

    name: str
    filename: str | None
    content_type: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    pass


@dataclass(frozen=True, slots=True)
class End:
    """The closing boundary has come."""


Event: TypeAlias = PartBegin | PartData | PartEnd | End


class MultipartReader:
    """Turns a body that arrives in any pieces into events; InvalidRequest where it is malformed.

    No two parts have the same name (compared in NFC). After an error the reader is of no use.
    """

    def __init__(self, content_type: str, *, max_parts: int) -> None:
        """`content_type` is the request's, known to be multipart/form-data."""
        boundary = _boundary(content_type)
        self._max_parts = max_parts
        self._events: list[Event] = []
        self._names: set[str] = set()
        self._num_parts = 0
        self._headers: dict[str, str] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._num_header_bytes = 0
        self._opening = b"--" + boundary
        self._held: bytes | None = b""  # of the opening boundary, until it is complete
        self.is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> list[Event]:
        """What the next bytes of the body complete."""
        if self._held is not None:
            chunk = self._without_preamble(self._held + chunk)
        if chunk and not self.is_complete:
            try:
                self._parser.write(chunk)
            except FormParserError:
                raise InvalidRequest(_MALFORMED) from None
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """To be called when the body has ended; InvalidRequest where something is missing."""
        if not self.is_complete:
            raise InvalidRequest("The multipart body ends before its closing boundary.")

    def _without_preamble(self, start: bytes) -> bytes:
        """Nothing until the boundary is whole: the parser's own rule depends on the pieces."""
        if not start.startswith(self._opening[: len(start)]):
            raise InvalidRequest("The multipart body must begin with its boundary.")
        is_held = len(start) < len(self._opening)
        self._held = start if is_held else None
        return b"" if is_held else start

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_parts:
            raise InvalidRequest(f"The multipart body has more than {self._max_parts} parts.")
        self._headers = {}
        self._num_header_bytes = 0

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        self._header_value += data[start:end]

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise InvalidRequest(_MALFORMED)

    def _on_header_end(self) -> None:
        name = self._header_name.decode("ascii").lower()  # a token: the parser has checked it
        try:
            value = self._header_value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest("The headers of a part must be UTF-8.") from None
        if name in self._headers:
            raise InvalidRequest("A header of a part stands twice.")
        if _has_control(value.replace("\t", " ")):
            raise InvalidRequest("The headers of a part have control characters.")
        self._headers[name] = value.strip(" \t")
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        encoding = self._headers.get("content-transfer-encoding", "").lower()
        if encoding not in _IDENTITY_ENCODINGS:
            raise InvalidRequest("Parts must be sent as they are, without a transfer encoding.")
        kind, parameters = _parameters(self._headers.get("content-disposition", ""))
        if kind != "form-data" or "name" not in parameters:
            raise InvalidRequest("Each part needs a content-disposition: form-data with a name.")
        name = _checked_name(parameters["name"], what="part")
        if unicodedata.normalize("NFC", name) in self._names:
            raise InvalidRequest(f"There are two parts named {quoted(name)}.")
        self._names.add(unicodedata.normalize("NFC", name))
        media_type = self._headers.get("content-type")
        self._events.append(
            PartBegin(name, _filename(parameters), media_type and media_type.lower())
        )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(PartData(data[start:end]))

    def _on_part_end(self) -> None:
        self._events.append(PartEnd())

    def _on_end(self) -> None:
        self.is_complete = True
        self._events.append(End())


def _boundary(content_type: str) -> bytes:
    try:
        _, parameters = _parameters(content_type)
    except InvalidRequest:
        parameters = {}
    boundary = parameters.get("boundary", "")
    if len(boundary) > MAX_BOUNDARY_CHARS or not _BOUNDARY.fullmatch(boundary):
        raise InvalidRequest(
            f"The content-type needs a boundary of 1 to {MAX_BOUNDARY_CHARS} of the characters "
            "that RFC 2046 allows."
        )
    return boundary.encode("ascii")


def _parameters(header: str) -> tuple[str, dict[str, str]]:
    """`kind; a=b; c="d"` as its kind and its parameters, names in lower case."""
    kind, semicolon, rest = header.partition(";")
    rest = semicolon + rest
    position, found = 0, dict[str, str]()
    # Some senders end the header with a semicolon.
    while rest[position:].strip(" \t;"):
        match = _PARAMETER.match(rest, position)
        if match is None or match[1].lower() in found:
            raise InvalidRequest("A part's content-disposition is malformed.")
        plain, inner = match[3], match[2]
        found[match[1].lower()] = plain if inner is None else _ESCAPED.sub(r"\1", inner)
        position = match.end()
    return kind.strip(" \t").lower(), found


def _filename(parameters: dict[str, str]) -> str | None:
    """The last component of the name that was sent, `filename*` (RFC 5987) before `filename`."""
    if (extended := parameters.get("filename*")) is not None:
        given = _decoded(extended)
    elif (plain := parameters.get("filename")) is not None:
        # How browsers and HTTP clients write the one character that would end the name.
        given = plain.replace("%22", '"')
    else:
        return None
    name = _checked_name(re.split(r"[/\\]", given)[-1], what="file")
    if name in (".", ".."):
        raise InvalidRequest("A file's name must not be '.' or '..'.")
    return name


def _decoded(extended: str) -> str:
    match = _EXTENDED.fullmatch(extended)
    if match is None or _PERCENT.search(match[2]):
        raise InvalidRequest("A filename* must be UTF-8''... with percent escapes (RFC 5987).")
    try:
        return unquote_to_bytes(match[2]).decode(match[1].lower())
    except UnicodeDecodeError:
        raise InvalidRequest("A filename* is not valid in its own character set.") from None


def _checked_name(name: str, *, what: str) -> str:
    """Counted in NFC, so that a decomposed Korean name may be as long as a composed one."""
    if not name or len(unicodedata.normalize("NFC", name)) > MAX_NAME_CHARS:
        raise InvalidRequest(f"The name of a {what} must have 1 to {MAX_NAME_CHARS} characters.")
    if _has_control(name):
        raise InvalidRequest(f"The name of a {what} has control characters.")
    return name


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


# Bytes to disk ------------------------------------------------------------------------------------


class PieceWriter:
    """Hands small pieces to a blocking `write` in large ones, in a thread, never two at once."""

    def __init__(self, write: Callable[[bytes], None], threads: Executor) -> None:
        self._write = write
        self._threads = threads
        self._waiting = bytearray()

    async def add(self, data: bytes) -> None:
        """Raises what `write` raises."""
        self._waiting += data
        if len(self._waiting) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        if self._waiting:
            piece, self._waiting = bytes(self._waiting), bytearray()
            await in_thread(self._threads, lambda: self._write(piece))


async def in_thread(threads: Executor, work: Callable[[], Result]) -> Result:
    """The result of blocking work, without holding up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(threads, work)


# A chat request with attachments ------------------------------------------------------------------

REQUEST_PART: Final = "request"


@dataclass(frozen=True, slots=True)
class AttachmentLimits:
    """`max_request_bytes` is for the JSON, the others for what comes after it."""

    max_attachments: int
    max_attachment_bytes: int
    max_total_bytes: int
    max_request_bytes: int


class Attachments:
    """The parts of a chat request that comes as a form: JSON first, then what it refers to.

    After `read_request` somebody must call `receive` again and again, as whoever waits for the
    client's leaving does: that is what takes in the rest of the body while others wait in `get`.
    What goes wrong there is raised by it, and by every `get` and `finish` from then on. A call of
    `receive` that is cancelled ends the intake. Dropping this leaves no file behind.
    """

    def __init__(
        self,
        receive: Receive,
        content_type: str,
        *,
        spool_folder: Path | None,
        limits: AttachmentLimits,
        threads: Executor,
    ) -> None:
        """Without a `spool_folder` attachments go to the system's folder for temporary files."""
        self._receive = receive
        self._reader = MultipartReader(content_type, max_parts=1 + limits.max_attachments)
        self._folder = spool_folder or Path(tempfile.gettempdir())
        self._limits = limits
        self._threads = threads
        self._request: bytearray | None = None
        self._is_request_complete = False
        self._arriving: _Arriving | None = None
        self._num_bytes = 0
        self._complete: dict[str, MediaFile] = {}
        self._wanted: set[str] = set()
        self._error: Exception | None = None
        self._is_ended = False
        self._changed = asyncio.Event()

    async def read_request(self) -> bytes:
        """The first part, which is to be JSON. ClientGone where the client leaves before it."""
        while not self._is_request_complete:
            if self._is_ended:
                raise InvalidRequest(
                    f"The first part must be named '{REQUEST_PART}'.", param=REQUEST_PART
                )
            if (await self.receive())["type"] == "http.disconnect":
                raise ClientGone()
        request, self._request = bytes(self._request or b""), None
        return request

    async def get(self, name: str) -> MediaFile:
        """The attachment, as soon as it is complete; InvalidRequest where it does not come."""
        key = unicodedata.normalize("NFC", name)
        self._wanted.add(key)
        while self._error is None and key not in self._complete:
            if self._is_ended:
                raise AttachmentNotFound(f"The request has no part named {quoted(name)}.")
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        return self._complete[key]

    async def finish(self) -> None:
        """Waits for the end of the body; InvalidRequest where a part came that no `get` asked for.

        To be called when all `get`s have been called.
        """
        while self._error is None and not self._is_ended:
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        for name in self._complete:
            if name not in self._wanted:
                raise InvalidRequest(f"Nothing in the request refers to the part {quoted(name)}.")

    async def receive(self) -> Message:
        """The next message of the client, its part of the body already taken in."""
        if self._error is not None:
            raise self._error
        try:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._fail(ClientGone())
            elif not self._is_ended:
                await self._take(message)
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._tell_waiting()
        return message

    def _fail(self, error: Exception) -> None:
        """Nobody gets anything any more, so the files go at once."""
        self._error = error
        self._complete.clear()
        self._arriving = None

    def _tell_waiting(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _take(self, message: Message) -> None:
        for event in self._reader.feed(message.get("body", b"")):
            match event:
                case PartBegin():
                    self._begin(event)
                case PartData() if self._arriving is not None:
                    await self._add(self._arriving, event.data)
                case PartData():
                    self._add_to_request(event.data)
                case PartEnd() if self._arriving is not None:
                    self._complete[self._arriving.name] = await self._arriving.finish()
                    self._arriving = None
                    self._tell_waiting()
                case PartEnd():
                    self._is_request_complete = True
        if not message.get("more_body", False):
            self._reader.finish()
            self._is_ended = True

    def _begin(self, part: PartBegin) -> None:
        if self._is_request_complete:
            name = unicodedata.normalize("NFC", part.name)
            self._arriving = _Arriving(name, self._folder, self._threads)
        elif part.name == REQUEST_PART:
            self._request = bytearray()
        else:
            raise InvalidRequest(
                f"The first part must be named '{REQUEST_PART}', not {quoted(part.name)}.",
                param=REQUEST_PART,
            )

    def _add_to_request(self, data: bytes) -> None:
        assert self._request is not None  # a part's data comes between its begin and its end
        self._request += data
        if len(self._request) > self._limits.max_request_bytes:
            raise InvalidRequest(
                f"The part '{REQUEST_PART}' is larger than {self._limits.max_request_bytes} bytes.",
                param=REQUEST_PART,
            )

    async def _add(self, part: _Arriving, data: bytes) -> None:
        self._num_bytes += len(data)
        if part.num_bytes + len(data) > self._limits.max_attachment_bytes:
            raise MediaFileTooLarge(
                f"The part {quoted(part.name)} is larger than "
                f"{self._limits.max_attachment_bytes} bytes.",
                kind="video",
            )
        if self._num_bytes > self._limits.max_total_bytes:
            raise MediaFileTooLarge(
                f"All attachments together are larger than {self._limits.max_total_bytes} bytes.",
                kind="video",
            )
        await part.add(data)


class _Spool:
    """A file for an attachment. Blocking, so opened with the first write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: MediaFileWriter | None = None

    def write(self, data: bytes) -> None:
        self._opened().write(data)

    def finish(self) -> MediaFile:
        return self._opened().finish()

    def _opened(self) -> MediaFileWriter:
        if self._writer is None:
            self._writer = MediaFileWriter(self._folder)
        return self._writer


class _Arriving:
    """An attachment while it arrives."""

    def __init__(self, name: str, folder: Path, threads: Executor) -> None:
        self.name = name
        self.num_bytes = 0
        self._threads = threads
        self._spool = _Spool(folder)
        self._pieces = PieceWriter(self._spool.write, threads)

    async def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        await self._pieces.add(data)

    async def finish(self) -> MediaFile:
        await self._pieces.flush()
        return await in_thread(self._threads, self._spool.finish)
