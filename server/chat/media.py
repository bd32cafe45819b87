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
    EmptyMediaFile,
    FileNotFound,
    InvalidMediaUrl,
    InvalidRequest,
    MediaError,
    MediaFileTooLarge,
    ServerError,
)
from server.media.cache import MediaCache, cache_key
from server.media.fetch import Fetched
from server.media.file import MediaFile, MediaFileWriter
from server.media.formats import sniff_video
from server.media.inline import frame_list, is_frame_list, read_source, source_form
from server.media.local import open_local
from server.media.store import FileStore, owner_digest
from server.vision.frames import video_layout
from server.vision.tiles import image_layout

MAX_LISTED_FRAMES = 1_024
"""Sources in one list of frames. More come as one file, or as one data: URL."""

SNIFFED_BYTES = 64
FRAMES_PER_S = 1.0
"""Of a list of frames that says no rate."""

CacheOutcome = Literal["hit", "bytes", "miss"]
"""Finished tiles were there; or only the encoded bytes; or neither."""

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Attachments(Protocol):
    """Media that come in the body of the request, after what refers to them."""

    async def get(self, name: str) -> MediaFile:
        """Waits until it is there. InvalidRequest where the body ends without it."""


class Fetcher(Protocol):
    """See `server.media.fetch`."""

    async def fetch(self, url: str, *, kind: MediaKind, tenant: str) -> Fetched: ...

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
    """Encoded bytes. Those of `frame_lengths` bytes each are the frames of a list."""

    file: MediaFile
    fetch_s: float
    is_cached: bool = False
    frame_lengths: tuple[int, ...] | None = None


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

    def begin(self, *, tenant: str, attachments: Attachments | None) -> Reading:
        return Reading(self, tenant=tenant, attachments=attachments)

    async def run(self, work: Callable[[], _T]) -> _T:
        """In a thread: base64, hashing, and reading from disks."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

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
        self._threads.shutdown(wait=False, cancel_futures=True)


class Reading:
    """The media of one request."""

    def __init__(
        self, reader: MediaReader, *, tenant: str, attachments: Attachments | None
    ) -> None:
        self._reader = reader
        self._config = reader.config
        self._tenant = tenant
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
        try:
            obtained = await self._obtain(part)
        except (MediaError, FileNotFound):
            if part.on_error == "fail":
                raise
            return replace(part, is_kind_known=True)  # `read` meets it again, and leaves it out
        head = await self._reader.run(partial(obtained.file.head, SNIFFED_BYTES))
        # A GIF is a picture here; as a video it is asked for by name.
        kind: MediaKind = "video" if sniff_video(head) not in (None, "gif") else "image"
        check_kind(part.options, kind, f"{part.path}.media_options")
        return replace(part, kind=kind, is_kind_known=True)

    def _options(self, part: MediaPart, options: MediaOptions) -> MediaOptions:
        """The part's own before the request's; refused where they go beyond the checkpoint."""
        said = part.options.over(options)
        path = f"{part.path}.media_options" if part.options != NO_OPTIONS else "media_options"
        check_together(said, path)
        check_limits(said, self._reader.spec, path)
        return said

    async def _read(self, part: MediaPart, options: MediaOptions) -> Medium | LeftOut:
        try:
            return await self._read_or_raise(part, options)
        except (MediaError, FileNotFound) as error:
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
            options=_effective(job, decoded),
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
        except (MediaError, FileNotFound) as error:
            if part.on_error == "fail":
                raise
            return _left_out(part, error.code)
        if part.kind == "image":
            return _picture_sizes(probed, options, self._reader.spec)
        return _video_sizes(probed, options, self._reader.spec)

    def _key(self, job: Job, obtained: _Obtained) -> str:
        spec = msgspec.json.encode(self._reader.spec)
        return cache_key(
            self._tenant,
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
                found = await _told_of(part, "fetch", self._found(part))
                self._obtained[part.path] = replace(found, fetch_s=time.monotonic() - started_s)
            except ServerError as error:
                self._obtained[part.path] = error.with_traceback(None)
        obtained = self._obtained[part.path]
        if isinstance(obtained, ServerError):
            raise copy.copy(obtained)
        return obtained

    async def _found(self, part: MediaPart) -> _Obtained:
        found = await self._find(part)
        self._count_bytes(part, found.file.num_bytes)
        return found

    async def _find(self, part: MediaPart) -> _Obtained:
        if len(part.sources) > MAX_LISTED_FRAMES:
            raise ArrayTooLong(f"At most {MAX_LISTED_FRAMES} frames are accepted in a list.")
        if part.kind == "video" and len(part.sources) == 1 and is_frame_list(part.sources[0]):
            frames = await self._reader.run(partial(frame_list, part.sources[0], self._config))
            return await self._reader.run(partial(_joined, frames, self._config))
        found = await together([self._find_source(part, source) for source in part.sources])
        is_cached = all(is_cached for _, is_cached in found)
        if part.is_list:
            files = [file for file, _ in found]
            joined = await self._reader.run(
                lambda: _joined([file.read() for file in files], self._config)
            )
            return replace(joined, is_cached=is_cached)
        return _Obtained(found[0][0], 0.0, is_cached)

    async def _find_source(self, part: MediaPart, source: str) -> tuple[MediaFile, bool]:
        """The file that one source stands for, and whether a fetch was spared."""
        kind = part.kind
        form = source_form(source, kind=kind)
        if form == "url":
            async with self._slots:
                fetched = await self._reader.fetcher.fetch(source, kind=kind, tenant=self._tenant)
            return fetched.file, fetched.cache != "miss"
        file = await self._find_here(form, source, kind)
        limit = self._config.max_image_bytes
        if kind == "video" or not part.is_kind_known:
            limit = self._config.max_video_bytes
        if file.num_bytes > limit:
            raise MediaFileTooLarge(
                f"The {kind} has {file.num_bytes} bytes; the limit is {limit}.", kind=kind
            )
        if not file.num_bytes:
            raise EmptyMediaFile(f"The {kind} is empty.", kind=kind)
        return file, False

    async def _find_here(self, form: str, source: str, kind: MediaKind) -> MediaFile:
        reader = self._reader
        match form:
            case "local":
                return await reader.run(partial(open_local, source, self._config, kind=kind))
            case "file_id":
                if reader.files is None:
                    raise FileNotFound()
                owner = owner_digest(self._tenant)
                return await reader.run(partial(reader.files.open, source, owner))
            case "attachment":
                if self._attachments is None:
                    raise InvalidMediaUrl(
                        "Attachments come with requests sent as multipart/form-data.", kind=kind
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
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        tasks.clear()
    try:
        raise error
    finally:
        del error


def _error_of(task: asyncio.Future[_T]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


async def _resolved(value: _T) -> _T:
    return value


async def _told_of(
    part: MediaPart, stage: Literal["fetch", "decode"], work: Coroutine[Any, Any, _T]
) -> _T:
    """The result of `work`; an error of it names the part and the stage.

    A copy, because others may be told the same error, and for the reason that `together` gives.
    """
    try:
        return await work
    except ServerError as error:
        told = copy.copy(error)
    told.param = told.param or part.param
    if isinstance(told, MediaError | FileNotFound):
        told.message = f"{part.path}, {stage}: {told.message}"
    try:
        raise told
    finally:
        del told


def _left_out(part: MediaPart, error_code: str) -> LeftOut:
    return LeftOut(part, MediaReport(part.path, part.kind, error_code=error_code))


def _joined(frames: Sequence[bytes], config: MediaConfig) -> _Obtained:
    num_bytes = sum(map(len, frames))
    if num_bytes > config.max_video_bytes:
        raise MediaFileTooLarge(
            f"The frames have {num_bytes} bytes; the limit is {config.max_video_bytes}.",
            kind="video",
        )
    writer = MediaFileWriter()
    for frame in frames:
        writer.write(frame)
    return _Obtained(writer.finish(), 0.0, frame_lengths=tuple(map(len, frames)))


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


def _effective(job: Job, decoded: Decoded) -> dict[str, object]:
    """The values that held in the end, whoever set them."""
    if isinstance(job, ImageJob):
        return {
            "detail": "low" if len(decoded.tiles) == 1 else "high",
            "max_grids": job.max_grids,
        }
    start_s, duration_s = job.start_s or 0.0, decoded.duration_s or 0.0
    end_s = duration_s if job.end_s is None else min(job.end_s, duration_s)
    seen_s = end_s - start_s
    return {
        "start_s": start_s,
        "end_s": end_s,
        "fps": round((decoded.num_frames or 0) / seen_s, 3) if seen_s > 0 else None,
        "max_frames": job.max_frames,
    }


def _limited(options: MediaOptions, kind: MediaKind, rung: Rung) -> MediaOptions:
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


def _video_sizes(probed: Probed, options: MediaOptions, spec: VisionSpec) -> list[Rung]:
    most = probed.num_frames or 1
    return _falling(
        [Rung(video_layout(count, spec).num_tokens, count) for count in range(most, 0, -1)]
    )


def _falling(rungs: list[Rung]) -> list[Rung]:
    """Without those that are no smaller than the one before."""
    kept: list[Rung] = []
    for rung in rungs:
        if not kept or rung.tokens < kept[-1].tokens:
            kept.append(rung)
    return kept
