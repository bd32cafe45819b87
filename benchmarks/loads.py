"""The loads that servers are measured under, and running one with the load generator.

The text loads are those of the side-by-side in peer.md: change them there and here or nowhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GENERATOR = Path(__file__).parent / "openai_load.py"


@dataclass(frozen=True, slots=True)
class Load:
    """`flags` are the load generator's."""

    name: str
    flags: str

    @property
    def num_requests(self) -> int:
        words = self.flags.split()
        return int(words[words.index("--requests") + 1])


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the load generator measured; its names."""

    load: str
    concurrency: int
    prompt_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    longest_gap_p99_ms: float


class LoadRefused(Exception):
    """The server does not take requests like these; str() is why, in its words."""


EIGHT_LONG = "--concurrency 8 --requests 24 --prompt-words 512 --output-tokens 16"
EIGHT_SHORT = "--concurrency 8 --requests 32 --prompt-words 128"

TEXT_LOADS = (
    Load("1 client", "--concurrency 1 --requests 6"),
    Load("8 clients", EIGHT_SHORT),
    Load("8 clients, sampled", f"{EIGHT_SHORT} --temperature 0.5 --top-p 0.6"),
    Load("32 clients", "--concurrency 32 --requests 96 --prompt-words 64"),
    Load("8 clients, long prompts", EIGHT_LONG),
    Load("8 clients, one long prompt", f"{EIGHT_LONG} --shared-prompt"),
)
PICTURE_LOADS = (
    Load("picture, 1 client", "--concurrency 1 --requests 6 --output-tokens 32"),
    Load("picture, 8 clients", "--concurrency 8 --requests 24 --output-tokens 32"),
)
VIDEO_LOADS = (
    Load("video, 1 client", "--concurrency 1 --requests 3 --output-tokens 32"),
    Load("video, 4 clients", "--concurrency 4 --requests 8 --output-tokens 32"),
)


def run_load(
    url: str, model: str, load: Load, *, seed: int, more_flags: Sequence[str] = ()
) -> LoadResult:
    """In a process of its own, so that nothing here delays what it times."""
    command = [sys.executable, str(GENERATOR), url, model, *load.flags.split()]
    command += ["--seed", str(seed), *more_flags]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["nothing was said"]
        if "HTTP 400: " in lines[-1]:
            raise LoadRefused(lines[-1].split("HTTP 400: ", 1)[1])
        raise RuntimeError(f"the load '{load.name}' failed: {lines[-1]}")
    return LoadResult(load=load.name, **json.loads(finished.stdout.splitlines()[-1]))
