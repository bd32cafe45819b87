"""Pictures and clips to send, each of its own noise, so that no cache has seen one before."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

PICTURE_SIZE = (800, 600)
CLIP_SIZE = (320, 240)
BLOCKS = (32, 24)
FRAME_INTERVAL_S = Fraction(2, 5)
"""Between two frames: the server looks at a video no more often, so it looks at every frame."""


def write_pictures(folder: Path, count: int, *, seed: int) -> None:
    for index in range(count):
        noise(f"{seed} {index}").resize(PICTURE_SIZE, Image.Resampling.NEAREST).save(
            folder / f"{index:04}.png"
        )


def write_clips(folder: Path, count: int, *, num_frames: int, seed: int) -> None:
    for index in range(count):
        with av.open(folder / f"{index:04}.mp4", "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=1 / FRAME_INTERVAL_S, options={"preset": "ultrafast"}
            )
            stream.width, stream.height = CLIP_SIZE
            stream.pix_fmt = "yuv420p"
            for frame in range(num_frames):
                picture = noise(f"{seed} {index} {frame}").resize(
                    CLIP_SIZE, Image.Resampling.NEAREST
                )
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode(None))


def noise(seed: str) -> Image.Image:
    width, height = BLOCKS
    return Image.frombytes("RGB", BLOCKS, random.Random(seed).randbytes(width * height * 3))
