"""How fast pictures become tiles, on one core: `python -m benchmarks.pictures [--seconds 5]`.

Ours is the whole way: fetched over HTTP from a host beside it, decoded and cut in a decoder
process, copied back and hashed. The other side opens the same files with Pillow and does the same
resizes in one process. Both are bound to one core; a line for each kind of picture, with the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image, ImageOps

from server.config import MediaConfig
from server.core import VisionSpec
from server.decoding.jobs import ImageJob
from server.decoding.pool import DecoderPool
from server.hub import find_checkpoint
from server.media.fetch import Fetcher
from server.model.config import read_checkpoint
from server.vision.tiles import image_tiles

KINDS = {
    "JPEG 4000x3000": ((4000, 3000), "JPEG"),
    "JPEG 1920x1080": ((1920, 1080), "JPEG"),
    "JPEG 640x480": ((640, 480), "JPEG"),
    "PNG 1280x800": ((1280, 800), "PNG"),
    "WebP 1280x960": ((1280, 960), "WEBP"),
}
NUM_FILES = 4


def picture(size: tuple[int, int], picture_format: str, seed: int) -> bytes:
    """Shapes with a little noise: neither flat nor random."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(file, picture_format, **({"quality": 85} if picture_format != "PNG" else {}))
    return file.getvalue()


def host(files: dict[str, bytes]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = files[self.path]
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.send_header("cache-control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def rate(work: Callable[[int], object], seconds: float) -> float:
    work(0)
    count, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        work(count)
        count += 1
    return count / (time.perf_counter() - started_s)


def with_pillow(files: list[bytes], spec: VisionSpec, seconds: float) -> float:
    def work(index: int) -> None:
        with Image.open(io.BytesIO(files[index % len(files)])) as image:
            image_tiles(ImageOps.exif_transpose(image).convert("RGB"), spec)

    return rate(work, seconds)


async def with_ours(urls: list[str], spec: VisionSpec, port: int, seconds: float) -> float:
    config = MediaConfig(
        allowed_private_hosts=("127.0.0.0/8",),
        allowed_ports=(port,),
        decode_processes=1,
        cache_bytes=0,
    )
    fetcher, pool = Fetcher(config), DecoderPool(config, spec)
    await pool.start()
    count = 0
    stop_s = 0.0

    async def client(number: int) -> None:
        nonlocal count
        while time.perf_counter() < stop_s:
            url = urls[(number + count) % len(urls)]
            fetched = await fetcher.fetch(url, kind="image", tenant="")
            await pool.decode(ImageJob(), fetched.file, tenant="")
            count += 1

    stop_s = time.perf_counter() + 0.5
    await asyncio.gather(*(client(number) for number in range(3)))
    count, started_s = 0, time.perf_counter()
    stop_s = started_s + seconds
    await asyncio.gather(*(client(number) for number in range(3)))
    reached = count / (time.perf_counter() - started_s)
    await fetcher.close()
    await pool.close()
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder; default: the demo model")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    spec = read_checkpoint(find_checkpoint(options.model).folder).vision
    if spec is None:
        raise SystemExit("the checkpoint takes no pictures")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for kind, (size, picture_format) in KINDS.items():
        files = [picture(size, picture_format, seed) for seed in range(NUM_FILES)]
        paths = {f"/{index}": data for index, data in enumerate(files)}
        server = host(paths)
        port = server.server_address[1]
        urls = [f"http://127.0.0.1:{port}{path}" for path in paths]
        pillow = with_pillow(files, spec, options.seconds)
        ours = asyncio.run(with_ours(urls, spec, port, options.seconds))
        server.shutdown()
        print(
            json.dumps(
                {
                    "kind": kind,
                    "kilobytes": len(files[0]) // 1024,
                    "pillow_per_s": round(pillow, 1),
                    "ours_per_s": round(ours, 1),
                    "ratio": round(ours / pillow, 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
