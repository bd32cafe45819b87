"""From the media parts of one request to tiles: found, fetched, decoded and cut side by side.

What a part says goes one way: its sources become a file of encoded bytes, the file goes to a
decoder process, tiles come back. The first failure ends what still runs for the request, unless its
part says that it may go on without. Must not know prompts or what the tiles are for.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from server.chat.options import NO_OPTIONS, MediaOptions, check_kind, check_limits, check_together
from server.chat.parts import MediaPart
from server.chat.planner import Rung, plan
from server.config import MediaConfig
from server.core import MediaKind, Tiles, VisionInput, VisionSpec
from server.decoding.jobs import Decoded, FramesJob, ImageJob, Job, Probed, VideoJob
from server.errors import (
    ArrayTooLong,
    AttachmentNotFound,
    EmptyMediaFile,
    FileNotFound,
    InvalidRequest,
    InvalidStretch,
    MediaError,
    MediaFileTooLarge,
    ServerError,
)
from server.media.cache import MediaCache, cache_key
from server.media.fetch import Fetched
from server.media.file import MediaFile, MediaFileWriter
from server.media.formats import sniff_video
from server.media.inline import frame_list, is_frame_list, read_source, source_form
from server.media.kinds import max_bytes
from server.media.local import open_local
from server.media.store import FileStore, owner_digest
from server.vision.frames import video_layout
from server.vision.tiles import image_layout

MAX_LISTED_SOURCES = 1_024
"""In one list of frames. More come as one file, or as one data: URL."""

FRAMES_AT_ONCE = 4
"""Sources of a list that are got together: each may be as large as a whole video."""

SNIFFED_BYTES = 64
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LEAST_STRETCH_S = 0.001
FRAMES_PER_S = 1.0
"""Of a list of frames that says no rate."""

CacheOutcome = Literal["hit", "bytes", "miss"]
"""Finished tiles were there; or only the encoded bytes; or neither."""

Stage = Literal["fetch", "decode"]

OF_THE_MEDIUM = (MediaError, FileNotFound, AttachmentNotFound, InvalidStretch)
"""Errors of a medium and not of its request: `on_error` may make do without it."""

_T = TypeVar("_T")
_Error = TypeVar("_Error", bound=ServerError)

_log = logging.getLogger(__name__)


class Attachments(Protocol):
    """Media that come in the body of the request, after what refers to them."""

    async def get(self, name: str) -> MediaFile:
        """Waits until it is there. AttachmentNotFound where the body ends without it."""


class Fetcher(Protocol):
    """See `server.media.fetch`."""

    async def fetch(
        self, url: str, *, kind: MediaKind, tenant: str, cache_salt: str
    ) -> Fetched: ...

    async def close(self) -> None: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_cached_bytes(self) -> int: ...


class Decoders(Protocol):
    """See `server.decoding.pool`."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    @property
    def num_replaced(self) -> int: ...

    @property
    def missing_protections(self) -> tuple[str, ...]: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def decode(self, job: Job, file: MediaFile, *, tenant: str) -> Decoded: ...

    async def probe(self, job: Job, file: MediaFile, *, tenant: str) -> Probed: ...


@dataclass(frozen=True, slots=True)
class MediaReport:
    """What is told of one medium. Sizes in pixels of the upright picture; times in seconds.

    `grids` are the tiles beside a picture's thumbnail. One that was left out has an error's code
    and no tokens.
    """

    path: str
    kind: MediaKind
    size: tuple[int, int] | None = None
    duration_s: float | None = None
    num_frames: int | None = None
    num_grids: int | None = None
    num_tokens: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    cache: CacheOutcome = "miss"
    fetch_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0
    error_code: str | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or video ready for the engine."""

    part: MediaPart
    vision: VisionInput
    tiles: Tiles
    report: MediaReport


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One that could not be used, and that its request can do without."""

    part: MediaPart
    report: MediaReport


@dataclass(frozen=True, slots=True)
class _Obtained:
    """Encoded bytes. Those of a list lie one after another, `frame_lengths` bytes each."""

    file: MediaFile
    is_cached: bool = False
    frame_lengths: tuple[int, ...] | None = None
    fetch_s: float = 0.0


