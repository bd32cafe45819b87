"""A picture of every mode and format, and a video of every kind, each with a name."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from PIL import Image

from server.core import VisionSpec
from tests.clips import clip, damaged, motion_jpeg

SPEC = VisionSpec(
    tile_size=28,
    candidate_resolutions=tuple(
        (28 * rows, 28 * columns)
        for rows in range(1, 10)
        for columns in range(1, 10)
        if rows * columns <= 9
    ),
    image_queries=81,
    video_slow_queries=81,
    video_fast_queries=9,
    first_last_frames_slow=False,
    max_canvases=12,
    image_token_id=100271,
    video_token_id=100270,
)


def picture(
    image_format: str = "PNG",
    mode: str = "RGB",
    *,
    size: tuple[int, int] = (90, 60),
    orientation: int | None = None,
    **options: object,
) -> bytes:
    noise = np.random.default_rng(5).integers(0, 256, (size[1] // 3, size[0] // 3, 4), np.uint8)
    image = Image.fromarray(noise).resize(size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


PICTURES: Mapping[str, Callable[[], bytes]] = {
    "PNG RGB": picture,
    "PNG RGBA": partial(picture, mode="RGBA"),
    "PNG P": partial(picture, mode="P"),
    "PNG P transparent": partial(picture, mode="P", transparency=7),
    "PNG LA": partial(picture, mode="LA"),
    "PNG L": partial(picture, mode="L"),
    "PNG 1": partial(picture, mode="1"),
    "PNG I;16": partial(picture, mode="I;16"),
    "PNG turned": partial(picture, orientation=6),
    "JPEG": partial(picture, "JPEG"),
    "JPEG L": partial(picture, "JPEG", mode="L"),
    "JPEG CMYK": partial(picture, "JPEG", mode="CMYK"),
    "JPEG progressive": partial(picture, "JPEG", progressive=True),
    "JPEG turned": partial(picture, "JPEG", orientation=8),
    "JPEG large and turned": partial(picture, "JPEG", size=(900, 600), orientation=5),
    "JPEG large CMYK": partial(picture, "JPEG", mode="CMYK", size=(900, 600)),
    "WebP": partial(picture, "WEBP"),
    "WebP RGBA": partial(picture, "WEBP", mode="RGBA", lossless=True),
    "WebP turned": partial(picture, "WEBP", orientation=3),
    "GIF": partial(picture, "GIF", mode="P"),
    "BMP": partial(picture, "BMP"),
}
VIDEOS: Mapping[str, Callable[[], bytes]] = {
    "MP4": partial(clip, 20),
    "MP4 B-frames": partial(clip, 20, b_frames=3, rotation=90),
    "HEVC": partial(clip, 8, codec="libx265"),
    "AV1": partial(clip, 8, codec="libsvtav1"),
    "MKV VP9": partial(clip, 10, container="matroska", codec="libvpx-vp9"),
    "WebM VP8": partial(clip, 10, container="webm", codec="libvpx"),
    "AVI": partial(clip, 10, container="avi", codec="mpeg4"),
    "MOV Motion JPEG": partial(clip, 10, container="mov", codec="mjpeg"),
    "GIF": partial(clip, 10, container="gif", codec="gif"),
    "times used twice": partial(motion_jpeg, [0, 500, 500, 1000]),
    "damaged": lambda: damaged(clip(30, b_frames=2), numbers=[5, 20]),
}
