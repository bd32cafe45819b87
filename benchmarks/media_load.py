"""Text answers beside many pictures and videos: `python -m benchmarks.media_load [--seconds 20]`.

Starts a server. Some answers run all the time; /health is asked ten times a second. First alone,
then while 16 clients send 12-megapixel JPEGs and 4 send videos of a minute. Prints the gaps between
tokens and the times of /health in both, the rates, and what the server holds before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import httpx
from PIL import Image

from benchmarks.fairness import Stream, follow
from benchmarks.pictures import picture
from benchmarks.servers import free_port, our_command, process_tree, started, tree_pss_bytes

NUM_ANSWERS = 4
NUM_PICTURE_CLIENTS = 16
NUM_VIDEO_CLIENTS = 4
SECONDS_OF_VIDEO = 60
FPS = 25
HEALTH_EVERY_S = 0.1
SETTLE_S = 20.0
"""Longer than the server keeps idle connections and decoders."""


class Load:
    """Asks until it is told to stop; counts what was answered."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.client = client
        self.model = model
        self.statuses: dict[str, int] = {}
        self.stop_s = 0.0

    async def answer(self, stream: Stream) -> None:
        for number in itertools.count():
            if time.perf_counter() >= self.stop_s:
                return
            await follow(self.client, self.model, f"Tell {number}.", max_tokens=400, stream=stream)

    async def send(self, kind: str, url: str, number: int) -> None:
        content = [
            {"type": f"{kind}_url", f"{kind}_url": {"url": url}},
            {"type": "text", "text": f"What is it, {number}?"},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 4,
        }
        # Written once: while this process writes JSON, it does not see what has arrived.
        encoded = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        while time.perf_counter() < self.stop_s:
            response = await self.client.post(
                "/v1/chat/completions", content=encoded, headers=headers
            )
            key = f"{kind} {response.status_code}"
            self.statuses[key] = self.statuses.get(key, 0) + 1
            if response.status_code == 503:
                await asyncio.sleep(float(response.headers["retry-after"]))

    async def health(self, times_s: list[float]) -> None:
        while time.perf_counter() < self.stop_s:
            asked_s = time.perf_counter()
            await self.client.get("/health")
            times_s.append(time.perf_counter() - asked_s)
            await asyncio.sleep(HEALTH_EVERY_S)


def quantiles_ms(times_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_s, n=100)
    return {"p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


def held(process_id: int) -> dict[str, int]:
    """Of the server and all processes below it."""
    family = process_tree(process_id)
    return {
        "memory_mb": tree_pss_bytes(process_id) >> 20,
        "descriptors": sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in family),
        "processes": len(family),
    }


def left_in(folder: Path) -> list[str]:
    """Temporary files, without the engine's socket."""
    return [each.name for each in folder.rglob("*") if each.is_file()]


def clip(seed: int) -> bytes:
    """A minute of H.264: a picture that wanders."""
    with Image.open(io.BytesIO(picture((960, 540), "PNG", seed))) as scene:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for index in range(SECONDS_OF_VIDEO * FPS):
                left, top = index % 320, index % 180
                frame = scene.convert("RGB").crop((left, top, left + 640, top + 360))
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
    return file.getvalue()


async def measure(url: str, model: str, process_id: int, spool: Path, seconds: float) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        seeds = range(NUM_PICTURE_CLIENTS)
        pictures = [data_url(picture((4000, 3000), "JPEG", seed), "image/jpeg") for seed in seeds]
        videos = [data_url(clip(seed), "video/mp4") for seed in range(NUM_VIDEO_CLIENTS)]
        print(json.dumps({"before": held(process_id)}), flush=True)
        for name, loaded in (("alone", False), ("beside media", True)):
            load = Load(client, model)
            load.stop_s = time.perf_counter() + seconds
            streams = [Stream() for _ in range(NUM_ANSWERS)]
            health_s: list[float] = []
            work = [load.answer(stream) for stream in streams] + [load.health(health_s)]
            if loaded:
                work += [load.send("image", each, index) for index, each in enumerate(pictures)]
                work += [load.send("video", each, index) for index, each in enumerate(videos)]
            await asyncio.gather(*work)
            gaps_s = [gap for stream in streams for gap in stream.gaps_s(0, load.stop_s)]
            print(
                json.dumps(
                    {
                        "load": name,
                        "gaps_ms": quantiles_ms(gaps_s),
                        "health_ms": quantiles_ms(health_s),
                        "tokens_per_s": round(len(gaps_s) / seconds, 1),
                        "answers": load.statuses,
                        "holds": held(process_id),
                    }
                ),
                flush=True,
            )
    await asyncio.sleep(SETTLE_S)
    print(json.dumps({"after": held(process_id), "left": left_in(spool)}), flush=True)


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.media_load", description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder; default: the demo model")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        spool = Path(folder) / "spool"
        spool.mkdir()
        environment = {
            "HCX_MEDIA__CACHE_BYTES": "0",
            "HCX_MEDIA__SPOOL_DIR": str(spool),
            "TMPDIR": str(spool),
        }
        command = our_command(options.model, port)
        log = Path(folder) / "server.log"
        with started(command, port, log=log, environment=environment) as server:
            assert server.process_id is not None
            asyncio.run(
                measure(server.url, server.model, server.process_id, spool, options.seconds)
            )


if __name__ == "__main__":
    main()
