"""Our server beside vLLM's CPU build: the same weights, cores and loads, in turn. See peer.md.

    python -m benchmarks.peer --model FOLDER [--ours start|URL] --peer start|URL

Every load is run on one server and then on the other; each round has prompts of its own, and every
other one begins with the peer. What is compared are medians over the rounds. `start` starts a
server here (ours by `python -m server serve`, the peer by its script): only then are its start and
its memory measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.loads import TEXT_LOADS, Load, LoadRefused, LoadResult, run_load
from benchmarks.report import (
    JSON_FILE,
    TABLE_FILE,
    Machine,
    describe_machine,
    machine_line,
    new_folder,
    now,
    table,
)
from benchmarks.servers import (
    REPOSITORY,
    RunningServer,
    already_running,
    free_port,
    our_command,
    peer_command,
    started,
    tree_pss_bytes,
)
from server.model.config import read_checkpoint

DTYPE = "bfloat16"
"""What the peer's script asks for."""

CACHE_BYTES = 2 << 30
"""The peer's script gives it as much, and so we take as much."""

MEMORY_BESIDE_BYTES = 900 * 10**6
"""All our processes may take this beside weights and cache."""

START = "start"
SEEDS_A_ROUND = 100

Side = Literal["ours", "peer"]
Metric = Literal["output_tokens_per_s", "ttft_p50_ms", "itl_p50_ms"]
Verdict = Literal["aim", "yes", "NO"]


@dataclass(frozen=True, slots=True)
class Bound:
    """What must be reached, and what is aimed for, of a ratio ours / peer."""

    must: float
    aim: float
    more_is_better: bool = False

    def judge(self, ratio: float) -> Verdict:
        if self._holds(ratio, self.aim):
            return "aim"
        return "yes" if self._holds(ratio, self.must) else "NO"

    def _holds(self, ratio: float, bound: float) -> bool:
        return ratio >= bound if self.more_is_better else ratio <= bound


METRICS: Mapping[Metric, str] = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "first token, ms (p50)",
    "itl_p50_ms": "further token, ms (p50)",
}
BOUNDS: Mapping[Metric, Bound] = {
    "output_tokens_per_s": Bound(must=1.2, aim=1.5, more_is_better=True),
    "ttft_p50_ms": Bound(must=0.8, aim=0.5),
    "itl_p50_ms": Bound(must=0.85, aim=0.7),
}
START_BOUND = Bound(must=6.0, aim=4.0)
"""Seconds to ours' first answer; no ratio."""

LONG_PROMPTS = "8 clients, long prompts"
LONG_PROMPT_BOUNDS: Mapping[Metric, Bound] = {
    **BOUNDS,
    "output_tokens_per_s": Bound(must=1.0, aim=1.1, more_is_better=True),
    "itl_p50_ms": Bound(must=1.0, aim=0.7),
}
"""Thousand tokens a prompt: matrix products on both sides, and nothing to be clever about."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One load in one round on one server, and the memory of the server's processes after it.

    That is their proportional set size together; None where the server was not started here.
    """

    round: int
    side: Side
    result: LoadResult
    pss_bytes: int | None


