"""A server as its clients see it: text, picture and video loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.loads import (
    PICTURE_LOADS,
    TEXT_LOADS,
    VIDEO_LOADS,
    Load,
    LoadRefused,
    LoadResult,
    run_load,
)
from benchmarks.media import write_clips, write_pictures
from benchmarks.servers import RunningServer

SEED = 1
VIDEO_FRAMES = 108
"""As many as the model looks at."""

QUICK_TEXT_LOADS = (TEXT_LOADS[0], TEXT_LOADS[1])
QUICK_PICTURE_LOADS = (PICTURE_LOADS[0],)
QUICK_VIDEO_LOADS = (Load("video, 1 client", "--requests 1 --output-tokens 32"),)


def measure_text(server: RunningServer, *, quick: bool, skipped: list[str]) -> Iterator[LoadResult]:
    loads = QUICK_TEXT_LOADS if quick else TEXT_LOADS
    for seed, load in enumerate(loads, start=SEED):
        yield from _measured(server, load, [], skipped, seed=seed)


def measure_media(
    server: RunningServer, *, quick: bool, skipped: list[str]
) -> Iterator[LoadResult]:
    """Every request has a picture or video of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for load in QUICK_PICTURE_LOADS if quick else PICTURE_LOADS:
            files = _folder(folder, load)
            # One more than requests, for the warm-up.
            write_pictures(files, load.num_requests + 1, seed=SEED)
            yield from _measured(server, load, ["--image", str(files)], skipped)
        for load in QUICK_VIDEO_LOADS if quick else VIDEO_LOADS:
            files = _folder(folder, load)
            write_clips(files, load.num_requests + 1, num_frames=VIDEO_FRAMES, seed=SEED)
            yield from _measured(server, load, ["--video", str(files)], skipped)


def _folder(parent: str, load: Load) -> Path:
    folder = Path(parent) / load.name
    folder.mkdir()
    return folder


def _measured(
    server: RunningServer,
    load: Load,
    flags: Sequence[str],
    skipped: list[str],
    *,
    seed: int = SEED,
) -> Iterator[LoadResult]:
    try:
        yield run_load(server.url, server.model, load, seed=seed, more_flags=flags)
    except LoadRefused as error:
        skipped.append(f"{load.name}: {error}")
