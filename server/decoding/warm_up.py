"""Every decoder once, on tiny media made on the spot.

What Pillow, FFmpeg and Python load or open when it is first needed is there afterwards, also what
they need to refuse a file.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from server.core import VisionSpec
from server.decoding.jobs import FramesJob, ImageJob, Job, VideoJob
from server.decoding.messages import Start, task_of
from server.decoding.work import do
from server.errors import ServerError
from server.media.limits import DecodeLimits

_SIZE = (64, 48)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_CONTAINERS = (("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg"))
# Not those of the settings, which may be too narrow even for this.
_LIMITS = DecodeLimits(
    max_image_pixels=1_000_000,
    max_image_side=10_000,
    max_image_aspect=100.0,
    max_video_pixels=1_000_000,
    max_video_duration_s=60.0,
    max_video_packets=1_000,
    max_video_frames_decoded=1_000,
    image_decode_timeout_s=60.0,
    video_decode_timeout_s=60.0,
    image_decode_memory_bytes=1 << 30,
    video_decode_memory_bytes=1 << 30,
    jpeg_reduced_scale=True,
)


def warm_up(spec: VisionSpec) -> None:
    start = Start(limits=_LIMITS, spec=spec)
    pictures = [_picture(image_format, mode) for image_format in _FORMATS for mode in ("RGB", "P")]
    pictures += [_picture(image_format, "RGBA") for image_format in ("PNG", "WEBP")]
    for picture in pictures:
        _try(ImageJob(), picture, start)
        _try(FramesJob(lengths=(len(picture),)), picture, start)
    videos = [_video(container, codec) for container, codec in _CONTAINERS]
    for video in [*videos, _picture("GIF", "RGB")]:
        _try(VideoJob(), video, start)


def _try(job: Job, data: bytes, start: Start) -> None:
    """The file, its beginning, and whatever follows its first bytes."""
    for tried in (data, data[: len(data) // 2], data[:16] + b"\xff" * 64):
        for is_probe in (True, False):
            answer, _ = do(task_of(job, num_bytes=len(tried), is_probe=is_probe), tried, start)
            if tried is data and answer.error is not None:
                raise ServerError("a decoder does not work on this machine")


def _picture(image_format: str, mode: str) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", _SIZE, (200, 30, 30)).convert("RGB" if mode == "P" else mode)
    if mode == "P" and image_format != "WEBP":
        picture = picture.convert("L" if image_format == "JPEG" else "P")
    options = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP") else {}
    picture.save(file, image_format, **options)
    return file.getvalue()


def _video(container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=5)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = _SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(8):
            pixels = np.full((_SIZE[1], _SIZE[0], 3), 30 * index, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, threads=1)
            frame.pts, frame.time_base = index, Fraction(1, 5)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
