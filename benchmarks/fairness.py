"""Eight answers run when somebody sends a long video: how much longer do their tokens take?

    python -m benchmarks.fairness [--model FOLDER] [--rounds 3]

Starts a server and prints a line for each round: the gaps between the tokens of the running answers
before the video and while it is read, and when a short question that came after the video had its
first token, beside the video's own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.media import write_clips
from benchmarks.servers import free_port, our_command, started

NUM_ANSWERS = 8
NUM_FRAMES = 108
UNLOADED_S = 1.0
ANSWER_TOKENS = 1000


@dataclass(slots=True)
class Stream:
    """When the pieces of one answer came."""

    arrivals_s: list[float] = field(default_factory=list)

    def gaps_s(self, start_s: float, stop_s: float) -> list[float]:
        """Of pieces that came in between."""
        within = [each for each in self.arrivals_s if start_s <= each <= stop_s]
        return [after - before for before, after in itertools.pairwise(within)]


async def follow(
    client: httpx.AsyncClient, model: str, content: object, *, max_tokens: int, stream: Stream
) -> None:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                stream.arrivals_s.append(time.perf_counter())


async def one_round(client: httpx.AsyncClient, model: str, clip: Path) -> dict[str, float]:
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    watching = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}]
    answers = [Stream() for _ in range(NUM_ANSWERS)]
    running = [
        asyncio.create_task(
            follow(client, model, f"Tell {index}.", max_tokens=ANSWER_TOKENS, stream=answer)
        )
        for index, answer in enumerate(answers)
    ]
    while not all(answer.arrivals_s for answer in answers):
        await asyncio.sleep(0.01)
    await asyncio.sleep(UNLOADED_S)
    video, question = Stream(), Stream()
    sent_s = time.perf_counter()
    watched = asyncio.create_task(follow(client, model, watching, max_tokens=8, stream=video))
    await asyncio.sleep(0.05)
    asked_s = time.perf_counter()
    await follow(client, model, "How many legs?", max_tokens=20, stream=question)
    await watched
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    before = [gap for each in answers for gap in each.gaps_s(sent_s - UNLOADED_S, sent_s)]
    beside = [gap for each in answers for gap in each.gaps_s(sent_s, video.arrivals_s[0])]
    return {
        "gap_before_p50_ms": quantile_ms(before, 0.5),
        "gap_before_p99_ms": quantile_ms(before, 0.99),
        "gap_beside_p50_ms": quantile_ms(beside, 0.5),
        "gap_beside_p99_ms": quantile_ms(beside, 0.99),
        "p99_ratio": round(quantile_ms(beside, 0.99) / quantile_ms(before, 0.99), 2),
        "question_first_token_ms": round((question.arrivals_s[0] - asked_s) * 1e3, 1),
        "video_first_token_ms": round((video.arrivals_s[0] - sent_s) * 1e3, 1),
        "question_was_first": float(question.arrivals_s[0] < video.arrivals_s[0]),
    }


def quantile_ms(times_s: Sequence[float], quantile: float) -> float:
    if len(times_s) < 2:
        raise RuntimeError("the answers ended before the video was read")
    return round(statistics.quantiles(times_s, n=100)[round(quantile * 100) - 1] * 1e3, 2)


async def measure(url: str, model: str, clips: Sequence[Path]) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for clip in clips:
            print(json.dumps(await one_round(client, model, clip)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder; default: the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        clips.mkdir()
        write_clips(clips, options.rounds, num_frames=NUM_FRAMES, seed=1)
        port = free_port()
        command = our_command(options.model, port)
        with started(command, port, log=Path(folder) / "server.log") as server:
            asyncio.run(measure(server.url, server.model, sorted(clips.iterdir())))


if __name__ == "__main__":
    main()
