"""One task from the bytes of a medium to its tiles: what a decoder does, as a pure function.

Must not know of processes, sockets and files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

from PIL import Image

from server.core import Tiles, VisionSpec
from server.decoding.jobs import FramesJob, ImageJob, VideoJob
from server.decoding.messages import Answer, ErrorName, Start, Task
from server.errors import MediaError, MediaTooLarge, ServerError, UnsupportedMediaType
from server.media.image import decode_image, probe_image
from server.media.video import (
    DecodedVideo,
    ProbedVideo,
    decode_frame_list,
    decode_video,
    probe_frame_list,
    probe_video,
)
from server.vision.frames import sample_times, video_tiles
from server.vision.tiles import fit_to_tile, image_tiles, largest_resize


def do(task: Task, data: bytes, start: Start) -> tuple[Answer, Tiles | None]:
    """The answer, and the tiles unless it is an error or only a probe was asked for."""
    try:
        match task.job:
            case ImageJob() as job:
                if task.is_probe:
                    return Answer(size=probe_image(data, start.limits)), None
                return _image(job, data, start)
            case VideoJob() | FramesJob() as video_job:
                if task.is_probe:
                    return _probed(_probe(video_job, data, start)), None
                return _video(video_job, data, start)
    except ServerError as error:
        return Answer(error=_name_of(error), message=error.message), None


def _name_of(error: ServerError) -> ErrorName:
    match error:
        case UnsupportedMediaType():
            return "unsupported"
        case MediaTooLarge():
            return "too large"
        case MediaError():
            return "damaged"
        case _:
            return "invalid value"


def _image(job: ImageJob, data: bytes, start: Start) -> tuple[Answer, Tiles]:
    started_s = time.perf_counter()
    needed = partial(largest_resize, spec=start.spec, detail=job.detail, max_grids=job.max_grids)
    picture = decode_image(data, start.limits, needed_size=needed)
    decoded_s = time.perf_counter()
    _, tiles = image_tiles(
        picture.pixels,
        start.spec,
        detail=job.detail,
        max_grids=job.max_grids,
        size=picture.size,
    )
    answer = Answer(
        size=picture.size,
        num_tiles=len(tiles),
        decode_s=decoded_s - started_s,
        preprocess_s=time.perf_counter() - decoded_s,
    )
    return answer, tiles


class _Stopwatch:
    """How long the calls of one function took together."""

    def __init__(self, fit: Callable[[Image.Image], Image.Image]) -> None:
        self.spent_s = 0.0
        self._fit = fit

    def __call__(self, frame: Image.Image) -> Image.Image:
        started_s = time.perf_counter()
        fitted = self._fit(frame)
        self.spent_s += time.perf_counter() - started_s
        return fitted


def _video(job: VideoJob | FramesJob, data: bytes, start: Start) -> tuple[Answer, Tiles]:
    started_s = time.perf_counter()
    fit = _Stopwatch(partial(fit_to_tile, spec=start.spec))
    video = _decode(job, data, start, fit)
    _, tiles = video_tiles(video.frames, start.spec)
    total_s = time.perf_counter() - started_s
    answer = Answer(
        size=video.size,
        num_tiles=len(tiles),
        num_frames=len(video.frames),
        duration_s=video.duration_s,
        decode_s=max(0.0, total_s - fit.spent_s),
        preprocess_s=fit.spent_s,
    )
    return answer, tiles


def _decode(job: VideoJob | FramesJob, data: bytes, start: Start, fit: _Stopwatch) -> DecodedVideo:
    times = _sample_times(job, start.spec)
    if isinstance(job, VideoJob):
        return decode_video(data, start.limits, sample_times=times, fit=fit)
    frames = _listed(job, data)
    return decode_frame_list(frames, start.limits, fps=job.fps, sample_times=times, fit=fit)


def _probe(job: VideoJob | FramesJob, data: bytes, start: Start) -> ProbedVideo:
    times = _sample_times(job, start.spec)
    if isinstance(job, VideoJob):
        return probe_video(data, start.limits, sample_times=times)
    frames = _listed(job, data)
    return probe_frame_list(frames, start.limits, fps=job.fps, sample_times=times)


def _probed(video: ProbedVideo) -> Answer:
    return Answer(size=video.size, duration_s=video.duration_s, num_frames=video.num_frames)


def _sample_times(job: VideoJob | FramesJob, spec: VisionSpec) -> Callable[[float], list[float]]:
    return partial(
        sample_times,
        spec=spec,
        fps=job.fps if isinstance(job, VideoJob) else None,  # of a list it says what is there
        num_frames=job.num_frames,
        max_frames=job.max_frames,
        start_s=job.start_s,
        end_s=job.end_s,
    )


def _listed(job: FramesJob, data: bytes) -> list[bytes]:
    return [data[start:stop] for start, stop in pairwise(accumulate(job.lengths, initial=0))]