@dataclass(slots=True)
class Comparison:
    """`starts_s` are from the command to the end of the first answer, of one token.

    `pss_after_start_bytes` holds hardly any of the cache, which takes memory as it is used.
    """

    date: str
    machine: Machine
    model: str
    weight_bytes: int
    starts_s: dict[Side, list[float]] = field(default_factory=dict)
    pss_after_start_bytes: dict[Side, int] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def main() -> None:
    options = parse()
    # So that a run that is ended early ends its servers too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    comparison = Comparison(
        date=now(),
        machine=describe_machine("cpu"),
        model=options.model.resolve().name,
        weight_bytes=read_checkpoint(options.model).parameter_bytes(DTYPE),
    )
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for _ in range(options.starts - 1 if options.ours == START else 0):
            with our_server(options, logs) as server:
                note_start(comparison, "ours", server)
        ours = stack.enter_context(our_server(options, logs))
        note_start(comparison, "ours", ours)
        peer = stack.enter_context(peer_server(options, logs))
        note_start(comparison, "peer", peer)
        loads = [TEXT_LOADS[number - 1] for number in options.loads]
        for round_number in range(options.first_round, options.first_round + options.rounds):
            for load in loads:
                compare(comparison, {"ours": ours, "peer": peer}, load, round_number)
    folder = new_folder(comparison.date, f"peer-{comparison.model}")
    (folder / TABLE_FILE).write_text(markdown(comparison))
    (folder / JSON_FILE).write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    print(markdown(comparison))
    say(f"written to {folder.relative_to(REPOSITORY)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--ours", default=START, help="an address, or: start (the default)")
    parser.add_argument("--peer", required=True, help="an address, or: start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=1, help="seeds come of the rounds")
    parser.add_argument("--starts", type=int, default=3, help="how often ours is started")
    numbers = list(range(1, len(TEXT_LOADS) + 1))
    parser.add_argument(
        "--loads", type=int, nargs="+", choices=numbers, default=numbers, help="only these"
    )
    return parser.parse_args()


@contextlib.contextmanager
def our_server(options: argparse.Namespace, logs: Path) -> Iterator[RunningServer]:
    if options.ours != START:
        yield already_running(options.ours)
        return
    say("starting ours")
    port = free_port()
    command = our_command(str(options.model.resolve()), port, dtype=DTYPE)
    environment = {"HCX_ENGINE__KV_CACHE_BYTES": str(CACHE_BYTES)}
    with started(command, port, log=logs / "ours.log", environment=environment) as server:
        yield server


@contextlib.contextmanager
def peer_server(options: argparse.Namespace, logs: Path) -> Iterator[RunningServer]:
    if options.peer != START:
        yield already_running(options.peer)
        return
    say("starting the peer: a minute or two, and more where it has to be installed first")
    port = free_port()
    command = peer_command(str(options.model.resolve()), port)
    with started(command, port, log=logs / "peer.log") as server:
        yield server


def note_start(comparison: Comparison, side: Side, server: RunningServer) -> None:
    if server.process_id is None or server.first_answer_s is None:
        return
    comparison.starts_s.setdefault(side, []).append(server.first_answer_s)
    comparison.pss_after_start_bytes[side] = tree_pss_bytes(server.process_id)


def compare(
    comparison: Comparison, servers: Mapping[Side, RunningServer], load: Load, round_number: int
) -> None:
    """One load on both servers; in every other round the peer comes first."""
    # A seed for each load, because texts of one seed begin alike and would be found in a cache.
    seed = round_number * SEEDS_A_ROUND + TEXT_LOADS.index(load)
    sides: tuple[Side, Side] = ("ours", "peer") if round_number % 2 else ("peer", "ours")
    for side in sides:
        server = servers[side]
        try:
            result = run_load(server.url, server.model, load, seed=seed)
        except LoadRefused as error:
            comparison.skipped.append(f"{load.name}, round {round_number}, {side}: {error}")
            return
        say(f"round {round_number}, {side}: {result}")
        pss_bytes = None if server.process_id is None else tree_pss_bytes(server.process_id)
        comparison.measured.append(Measured(round_number, side, result, pss_bytes))


# What came of it ----------------------------------------------------------------------------------


def median_of(comparison: Comparison, side: Side, load: str, metric: Metric) -> float | None:
    """Over the rounds; None where there was none."""
    values: list[float] = [
        getattr(each.result, metric)
        for each in comparison.measured
        if each.side == side and each.result.load == load
    ]
    return statistics.median(values) if values else None


def bounds_of(load: str) -> Mapping[Metric, Bound]:
    return LONG_PROMPT_BOUNDS if load == LONG_PROMPTS else BOUNDS


def markdown(comparison: Comparison) -> str:
    rounds = sorted({each.round for each in comparison.measured})
    parts = [
        f"# Side by side: {comparison.model}, {DTYPE}, {comparison.date}",
        machine_line(comparison.machine),
        f"Medians of {len(rounds)} rounds, and their ratio ours / peer: **aim** is as good as we "
        "aim for, **yes** as good as it must be, **NO** less.",
        _ratios(comparison),
        *_starts(comparison),
        *_memory(comparison),
    ]
    if comparison.skipped:
        parts += ["Left out:", "\n".join(f"- {line}" for line in comparison.skipped)]
    return "\n\n".join(parts) + "\n"


def _ratios(comparison: Comparison) -> str:
    columns = ["load"]
    for title in METRICS.values():
        columns += [f"{title}: ours", "peer", "ratio"]
    names = dict.fromkeys(each.result.load for each in comparison.measured)
    rows = []
    for load in (load.name for load in TEXT_LOADS if load.name in names):
        row = [load]
        for metric in METRICS:
            ours = median_of(comparison, "ours", load, metric)
            peer = median_of(comparison, "peer", load, metric)
            if ours is None or peer is None:
                row += ["-", "-", "-"]
                continue
            verdict = bounds_of(load)[metric].judge(ours / peer)
            row += [f"{ours:.1f}", f"{peer:.1f}", f"{ours / peer:.2f} **{verdict}**"]
        rows.append(row)
    return table(columns, rows)


def _starts(comparison: Comparison) -> list[str]:
    lines = []
    for side, times_s in comparison.starts_s.items():
        median_s = statistics.median(times_s)
        verdict = f" **{START_BOUND.judge(median_s)}**" if side == "ours" else ""
        each = ", ".join(f"{time_s:.1f}" for time_s in times_s)
        lines.append(f"- {side}: {median_s:.1f} s{verdict} (each start: {each})")
    return ["From the command to the first answer:", "\n".join(lines)] if lines else []


def _memory(comparison: Comparison) -> list[str]:
    rows = []
    for side, idle_bytes in comparison.pss_after_start_bytes.items():
        under_load = [each.pss_bytes or 0 for each in comparison.measured if each.side == side]
        most_bytes = max([idle_bytes, *under_load])
        beside = {
            "after the start": idle_bytes - comparison.weight_bytes,
            "at most after a load": most_bytes - comparison.weight_bytes - CACHE_BYTES,
        }
        for when, total in zip(beside, (idle_bytes, most_bytes), strict=True):
            verdict = "yes" if beside[when] <= MEMORY_BESIDE_BYTES else "NO"
            marked = f"{megabytes(beside[when])} **{verdict}**"
            rows.append(
                (side, when, megabytes(total), marked if side == "ours" else marked.split(" ")[0])
            )
    if not rows:
        return []
    about = (
        f"Memory, MB (sum of PSS of a server's processes). Weights are "
        f"{megabytes(comparison.weight_bytes)}, the cache may grow to {megabytes(CACHE_BYTES)}; "
        f"beside them at most {megabytes(MEMORY_BESIDE_BYTES)}. After the start the cache has not "
        "been touched, and nothing is taken off for it."
    )
    return [about, table(("server", "when", "in all", "beside weights and cache"), rows)]


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
