"""`DecoderPool`: pictures and videos to tiles, in processes that may be lost at any time.

A few decoders are kept ready. Each serves one tenant at most and is replaced when another one's
turn comes, after anything that went wrong, and after a number of jobs. Of what a decoder gives back
only bytes of the agreed length are used: what they mean is computed here once more.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np

from server.config import MediaConfig
from server.core import Tiles, VisionInput, VisionLayout, VisionSpec
from server.decoding.jobs import Decoded, FramesJob, ImageJob, Job, Probed, kind_of
from server.decoding.messages import Answer, ErrorName, Start, task_of
from server.decoding.processes import ENTRY_MODULE, Decoder, DecoderLost, Forker, ForkerLost
from server.errors import (
    ConfigError,
    InvalidStretch,
    MediaError,
    MediaTooLarge,
    RateLimited,
    ServerError,
    ShuttingDown,
    Unavailable,
    UnsupportedMediaType,
)
from server.line import Line
from server.media.file import MediaFile
from server.media.kinds import MAX_LISTED_FRAMES
from server.media.limits import DecodeLimits
from server.vision.frames import video_layout
from server.vision.tiles import image_layout, max_tiles, vision_input

MAX_JOBS_OF_A_DECODER = 200
MAX_IDLE_S = 5.0
RESTART_DELAY_S = 1.0
_MAX_MESSAGE_CHARS = 300

_MEDIA_ERRORS: dict[ErrorName, type[MediaError]] = {
    "damaged": MediaError,
    "unsupported": UnsupportedMediaType,
    "too large": MediaTooLarge,
}

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Request:
    """A job that waits for a decoder or is with one. A cancelled `result` ends both."""

    job: Job
    file: MediaFile
    tenant: str
    is_probe: bool
    result: asyncio.Future[tuple[Answer, VisionInput | None, Tiles | None]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def is_video(self) -> bool:
        return kind_of(self.job) == "video"


class DecoderPool:
    """The decoders, their forker, and what waits for them, served as `Line` says."""

    def __init__(
        self, config: MediaConfig, spec: VisionSpec, *, entry_module: str = ENTRY_MODULE
    ) -> None:
        self.missing_protections: tuple[str, ...] = ()
        self._limits = limits_of(config)
        self._spec = spec
        self._num_decoders = config.decode_processes
        self._max_waiting = config.max_decodes_waiting
        self._entry_module = entry_module
        self._forker: Forker | None = None
        self._starting = asyncio.Lock()
        self._decoders: set[Decoder] = set()
        self._waiting: Line[_Request] = Line()
        self._may_go_on = asyncio.Event()
        # One decoder is kept for pictures, where there is more than one.
        self._max_videos = max(1, config.decode_processes - 1)
        self._num_videos = 0
        self._num_idle = 0
        self._num_running = 0
        self._num_replaced = 0
        self._workers: list[asyncio.Task[None]] = []
        self._copier = ThreadPoolExecutor(config.decode_processes, thread_name_prefix="tiles")
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_processes(self) -> int:
        """The decoders that exist, the forker not counted."""
        return len(self._decoders)

    @property
    def num_replaced(self) -> int:
        return self._num_replaced

    async def start(self) -> None:
        """Returns when decoders wait for jobs. ConfigError where they cannot be had here."""
        try:
            decoders = [await self._fork() for _ in range(self._num_decoders)]
        except ForkerLost:
            await self.close()
            raise ConfigError("the processes that decode media cannot be started") from None
        except BaseException:
            await self.close()
            raise
        assert self._forker is not None
        self.missing_protections = (*self._forker.missing, *decoders[0].missing)
        self._workers = [asyncio.create_task(self._work(decoder)) for decoder in decoders]

    async def close(self) -> None:
        """Ends everything at once; what waits or runs is told that the server shuts down."""
        self._is_closed = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers = []
        self._refuse_waiting(ShuttingDown())
        for decoder in tuple(self._decoders):
            await self._end(decoder)
        if self._forker is not None:
            await self._forker.close()
            self._forker = None
        await asyncio.get_running_loop().run_in_executor(None, self._copier.shutdown)

    async def decode(self, job: Job, file: MediaFile, *, tenant: str) -> Decoded:
        """The tiles of a medium, or the ServerError that says why there are none.

        To cancel it ends the decoder at once.
        """
        answer, vision, tiles = await self._run(_Request(job, file, tenant, is_probe=False))
        assert vision is not None and tiles is not None
        return Decoded(
            vision=vision,
            tiles=tiles,
            size=answer.size,
            duration_s=None if isinstance(job, ImageJob) else answer.duration_s,
            num_frames=None if isinstance(job, ImageJob) else answer.num_frames,
            decode_s=answer.decode_s,
            preprocess_s=answer.preprocess_s,
        )

    async def probe(self, job: Job, file: MediaFile, *, tenant: str) -> Probed:
        """What the header of a picture or the packets of a video tell."""
        answer, _, _ = await self._run(_Request(job, file, tenant, is_probe=True))
        if isinstance(job, ImageJob):
            return Probed(answer.size, None, None)
        return Probed(answer.size, answer.duration_s, answer.num_frames)

    async def _run(self, request: _Request) -> tuple[Answer, VisionInput | None, Tiles | None]:
        if self._is_closed:
            raise ShuttingDown
        if len(self._waiting) >= self._max_waiting + self._num_idle:
            crowded_out = self._waiting.crowd_out(tenant=request.tenant)
            if crowded_out is None:
                raise Unavailable(shortage="decodes")
            _fail(crowded_out, RateLimited())
        if isinstance(request.job, FramesJob) and len(request.job.lengths) > MAX_LISTED_FRAMES:
            raise MediaTooLarge(
                f"A list of frames may have at most {MAX_LISTED_FRAMES}.", kind="video"
            )
        self._waiting.add(request, tenant=request.tenant)
        self._may_go_on.set()
        try:
            return await request.result
        finally:
            self._waiting.remove(request, tenant=request.tenant)  # cancelled before its turn
            # An error keeps this frame, and this frame the error: the file would stay open.
            del request

    async def _work(self, decoder: Decoder) -> None:
        """One decoder after another, one request after another; none is held on to."""
        while True:
            try:
                # One that nobody needs gives back its memory, and what it has seen.
                async with asyncio.timeout(MAX_IDLE_S if decoder.num_jobs else None):
                    request = await self._next()
            except TimeoutError:
                decoder = await self._replace(decoder)
                continue
            taking = self._take(decoder, request)
            del request
            decoder = await taking

    async def _take(self, decoder: Decoder, request: _Request) -> Decoder:
        """Serve a request; the decoder for the next one."""
        try:
            if decoder.tenant not in (None, request.tenant):
                decoder = await self._replace(decoder, request)
            if request.result.done():
                return decoder
            decoder.tenant = request.tenant
            is_sound = await self._serve(decoder, request)
        except asyncio.CancelledError:  # closing
            _fail(request, ShuttingDown())
            raise
        finally:
            self._num_videos -= request.is_video
            self._may_go_on.set()
        if is_sound and decoder.num_jobs < MAX_JOBS_OF_A_DECODER:
            return decoder
        return await self._replace(decoder)

    async def _next(self) -> _Request:
        self._num_idle += 1
        try:
            while True:
                request = self._waiting.take(self._may_go)
                if request is not None:
                    self._num_videos += request.is_video
                    return request
                self._may_go_on.clear()
                await self._may_go_on.wait()
        finally:
            self._num_idle -= 1

    def _may_go(self, request: _Request) -> bool:
        """Videos take long: they leave a decoder for the pictures behind them."""
        return not request.is_video or self._num_videos < self._max_videos

    async def _serve(self, decoder: Decoder, request: _Request) -> bool:
        """Give a request its result; whether the decoder may have another."""
        work = asyncio.create_task(self._attempt(decoder, request))
        request.result.add_done_callback(lambda _: work.cancel())
        self._num_running += 1
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.wait([work])
            raise
        finally:
            self._num_running -= 1
        if work.cancelled():
            return False
        error = work.exception()
        if error is not None:
            _fail(request, error)
            return False
        if not request.result.done():
            request.result.set_result(work.result())
        return True

    async def _attempt(
        self, decoder: Decoder, request: _Request
    ) -> tuple[Answer, VisionInput | None, Tiles | None]:
        """One job at one decoder, told apart from the decoder's own fate."""
        kind = kind_of(request.job)
        is_image = kind == "image"
        limits = self._limits
        timeout_s = limits.image_decode_timeout_s if is_image else limits.video_decode_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if request.is_probe:
                    return _checked(await self._ask(decoder, request, []), request), None, None
                return await self._decode(decoder, request)
        except TimeoutError:
            raise MediaTooLarge(
                f"The {kind} takes longer to decode than {timeout_s:g} s.", kind=kind
            ) from None
        except DecoderLost:
            if self._forker is None or self._forker.is_lost:  # no fault of this medium
                raise Unavailable(shortage="decoders") from None
            raise MediaError(f"The {kind} cannot be decoded.", kind=kind) from None

    async def _decode(
        self, decoder: Decoder, request: _Request
    ) -> tuple[Answer, VisionInput, Tiles]:
        output = os.memfd_create("tiles", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        copied: asyncio.Future[tuple[VisionInput, Tiles]] | None = None
        try:
            os.ftruncate(output, self._most_tiles(request.job) * self._bytes_of_tile)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(output, fcntl.F_ADD_SEALS, seals)
            answer = _checked(await self._ask(decoder, request, [output]), request)
            layout = self._layout(request.job, answer)
            if answer.num_tiles != len(layout.tile_queries):
                raise DecoderLost
            copied = asyncio.get_running_loop().run_in_executor(
                self._copier, self._copy, request.job, layout, output
            )
            return answer, *await asyncio.shield(copied)
        finally:
            if copied is None or copied.done():
                os.close(output)
            else:  # a thread still reads it
                copied.add_done_callback(lambda _: os.close(output))

    async def _ask(self, decoder: Decoder, request: _Request, output: list[int]) -> Answer:
        file = request.file
        task = task_of(request.job, num_bytes=file.num_bytes, is_probe=request.is_probe)
        return await decoder.ask(task, [file.fileno(), *output])

    @property
    def _bytes_of_tile(self) -> int:
        return self._spec.tile_size**2 * 3

    def _most_tiles(self, job: Job) -> int:
        if isinstance(job, ImageJob):
            return max_tiles(self._spec, detail=job.detail, max_grids=job.max_grids)
        return self._spec.max_frames

    def _layout(self, job: Job, answer: Answer) -> VisionLayout:
        """What a medium of the size or the frames that a decoder tells becomes."""
        if isinstance(job, ImageJob):
            return image_layout(answer.size, self._spec, detail=job.detail, max_grids=job.max_grids)
        if answer.num_frames is None or not 1 <= answer.num_frames <= self._spec.max_frames:
            raise DecoderLost
        return video_layout(answer.num_frames, self._spec)

    def _copy(self, job: Job, layout: VisionLayout, output: int) -> tuple[VisionInput, Tiles]:
        """In a thread: the tiles in memory that nobody else can write to, and their digest."""
        side = self._spec.tile_size
        tiles = np.empty((len(layout.tile_queries), side, side, 3), dtype=np.uint8)
        rest = tiles.reshape(-1).data
        position = 0
        while position < tiles.nbytes:
            position += os.preadv(output, [rest[position:]], position)
        tiles.flags.writeable = False  # they may be shared by requests
        return vision_input(kind_of(job), layout, tiles, self._spec), tiles

    async def _replace(self, decoder: Decoder, waiting: _Request | None = None) -> Decoder:
        """Another decoder in the place of this one; `waiting` has been promised it."""
        await self._end(decoder)
        self._num_replaced += 1
        while True:
            try:
                return await self._fork()
            except ForkerLost:
                _log.error("No process that decodes media can be started; trying again.")
                self._refuse_waiting(Unavailable(shortage="decoders"))
                if waiting is not None:
                    _fail(waiting, Unavailable(shortage="decoders"))
                await asyncio.sleep(RESTART_DELAY_S)

    async def _end(self, decoder: Decoder) -> None:
        await decoder.end()
        self._decoders.discard(decoder)

    async def _fork(self) -> Decoder:
        """A new decoder, of a new forker where the old one is lost. ForkerLost if that is too."""
        forker = await self._living_forker()
        try:
            decoder = await forker.fork()
        except ForkerLost:
            forker = await self._living_forker()
            decoder = await forker.fork()
        self._decoders.add(decoder)
        return decoder

    async def _living_forker(self) -> Forker:
        async with self._starting:
            if self._forker is not None and self._forker.is_lost:
                _log.error("The process that decoders come from ended; starting another.")
                forker, self._forker = self._forker, None
                await forker.close()
            if self._forker is None:
                message = Start(limits=self._limits, spec=self._spec)
                self._forker = await Forker.start(message, entry_module=self._entry_module)
            return self._forker

    def _refuse_waiting(self, error: Unavailable) -> None:
        while (request := self._waiting.take()) is not None:
            _fail(request, error)


def limits_of(config: MediaConfig) -> DecodeLimits:
    """The part of the settings that decoders are told."""
    return DecodeLimits(
        **{limit.name: getattr(config, limit.name) for limit in fields(DecodeLimits)}
    )


def _checked(answer: Answer, request: _Request) -> Answer:
    """An answer that is no error and holds finite numbers."""
    kind = kind_of(request.job)
    if answer.error is not None:
        message = answer.message[:_MAX_MESSAGE_CHARS]
        if not message.isprintable() or not message:
            raise DecoderLost
        if answer.error == "invalid value":
            raise InvalidStretch(message)
        raise _MEDIA_ERRORS[answer.error](message, kind=kind)
    numbers = (answer.decode_s, answer.preprocess_s, answer.duration_s or 0.0)
    if not all(map(math.isfinite, numbers)):
        raise DecoderLost
    return answer


def _fail(request: _Request, error: BaseException) -> None:
    if isinstance(error, ServerError):
        error.with_traceback(None)  # it holds frames that hold the request and its file
    if not request.result.done():
        request.result.set_exception(error)
