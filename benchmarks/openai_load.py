"""Closed-loop load on an OpenAI-compatible chat endpoint, over streamed responses.

    python benchmarks/openai_load.py BASE_URL MODEL --concurrency 8 --requests 24
        [--prompt-words 128] [--output-tokens 64] [--temperature 0.5 --top-p 0.6] [--shared-prompt]
        [--image FILE_OR_FOLDER ...] [--video FILE_OR_FOLDER ...]

Prints one JSON line: output tokens/s, requests/s, time to first token and inter-token latency (ms,
p50 and p99 over requests). A request's latency is the time from its first to its last chunk over
its tokens, so held-back characters change nothing; the longest gap between chunks is given too.
`ignore_eos` is sent, so that every answer has exactly --output-tokens tokens. Give every round its
own --seed, or the second meets a warm prefix cache. Of a folder each request takes the next file,
so that none meets a picture that was seen before. OPENAI_API_KEY is sent where it is set.

Needs httpx and nothing of this repository: it runs against any server, from anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import mimetypes
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

WORDS = [
    *("river", "stone", "light", "window", "paper", "green", "seven", "market", "quiet"),
    *("morning", "letter", "open", "road", "winter", "music", "table", "small", "bright"),
    *("under", "after"),
]
SEED_STRIDE = 100_003
"""Between the texts of two seeds: more than any run has requests."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was seen of one request. Times in seconds."""

    first_token_s: float
    token_s: float
    longest_gap_s: float
    num_tokens: int
    num_prompt_tokens: int


class Refused(Exception):
    """The server did not answer as asked; str() says what it said."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load an OpenAI-compatible server.")
    parser.add_argument("base", help="such as http://127.0.0.1:8000")
    parser.add_argument("model", help="the name the server knows it by")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--shared-prompt", action="store_true")
    parser.add_argument("--image", action="append", default=[], type=Path)
    parser.add_argument("--video", action="append", default=[], type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="of one request, in seconds")
    return parser.parse_args(arguments)


def request_body(options: argparse.Namespace, index: int) -> bytes:
    """Of request `index`; the warm-up is number -1."""
    return json.dumps(
        {
            "model": options.model,
            "messages": [{"role": "user", "content": content(options, index)}],
            "max_tokens": options.output_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ).encode()


def content(options: argparse.Namespace, index: int) -> str | list[dict[str, Any]]:
    seed = options.seed if options.shared_prompt else options.seed * SEED_STRIDE + index
    generator = random.Random(seed)
    text = " ".join(generator.choice(WORDS) for _ in range(options.prompt_words))
    media = [
        {"type": kind, kind: {"url": data_url(chosen_file(path, index))}}
        for kind, paths in (("image_url", options.image), ("video_url", options.video))
        for path in paths
    ]
    return [*media, {"type": "text", "text": text}] if media else text


def chosen_file(path: Path, index: int) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.iterdir())
    return files[index % len(files)]


def data_url(file: Path) -> str:
    media_type = mimetypes.guess_type(file)[0] or "image/jpeg"
    return f"data:{media_type};base64,{base64.b64encode(file.read_bytes()).decode()}"


async def ask(client: httpx.AsyncClient, body: bytes) -> Answer:
    started_s = time.perf_counter()
    arrivals_s: list[float] = []
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/chat/completions", content=body) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")
            raise Refused(f"HTTP {response.status_code}: {error_message(said)}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("error"):
                raise Refused(f"error event: {event['error']}")
            usage = event.get("usage") or usage
            # The first chunk with text or a finish is the first token: the role's does not count.
            choice = event["choices"][0] if event["choices"] else None
            if choice and (choice["delta"].get("content") or choice.get("finish_reason")):
                arrivals_s.append(time.perf_counter())
    if not arrivals_s or not usage:
        raise Refused("an answer without tokens or without usage")
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
    return Answer(
        first_token_s=arrivals_s[0] - started_s,
        token_s=(arrivals_s[-1] - arrivals_s[0]) / max(1, usage["completion_tokens"] - 1),
        longest_gap_s=max(gaps_s, default=0.0),
        num_tokens=usage["completion_tokens"],
        num_prompt_tokens=usage["prompt_tokens"],
    )


def error_message(body: str) -> str:
    """What OpenAI's error body says, or the beginning of another one."""
    try:
        message: str = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:300]
    return message


async def run(options: argparse.Namespace) -> dict[str, float]:
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    # Made before the clock starts: encoding a video must not hold up somebody's token.
    bodies = [request_body(options, index) for index in range(options.requests)]
    async with httpx.AsyncClient(
        base_url=options.base.rstrip("/"),
        headers=headers,
        timeout=options.timeout,
        limits=httpx.Limits(max_connections=None),
    ) as client:
        await ask(client, request_body(options, -1))  # what is done only once is not counted
        answers: list[Answer] = []

        async def one_client() -> None:
            while bodies:
                answers.append(await ask(client, bodies.pop()))

        started_s = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(options.concurrency)))
        elapsed_s = time.perf_counter() - started_s
    return summary(options.concurrency, answers, elapsed_s)


def summary(concurrency: int, answers: Sequence[Answer], elapsed_s: float) -> dict[str, float]:
    first_s = [answer.first_token_s for answer in answers]
    token_s = [answer.token_s for answer in answers]
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "concurrency": concurrency,
        "prompt_tokens": answers[0].num_prompt_tokens,
        "output_tokens_per_s": round(num_tokens / elapsed_s, 1),
        "requests_per_s": round(len(answers) / elapsed_s, 3),
        "ttft_p50_ms": quantile_ms(first_s, 0.5),
        "ttft_p99_ms": quantile_ms(first_s, 0.99),
        "itl_p50_ms": quantile_ms(token_s, 0.5),
        "itl_p99_ms": quantile_ms(token_s, 0.99),
        "longest_gap_p99_ms": quantile_ms([answer.longest_gap_s for answer in answers], 0.99),
    }


def quantile_ms(times_s: Sequence[float], quantile: float) -> float:
    ordered = sorted(times_s)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * quantile))] * 1e3, 2)


def main() -> None:
    try:
        result = asyncio.run(run(parse()))
    except (Refused, httpx.HTTPError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
