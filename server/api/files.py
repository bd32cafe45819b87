"""/v1/files: uploads kept for later requests, in OpenAI's shapes.

An upload goes to disk as it arrives. Each caller sees only its own files. These routes exist where
there is a store for them. Must not know how files are kept, nor what is done with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import Final, Literal, NoReturn, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.content_type import require_multipart
from server.api.json_body import json_response
from server.api.middleware import ClientGone
from server.api.multipart import (
    Event,
    MultipartReader,
    PartBegin,
    PartData,
    PartEnd,
    PieceWriter,
    in_thread,
)
from server.api.sse import SLOW_CLIENT_S, until_client_leaves
from server.errors import (
    FileNotFound,
    InvalidRequest,
    MissingParameter,
    RequestTooLarge,
    StorageFull,
    UnknownParameter,
    quoted,
)
from server.media.file import MediaFile
from server.media.store import FileStore, FileWriter, StoredFile, owner_digest

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

router = APIRouter()

PURPOSES: Final = ("vision", "user_data")
MAX_LISTED: Final = 10_000
EXPIRY_RANGE_S: Final = (3_600, 2_592_000)
SWEEP_EVERY_S: Final = 60.0

_FILE: Final = "file"
_PURPOSE: Final = "purpose"
_ANCHOR: Final = "expires_after[anchor]"
_SECONDS: Final = "expires_after[seconds]"
_FIELDS: Final = (_FILE, _PURPOSE, _ANCHOR, _SECONDS)
_MAX_FIELD_BYTES = 256
_READ_BYTES = 256 * 1024


@router.post("/v1/files")
async def create_file(request: Request) -> Response:
    """Takes the form in, part by part in any order; nothing is left of one that is not whole."""
    content_type = require_multipart(request.headers)
    _check_query(request, ())
    state = request.app.state
    upload = _Upload(
        state.files,
        owner_digest(request.state.tenant),
        max_bytes=state.media.max_video_bytes,
        threads=state.disk_threads,
    )
    try:
        reader = MultipartReader(content_type, max_parts=len(_FIELDS))
        has_more = True
        while has_more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone()
            for event in reader.feed(message.get("body", b"")):
                await upload.take(event)
            has_more = message.get("more_body", False)
        reader.finish()
        return json_response(_file_object(await upload.finish()))
    finally:
        upload.discard()


@router.get("/v1/files")
async def list_files(request: Request) -> Response:
    query = _check_query(request, ("limit", "after", "order", "purpose"))
    purpose, after = query.get("purpose"), query.get("after")
    if purpose is not None:
        _check_purpose(purpose)
    limit = _integer(query.get("limit", str(MAX_LISTED)), 1, MAX_LISTED, param="limit")
    order = _order(query.get("order", "desc"))
    with _named("after", after or ""):
        page = await _from_store(
            request,
            lambda store, owner: store.page(
                owner, limit=limit, purpose=purpose, after=after, order=order
            ),
        )
    return json_response(
        {
            "object": "list",
            "data": [_file_object(file) for file in page.files],
            "first_id": page.files[0].id if page.files else None,
            "last_id": page.files[-1].id if page.files else None,
            "has_more": page.has_more,
        }
    )


@router.get("/v1/files/{file_id}")
async def retrieve_file(request: Request, file_id: str) -> Response:
    _check_query(request, ())
    with _named("file_id", file_id):
        file = await _from_store(request, lambda store, owner: store.get(file_id, owner))
    return json_response(_file_object(file))


@router.get("/v1/files/{file_id}/content")
async def file_content(request: Request, file_id: str) -> Response:
    _check_query(request, ())
    with _named("file_id", file_id):
        stored, content = await _from_store(
            request, lambda store, owner: (store.get(file_id, owner), store.open(file_id, owner))
        )
    threads: Executor = request.app.state.disk_threads
    return _Content(content, filename=stored.filename, threads=threads)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    _check_query(request, ())
    with _named("file_id", file_id):
        await _from_store(request, lambda store, owner: store.delete(file_id, owner))
    return json_response({"id": file_id, "object": "file", "deleted": True})


async def sweep_now_and_then(store: FileStore, threads: Executor) -> NoReturn:
    """Removes what has expired from the disk, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        await in_thread(threads, store.sweep)