class MediaReader:
    """Makes a `Reading` for each request; owns the threads for what blocks, and finished tiles."""

    def __init__(
        self,
        config: MediaConfig,
        spec: VisionSpec,
        *,
        fetcher: Fetcher,
        decoders: Decoders,
        files: FileStore | None = None,
    ) -> None:
        self.config = config
        self.spec = spec
        self.fetcher = fetcher
        self.decoders = decoders
        self.files = files
        # Half of the cache is for encoded bytes, which the fetcher keeps.
        self.finished: MediaCache[Decoded] = MediaCache(
            max_bytes=config.cache_bytes // 2, ttl_s=config.cache_ttl_s
        )
        self.secret = os.urandom(32)  # nobody can compute the keys of what is kept
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="media")
        # Apart, so that a disk that hangs holds up nobody who needs none.
        self._disk_threads = ThreadPoolExecutor(2, thread_name_prefix="media-disk")
        self.num_blocking = 0
        """Calls in those threads, or waiting for one."""

    def begin(
        self, *, tenant: str, cache_salt: str = "", attachments: Attachments | None
    ) -> Reading:
        return Reading(self, tenant=tenant, cache_salt=cache_salt, attachments=attachments)

    async def run(self, work: Callable[[], _T], *, on_disk: bool = False) -> _T:
        """In a thread: base64, hashing and copying, or what may wait for a disk."""
        threads = self._disk_threads if on_disk else self._threads
        self.num_blocking += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        finally:
            self.num_blocking -= 1

    async def start(self) -> None:
        """Returns when media can be decoded. ConfigError where they cannot."""
        await self.decoders.start()
        if self.decoders.missing_protections:
            missing = ", ".join(self.decoders.missing_protections)
            _log.warning("this machine denies decoders some protections: %s", missing)

    async def stop(self) -> None:
        """End what still runs, and the decoders."""
        await self.fetcher.close()
        await self.decoders.close()
        for threads in (self._threads, self._disk_threads):
            threads.shutdown(wait=False, cancel_futures=True)


