"""Time the machine, the engine and the server: `python -m benchmarks`, or `make bench`.

Writes a table, a JSON file and a plot into a folder of their own under benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import over_http
from benchmarks.engine import (
    FULL,
    QUICK,
    load_engine,
    measure_decode,
    measure_prefill,
    measure_sampler,
    measure_vision,
)
from benchmarks.limits import measure_limits
from benchmarks.report import (
    Report,
    Subject,
    describe_machine,
    new_folder,
    now,
    write_json,
    write_tables,
)
from benchmarks.servers import (
    REPOSITORY,
    RunningServer,
    already_running,
    free_port,
    our_command,
    started,
)
from benchmarks.timing import Effort
from server.config import environment_with
from server.engine.process import ENVIRONMENT
from server.hub import find_checkpoint

STARTED_S = time.perf_counter()
PARTS = ("limits", "engine", "http", "media")
MACHINE_CACHE_SHARE = 0.25
"""Of a machine's memory, for the keys and values of the longest rows."""

LIMIT_EFFORT = Effort(least_runs=3, least_s=0.3)
QUICK_LIMIT_EFFORT = Effort(least_runs=3, least_s=0.0)
STEP_EFFORT = Effort(least_runs=5, least_s=0.5, num_warm=2)
QUICK_STEP_EFFORT = Effort(least_runs=3, least_s=0.1)

DEVICE_CACHE_SHARE = 0.5
"""Of what an accelerator has free."""

Row = TypeVar("Row")


def main() -> None:
    options = parse()
    run_as_the_engine_process_does()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("the plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    label = options.label or Path(options.model or options.url or "demo").name
    report = Report(label=label, date=now(), machine=describe_machine(options.device))
    effort = QUICK_LIMIT_EFFORT if options.quick else LIMIT_EFFORT
    if {"limits", "engine"} & set(options.only):
        say("the machine's limits")
        limits = measure_limits(options.device, effort)
        if "engine" in options.only:
            measure_engine(report, options)
            if not options.quick:
                say("the machine's limits again")
                # Other work slows a machine down for a while; what counts is what it can do.
                limits = limits.or_better(measure_limits(options.device, effort))
        report.limits = limits
    if {"http", "media"} & set(options.only):
        with server_to_load(options) as server:
            measure_server(report, options, server)
    folder = write(report)
    print((folder / "table.md").read_text())
    say(f"written to {folder.relative_to(REPOSITORY)}")


def run_as_the_engine_process_does() -> None:
    """Begins again with its environment, which some libraries read only as a process begins."""
    environment = environment_with(ENVIRONMENT)
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", help="a folder or hub name; default: the demo model")
    parser.add_argument("--url", help="a running server to load instead of starting one")
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        help=f"parts, with commas between: {', '.join(PARTS)} (all; with --url: http,media)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, fewer repetitions")
    parser.add_argument("--label", help="the name of the run; default: the model's")
    parser.add_argument("--device", default="auto", help="of limits and engine")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto", help="the backend of the engine part")
    parser.add_argument("--threads", type=int, help="of limits and engine; default: PyTorch's")
    parser.add_argument(
        "--kv-cache-bytes", type=int, help="of the engine part; default: a quarter of the memory"
    )
    options = parser.parse_args()
    if options.only is None:
        options.only = ["http", "media"] if options.url else list(PARTS)
    unknown = sorted(set(options.only) - set(PARTS))
    if unknown:
        parser.error(f"--only: no such part: {', '.join(unknown)}")
    return options


def measure_engine(report: Report, options: argparse.Namespace) -> None:
    shapes = QUICK if options.quick else FULL
    effort = QUICK_STEP_EFFORT if options.quick else STEP_EFFORT
    say("loading the model")
    engine = load_engine(
        find_checkpoint(options.model, revision=None, show_progress=True).folder,
        device=options.device,
        dtype=options.dtype,
        attention=options.attention,
        shapes=shapes,
        max_bytes=options.kv_cache_bytes or cache_bytes(options.device),
    )
    report.subject = Subject(options.model or "demo", engine.dtype, engine.attention)
    skipped = report.skipped
    say("decode")
    report.decode = listed(measure_decode(engine, shapes, effort, skipped))
    say("prefill")
    report.prefill = listed(measure_prefill(engine, shapes, effort, skipped))
    say("vision")
    report.vision = listed(measure_vision(engine, shapes, effort, skipped))
    say("sampling")
    report.sampler = listed(measure_sampler(engine, shapes, effort))


def measure_server(report: Report, options: argparse.Namespace, server: RunningServer) -> None:
    report.served, report.start_s = server.model, server.first_answer_s
    if "http" in options.only:
        say("text over HTTP")
        texts = over_http.measure_text(server, quick=options.quick, skipped=report.skipped)
        report.loads += listed(texts)
    if "media" in options.only:
        say("pictures and videos over HTTP")
        media = over_http.measure_media(server, quick=options.quick, skipped=report.skipped)
        report.loads += listed(media)


@contextlib.contextmanager
def server_to_load(options: argparse.Namespace) -> Iterator[RunningServer]:
    if options.url:
        yield already_running(options.url)
        return
    say("starting the server")
    port = free_port()
    dtype = None if options.dtype == "auto" else options.dtype
    with tempfile.TemporaryDirectory() as folder:
        command = our_command(options.model, port, dtype=dtype)
        with started(command, port, log=Path(folder) / "server.log") as server:
            yield server


def write(report: Report) -> Path:
    # Not above: nothing else here needs what only the plot needs.
    from benchmarks.plot import write_plot

    folder = new_folder(report.date, report.label)
    write_tables(folder, report)
    write_json(folder, report)
    write_plot(folder, report)
    return folder


def cache_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * DEVICE_CACHE_SHARE)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(memory_bytes * MACHINE_CACHE_SHARE)


def listed(rows: Iterable[Row]) -> list[Row]:
    """All rows; each is shown as soon as it is there."""
    found = []
    for row in rows:
        say(f"  {row}")
        found.append(row)
    return found


def say(line: str) -> None:
    print(f"{time.perf_counter() - STARTED_S:6.1f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