class _Upload:
    """One form of POST /v1/files while it arrives."""

    def __init__(self, store: FileStore, owner: str, *, max_bytes: int, threads: Executor) -> None:
        self._store = store
        self._owner = owner
        self._max_bytes = max_bytes
        self._threads = threads
        self._part = ""
        self._filename: str | None = None
        self._texts: dict[str, bytearray] = {}
        self._opening: Future[FileWriter] | None = None
        self._pieces: PieceWriter | None = None
        self._num_bytes = 0

    async def take(self, event: Event) -> None:
        match event:
            case PartBegin():
                await self._begin(event)
            case PartData() if self._part == _FILE:
                await self._add_to_file(event.data)
            case PartData():
                self._texts[self._part] += event.data
                if len(self._texts[self._part]) > _MAX_FIELD_BYTES:
                    raise InvalidRequest(f"The field {self._part} is too long.", param=self._part)
            case PartEnd() if self._part == _PURPOSE:
                _check_purpose(self._text(_PURPOSE))  # before a file that may be large

    async def finish(self) -> StoredFile:
        """The file, once the form has been checked as a whole."""
        opening, pieces, filename = self._opening, self._pieces, self._filename
        if opening is None or pieces is None or filename is None:
            raise MissingParameter("The form needs a file.", param=_FILE)
        if _PURPOSE not in self._texts:
            raise MissingParameter("The form needs a purpose.", param=_PURPOSE)
        if self._num_bytes == 0:
            raise InvalidRequest("The file is empty.", param=_FILE)
        purpose, ttl_s = self._text(_PURPOSE), self._ttl_s()
        await pieces.flush()
        return await in_thread(
            self._threads,
            lambda: opening.result().finish(filename=filename, purpose=purpose, ttl_s=ttl_s),
        )

    def discard(self) -> None:
        """Leave nothing of an upload that has not been finished."""
        if self._opening is not None:
            # Not awaited: this also runs where the request was cancelled.
            self._threads.submit(_discard, self._opening)

    async def _begin(self, part: PartBegin) -> None:
        self._part = part.name
        if part.name not in _FIELDS:
            shown = part.name[:64].encode("ascii", "replace").decode("ascii")
            raise UnknownParameter(f"Unknown form field {quoted(part.name)}.", param=shown)
        if part.name != _FILE:
            self._texts[part.name] = bytearray()
            return
        if part.filename is None:
            raise InvalidRequest("The file needs a file name.", param=_FILE)
        self._filename = part.filename
        self._opening = self._threads.submit(self._store.begin, self._owner)
        writer = await asyncio.wrap_future(self._opening)
        self._pieces = PieceWriter(writer.write, self._threads)

    async def _add_to_file(self, data: bytes) -> None:
        assert self._pieces is not None  # a part's data comes after its begin
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise RequestTooLarge(f"The file is larger than {self._max_bytes} bytes.", param=_FILE)
        await self._pieces.add(data)

    def _text(self, field: str) -> str:
        try:
            return self._texts[field].decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"The field {field} is not UTF-8.", param=field) from None

    def _ttl_s(self) -> float | None:
        """What the form says of expiry; None where it says nothing."""
        if _ANCHOR not in self._texts and _SECONDS not in self._texts:
            return None
        for field in (_ANCHOR, _SECONDS):
            if field not in self._texts:
                raise MissingParameter(f"The form needs {field} too.", param=field)
        if self._text(_ANCHOR) != "created_at":
            raise InvalidRequest(f"{_ANCHOR} must be created_at.", param=_ANCHOR)
        seconds = _integer(self._text(_SECONDS), *EXPIRY_RANGE_S, param=_SECONDS)
        if seconds > self._store.ttl_s:
            raise InvalidRequest(
                f"This server keeps files for at most {self._store.ttl_s:.0f} seconds.",
                param=_SECONDS,
            )
        return seconds


def _discard(opening: Future[FileWriter]) -> None:
    try:
        opening.result().discard()
    except (StorageFull, CancelledError):
        pass  # there never was a file
    except OSError as error:
        logger.error("an unfinished upload cannot be removed: %s", error.strerror)


class _Content(Response):
    """A file's bytes, read a piece at a time in a thread and sent as fast as the client reads."""

    def __init__(self, content: MediaFile, *, filename: str, threads: Executor) -> None:
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(content.num_bytes)
        self.headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(filename, '')}"
        self.headers["x-content-type-options"] = "nosniff"
        self._content = content
        self._threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_client_leaves(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        for offset in range(0, self._content.num_bytes, _READ_BYTES):
            read = partial(self._content.read, offset, _READ_BYTES)
            piece = await in_thread(self._threads, read)
            try:
                async with asyncio.timeout(SLOW_CLIENT_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:
                raise ClientGone() from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _file_object(file: StoredFile) -> dict[str, object]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at_s),
        "expires_at": int(file.expires_at_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


async def _from_store(request: Request, work: Callable[[FileStore, str], Result]) -> Result:
    """What `work` does with the store and the caller's name in it, in a thread."""
    state = request.app.state
    owner = owner_digest(request.state.tenant)
    return await in_thread(state.disk_threads, lambda: work(state.files, owner))


@contextlib.contextmanager
def _named(param: str, file_id: str) -> Iterator[None]:
    """A file that is not found is named to the caller who named it."""
    try:
        yield
    except FileNotFound:
        raise FileNotFound(f"There is no file {quoted(file_id)}.", param=param) from None


def _check_query(request: Request, known: Iterable[str]) -> Mapping[str, str]:
    """The query's parameters; each is known and stands once."""
    given = request.query_params.multi_items()
    found = dict[str, str]()
    for name, value in given:
        shown = name[:64].encode("ascii", "replace").decode("ascii")
        if name not in known:
            raise UnknownParameter(f"Unknown query parameter {quoted(name)}.", param=shown)
        if name in found:
            raise InvalidRequest(f"The query parameter {name} stands twice.", param=shown)
        found[name] = value
    return found


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}.", param=_PURPOSE)


def _order(text: str) -> Literal["asc", "desc"]:
    if text == "asc":
        return "asc"
    if text == "desc":
        return "desc"
    raise InvalidRequest("order must be asc or desc.", param="order")


def _integer(text: str, least: int, most: int, *, param: str) -> int:
    """A canonical decimal within the limits."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    if not is_number or not least <= int(text) <= most:
        raise InvalidRequest(f"{param} must be an integer from {least} to {most}.", param=param)
    return int(text)