class Reading:
    """The media of one request."""

    def __init__(
        self,
        reader: MediaReader,
        *,
        tenant: str,
        cache_salt: str,
        attachments: Attachments | None,
    ) -> None:
        self._reader = reader
        self._config = reader.config
        self._tenant = tenant
        self._cache_salt = cache_salt
        self._attachments = attachments
        self._slots = asyncio.Semaphore(reader.config.max_fetches_per_request)
        self._num_bytes = 0
        self._obtained: dict[str, _Obtained | ServerError] = {}

    async def kinds(self, parts: Sequence[MediaPart]) -> dict[str, MediaPart]:
        """The parts whose kind only the bytes could tell, with their kinds, by path."""
        unknown = [part for part in parts if not part.is_kind_known]
        known = await together([self._with_kind(part) for part in unknown])
        return {part.path: part for part in known}

    async def read(
        self, parts: Sequence[MediaPart], options: MediaOptions, *, token_budget: int | None = None
    ) -> list[Medium | LeftOut]:
        """Everything in the order of the parts; of several failures one is raised.

        `options` are the request's own. With a budget all sizes are known before the first medium
        is decoded; without one each goes its own way.
        """
        jobs = [self._options(part, options) for part in parts]
        if token_budget is None:
            return await together(
                [self._read(part, said) for part, said in zip(parts, jobs, strict=True)]
            )
        ladders = await together(
            [self._ladder(part, said) for part, said in zip(parts, jobs, strict=True)]
        )
        planned = plan([ladder for ladder in ladders if isinstance(ladder, list)], token_budget)
        if planned is None:
            least = sum(ladder[-1].tokens for ladder in ladders if isinstance(ladder, list))
            raise InvalidRequest(
                f"The media of this request take at least {least} tokens.",
                param="media_options.visual_token_budget",
            )
        rungs = iter(planned)
        return await together(
            [
                self._read(part, _limited(said, part.kind, next(rungs)))
                if isinstance(ladder, list)
                else _resolved(ladder)
                for part, said, ladder in zip(parts, jobs, ladders, strict=True)
            ]
        )

    async def _with_kind(self, part: MediaPart) -> MediaPart:
        part = replace(part, kind=_likely_kind(part), is_kind_known=True)
        try:
            obtained = await self._obtain(part)
        except OF_THE_MEDIUM:
            if part.on_error == "fail":
                raise
            return part  # `read` meets it again, and leaves it out
        head = await self._reader.run(partial(obtained.file.head, SNIFFED_BYTES), on_disk=True)
        # A GIF is a picture here; as a video it is asked for by name.
        is_video = obtained.frame_lengths is not None or sniff_video(head) not in (None, "gif")
        part = replace(part, kind="video" if is_video else "image")
        check_kind(part.options, part.kind, f"{part.path}.media_options")
        try:
            _check_bytes(obtained.file, part.kind, self._config)
        except MediaError as error:
            told = _named(error, part, "fetch")
            if part.on_error == "fail":
                raise told from None
            self._obtained[part.path] = told
        return part

    def _options(self, part: MediaPart, options: MediaOptions) -> MediaOptions:
        """The part's own before the request's; refused where they go beyond the checkpoint."""
        said = part.options.over(options)
        path = f"{part.path}.media_options" if part.options != NO_OPTIONS else "media_options"
        check_together(said, path)
        check_limits(part.options, self._reader.spec, path)
        return said

    async def _read(self, part: MediaPart, options: MediaOptions) -> Medium | LeftOut:
        try:
            return await self._read_or_raise(part, options)
        except OF_THE_MEDIUM as error:
            if part.on_error == "fail":
                raise
            return _left_out(part, error.code)

    async def _read_or_raise(self, part: MediaPart, options: MediaOptions) -> Medium:
        obtained = await self._obtain(part)
        job = _job(part, obtained, options)
        key = self._key(job, obtained)
        decoded = self._reader.finished.get(key)
        is_finished = decoded is not None
        if decoded is None:
            work = self._reader.decoders.decode(job, obtained.file, tenant=self._tenant)
            decoded = await _told_of(part, "decode", work)
            self._reader.finished.put(key, decoded, decoded.tiles.nbytes)
        report = MediaReport(
            path=part.path,
            kind=part.kind,
            size=decoded.size,
            duration_s=decoded.duration_s,
            num_frames=decoded.num_frames,
            num_grids=len(decoded.tiles) - 1 if part.kind == "image" else None,
            num_tokens=decoded.vision.num_tokens,
            options=_effective(job, decoded, self._reader.spec),
            cache="hit" if is_finished else "bytes" if obtained.is_cached else "miss",
            fetch_s=obtained.fetch_s,
            decode_s=0.0 if is_finished else decoded.decode_s,
            preprocess_s=0.0 if is_finished else decoded.preprocess_s,
        )
        return Medium(part, decoded.vision, decoded.tiles, report)

    async def _ladder(self, part: MediaPart, options: MediaOptions) -> list[Rung] | LeftOut:
        """The sizes a medium can have, largest first."""
        try:
            obtained = await self._obtain(part)
            job = _job(part, obtained, options)
            work = self._reader.decoders.probe(job, obtained.file, tenant=self._tenant)
            probed = await _told_of(part, "decode", work)
        except OF_THE_MEDIUM as error:
            if part.on_error == "fail":
                raise
            return _left_out(part, error.code)
        if part.kind == "image":
            return _picture_sizes(probed, options, self._reader.spec)
        return _video_sizes(probed, self._reader.spec)

    def _key(self, job: Job, obtained: _Obtained) -> str:
        spec = msgspec.json.encode(self._reader.spec)
        return cache_key(
            self._tenant,
            self._cache_salt,
            type(job).__name__,
            msgspec.json.encode(job),
            spec,
            obtained.file.digest,
            secret=self._reader.secret,
        )

    async def _obtain(self, part: MediaPart) -> _Obtained:
        """The part's encoded bytes, or why there are none; found once."""
        if part.path not in self._obtained:
            started_s = time.monotonic()
            try:
                found = await _told_of(part, "fetch", self._find(part))
                self._obtained[part.path] = replace(found, fetch_s=time.monotonic() - started_s)
            except ServerError as error:
                self._obtained[part.path] = error.with_traceback(None)
        obtained = self._obtained[part.path]
        if isinstance(obtained, ServerError):
            raise copy.copy(obtained)
        return obtained

    async def _find(self, part: MediaPart) -> _Obtained:
        if part.is_list:
            return await self._find_frames(part)
        (source,) = part.sources
        if part.kind == "video" and is_frame_list(source):
            frames = await self._reader.run(partial(frame_list, source, self._config))
            file = await self._reader.run(lambda: MediaFile.of_bytes(b"".join(frames)))
            self._count_bytes(part, file.num_bytes)
            return _Obtained(file, frame_lengths=tuple(map(len, frames)))
        return _Obtained(*await self._find_source(part, source))

    async def _find_frames(self, part: MediaPart) -> _Obtained:
        """A few at a time, each added to the file of all: so many files are never open together."""
        if len(part.sources) > MAX_LISTED_SOURCES:
            raise ArrayTooLong(
                f"At most {MAX_LISTED_SOURCES} frames are accepted in a list.", param=part.param
            )
        writer = MediaFileWriter()
        lengths: list[int] = []
        num_cached = 0
        for first in range(0, len(part.sources), FRAMES_AT_ONCE):
            sources = part.sources[first : first + FRAMES_AT_ONCE]
            for file, is_cached in await together(
                [self._find_source(part, source) for source in sources]
            ):
                if writer.num_bytes + file.num_bytes > self._config.max_video_bytes:
                    raise MediaFileTooLarge(
                        f"The frames have more than {self._config.max_video_bytes} bytes together.",
                        kind="video",
                    )
                lengths.append(file.num_bytes)
                num_cached += is_cached
                await self._reader.run(partial(_append, writer, file), on_disk=True)
        is_cached = num_cached == len(lengths)
        return _Obtained(writer.finish(), is_cached, frame_lengths=tuple(lengths))

    async def _find_source(self, part: MediaPart, source: str) -> tuple[MediaFile, bool]:
        """What one source stands for, and whether a fetch was spared."""
        kind = part.kind
        form = source_form(source, kind=kind)
        is_cached = False
        if form == "url":
            async with self._slots:
                fetched = await self._reader.fetcher.fetch(
                    source, kind=kind, tenant=self._tenant, cache_salt=self._cache_salt
                )
            file, is_cached = fetched.file, fetched.cache != "miss"
        else:
            file = await self._find_here(form, source, kind)
            _check_bytes(file, kind, self._config)
        self._count_bytes(part, file.num_bytes)
        return file, is_cached

    async def _find_here(self, form: str, source: str, kind: MediaKind) -> MediaFile:
        reader = self._reader
        match form:
            case "local":
                open_it = partial(open_local, source, self._config, kind=kind)
                return await reader.run(open_it, on_disk=True)
            case "file_id":
                if reader.files is None:
                    raise FileNotFound()
                owner = owner_digest(self._tenant)
                return await reader.run(partial(reader.files.open, source, owner), on_disk=True)
            case "attachment":
                if self._attachments is None:
                    raise AttachmentNotFound(
                        "Attachments come with requests sent as multipart/form-data."
                    )
                return await self._attachments.get(source.removeprefix("attachment:"))
            case _:
                return await reader.run(
                    lambda: MediaFile.of_bytes(read_source(source, self._config, kind=kind))
                )

    def _count_bytes(self, part: MediaPart, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._config.max_request_bytes:
            raise MediaFileTooLarge(
                "The media of one request may have at most "
                f"{self._config.max_request_bytes} bytes together.",
                kind=part.kind,
            )


async def together(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results in order. The first failure ends the others, which are waited for.

    An error holds the frames it went through. Where one of them held the error in turn, the files
    of a failed request would stay open until somebody collects garbage; so none does.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        error = next(filter(None, map(_error_of, tasks)), None)
        if error is None:
            return [task.result() for task in tasks]
    finally:
        await _end(tasks)
        tasks.clear()
    try:
        raise error
    finally:
        del error


async def _end(tasks: Sequence[asyncio.Future[_T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _error_of(task: asyncio.Future[_T]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


async def _resolved(value: _T) -> _T:
    return value


async def _told_of(part: MediaPart, stage: Stage, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`; an error of it names the part and the stage."""
    try:
        return await work
    except ServerError as error:
        told = _named(error, part, stage)
    try:
        raise told
    finally:
        del told  # for the reason that `together` gives


def _named(error: _Error, part: MediaPart, stage: Stage) -> _Error:
    """A copy, because others may be told the same error."""
    told = copy.copy(error)
    if isinstance(told, InvalidStretch):
        is_own = part.options.start_s is not None or part.options.end_s is not None
        told.param = f"{part.path}.media_options" if is_own else "media_options"
    if isinstance(told, OF_THE_MEDIUM):
        told.param = told.param or part.param
        told.message = f"{part.path}, {stage}: {told.message}"
    return told


def _left_out(part: MediaPart, error_code: str) -> LeftOut:
    return LeftOut(part, MediaReport(part.path, part.kind, error_code=error_code))


def _likely_kind(part: MediaPart) -> MediaKind:
    """What a part is taken for until its bytes say it: by what it is declared to be."""
    (source,) = part.sources
    declared = source[:SNIFFED_BYTES].lstrip().lower()
    if declared.startswith("data:"):
        return "video" if declared.startswith("data:video/") else "image"
    path = source[-SNIFFED_BYTES:].partition("?")[0]
    names = (path.lower(), part.hints.filename.lower())
    is_inline = source_form(source, kind="image") == "inline"
    if any(name.endswith(VIDEO_SUFFIXES) for name in names):
        return "video"
    # The larger limit, except for what has none of its own to tell it by.
    return "image" if is_inline and part.hints.filename else "video"


def _check_bytes(file: MediaFile, kind: MediaKind, config: MediaConfig) -> None:
    limit = max_bytes(config, kind)
    if file.num_bytes > limit:
        raise MediaFileTooLarge(
            f"The {kind} has {file.num_bytes} bytes; the limit is {limit}.", kind=kind
        )
    if not file.num_bytes:
        raise EmptyMediaFile(f"The {kind} is empty.", kind=kind)


def _append(writer: MediaFileWriter, file: MediaFile) -> None:
    writer.write(file.read())


def _job(part: MediaPart, obtained: _Obtained, options: MediaOptions) -> Job:
    if part.kind == "image":
        detail: Literal["low", "high"] = "low" if options.detail == "low" else "high"
        return ImageJob(detail=detail, max_grids=options.max_grids)
    if obtained.frame_lengths is not None:
        return FramesJob(
            lengths=obtained.frame_lengths,
            fps=options.fps or FRAMES_PER_S,
            num_frames=options.num_frames,
            max_frames=options.max_frames,
            start_s=options.start_s,
            end_s=options.end_s,
        )
    return VideoJob(
        fps=options.fps,
        num_frames=options.num_frames,
        max_frames=options.max_frames,
        start_s=options.start_s,
        end_s=options.end_s,
    )


def _effective(job: Job, decoded: Decoded, spec: VisionSpec) -> dict[str, object]:
    """The values that held in the end, whoever set them."""
    if isinstance(job, ImageJob):
        return {
            "detail": "low" if len(decoded.tiles) == 1 else "high",
            "max_grids": min(job.max_grids or spec.max_grids, spec.max_grids),
        }
    start_s, duration_s = job.start_s or 0.0, decoded.duration_s or 0.0
    end_s = duration_s if job.end_s is None else min(job.end_s, duration_s)
    seen_s = end_s - start_s
    return {
        "start_s": start_s,
        "end_s": end_s,
        # Of a moment there is no rate.
        "fps": round((decoded.num_frames or 0) / seen_s, 3) if seen_s >= LEAST_STRETCH_S else None,
        "num_frames": job.num_frames,
        "max_frames": min(job.max_frames or spec.max_frames, spec.max_frames),
    }


def _limited(options: MediaOptions, kind: MediaKind, rung: Rung) -> MediaOptions:
    if rung.limit is None:
        return options
    if kind == "video":
        return replace(options, max_frames=rung.limit)
    if rung.limit == 0:
        return replace(options, detail="low")
    return replace(options, max_grids=rung.limit)


def _picture_sizes(probed: Probed, options: MediaOptions, spec: VisionSpec) -> list[Rung]:
    def rung(max_grids: int) -> Rung:
        detail: Literal["low", "high"] = "high" if max_grids else "low"
        layout = image_layout(probed.size, spec, detail=detail, max_grids=max_grids or None)
        return Rung(layout.num_tokens, max_grids)

    most = (
        0 if options.detail == "low" else min(options.max_grids or spec.max_grids, spec.max_grids)
    )
    return _falling([rung(max_grids) for max_grids in range(most, -1, -1)])


def _video_sizes(probed: Probed, spec: VisionSpec) -> list[Rung]:
    """From the frames that would be taken without a budget down to one."""
    most = max(1, min(probed.num_frames or 1, spec.max_frames))
    return _falling(
        [Rung(video_layout(count, spec).num_tokens, count) for count in range(most, 0, -1)]
    )


def _falling(rungs: list[Rung]) -> list[Rung]:
    """Without those that are no smaller than the one before; the first is no limit."""
    kept = [Rung(rungs[0].tokens, None)]
    for rung in rungs:
        if rung.tokens < kept[-1].tokens:
            kept.append(rung)
    return kept
