"""Time a server the way a client sees it: first token, gaps between tokens, tokens per second.

    python -m benchmarks.load [--model FOLDER_OR_HUB_NAME | --url http://127.0.0.1:8000]

Without a URL a server is started for the measurement on a free port, and stopped after it. Each
row is one kind of prompt at one number of requests in flight. Only the wire is looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

# Long enough for real work before the first token, and no longer than a small model's context.
TEXT = "Describe, in a few words, what a lighthouse is for and who needs it. " * 4


@dataclass(frozen=True, slots=True)
class Timing:
    """One request. Times in seconds; `gaps_s` lie between tokens as far as they came apart."""

    first_token_s: float
    total_s: float
    gaps_s: tuple[float, ...]
    num_prompt_tokens: int
    num_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a server from outside.")
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--model", help="what to start; default: the demo model")
    parser.add_argument("--requests", type=int, default=8, help="for each row")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=448, help="side of the picture")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(started_server(options.model))
        asyncio.run(measure(url, options))


@contextlib.contextmanager
def started_server(model: str | None) -> Iterator[str]:
    """The address of a server that runs until the end of the block."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    command += ["--model", model] if model else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        banner = process.stdout.readline().strip()
        if not banner:
            sys.exit("the server did not start")
        print(banner)
        try:
            yield banner.rsplit(" ", 1)[1]
        finally:
            process.terminate()


async def measure(url: str, options: argparse.Namespace) -> None:
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as client:
        listed = await client.get("/v1/models")
        listed.raise_for_status()
        model = listed.json()["data"][0]["id"]
        print(
            f"{'prompt':<8} {'in flight':>9} {'tokens in':>9} {'first token ms':>15} "
            f"{'gap ms':>15} {'tokens/s':>9}   (median / 95th percentile)"
        )
        for kind in ("text", "picture"):
            # A first one, for what is done only once.
            warm = await ask(client, body(model, kind, options, seed=-1))
            if warm is None:
                print(f"{kind:<8} refused by this model")
                continue
            for concurrency in options.concurrency:
                started_s = time.perf_counter()
                timings = await run_row(client, model, kind, options, concurrency)
                elapsed_s = time.perf_counter() - started_s
                print(row(kind, concurrency, timings, elapsed_s))


async def run_row(
    client: httpx.AsyncClient,
    model: str,
    kind: str,
    options: argparse.Namespace,
    concurrency: int,
) -> list[Timing]:
    slots = asyncio.Semaphore(concurrency)

    async def one(seed: int) -> Timing | None:
        async with slots:
            return await ask(client, body(model, kind, options, seed=seed))

    results = await asyncio.gather(*(one(seed) for seed in range(options.requests)))
    return [result for result in results if result is not None]


def body(model: str, kind: str, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """A request that no other one shares its picture or its first words with."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"{seed}. {TEXT}"}]
    if kind == "picture":
        url = picture(options.pixels, seed)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": options.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def picture(side: int, seed: int) -> str:
    noise = Image.frombytes("RGB", (32, 32), random.Random(seed).randbytes(32 * 32 * 3))
    buffer = io.BytesIO()
    noise.resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> Timing | None:
    """Send one request and time its events; None if it is refused."""
    started_s = time.perf_counter()
    arrivals_s: list[float] = []
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code == 400:
            return None
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                sys.exit(f"a request failed: {event['error']['code']}")
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") for choice in event["choices"]):
                arrivals_s.append(time.perf_counter())
    ended_s = time.perf_counter()
    first_s = arrivals_s[0] if arrivals_s else ended_s
    return Timing(
        first_token_s=first_s - started_s,
        total_s=ended_s - started_s,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(arrivals_s)),
        num_prompt_tokens=usage["prompt_tokens"],
        num_tokens=usage["completion_tokens"],
    )


def row(kind: str, concurrency: int, timings: list[Timing], elapsed_s: float) -> str:
    prompt_tokens = round(statistics.mean(timing.num_prompt_tokens for timing in timings))
    per_second = sum(timing.num_tokens for timing in timings) / elapsed_s
    first = median_and_95th([timing.first_token_s for timing in timings])
    gaps = median_and_95th([gap for timing in timings for gap in timing.gaps_s])
    return (
        f"{kind:<8} {concurrency:>9} {prompt_tokens:>9} {first:>15} {gaps:>15} {per_second:>9.1f}"
    )


def median_and_95th(times_s: list[float]) -> str:
    if not times_s:
        return "-"
    ordered = sorted(times_s)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{1000 * statistics.median(ordered):.1f} / {1000 * high:.1f}"


if __name__ == "__main__":
    main()
