"""What a run found, and writing it down: one Markdown file of tables, one JSON file, one plot."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.engine import DecodeRow, PrefillRow, SamplerRow, VisionRow
from benchmarks.limits import Limits
from benchmarks.loads import LoadResult
from benchmarks.servers import REPOSITORY
from server import __version__

RESULTS = REPOSITORY / "benchmarks" / "results"
TABLE_FILE, JSON_FILE, PLOT_FILE = "table.md", "results.json", "plot.png"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and with what a run was made."""

    processor: str
    cores: int
    load_before: float
    """Processes that ran before this one, of the last minute: 0 is a machine of one's own."""
    memory_gib: float
    device: str
    threads: int
    torch: str
    server: str
    commit: str


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine that was measured in this process."""

    model: str
    dtype: str
    attention: str


@dataclass(slots=True)
class Report:
    """Filled part by part. `skipped` says of every line that is missing why."""

    label: str
    date: str
    machine: Machine
    limits: Limits | None = None
    subject: Subject | None = None
    decode: list[DecodeRow] = field(default_factory=list)
    prefill: list[PrefillRow] = field(default_factory=list)
    vision: list[VisionRow] = field(default_factory=list)
    sampler: list[SamplerRow] = field(default_factory=list)
    loads: list[LoadResult] = field(default_factory=list)
    served: str | None = None
    start_s: float | None = None
    skipped: list[str] = field(default_factory=list)

    def fraction(self, row: DecodeRow | PrefillRow | VisionRow) -> float:
        """Of the machine's limit: 1 is as fast as this work can be done here."""
        assert self.limits is not None and self.subject is not None
        return row.work.least_s(self.limits, self.subject.dtype) / row.seconds


def describe_machine(device: str) -> Machine:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    is_cuda = torch.device(device).type == "cuda"
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        load_before=round(os.getloadavg()[0], 2),
        memory_gib=round(memory_bytes / 2**30, 1),
        device=torch.cuda.get_device_name(device) if is_cuda else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        server=__version__,
        commit=_commit(),
    )


def _processor() -> str:
    """Its name and the bits of its instructions that decide these figures."""
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text() if cpu_info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text]
    return " ".join([name[1] if name else platform.processor(), *flags])


def _commit() -> str:
    """Of this repository, with a plus where files differ from it; nothing outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def now() -> str:
    return time.strftime("%Y-%m-%d-%H%M%S")


def new_folder(date: str, label: str) -> Path:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    folder = RESULTS / f"{date}-{plain}"
    folder.mkdir(parents=True)
    return folder


def write_json(folder: Path, report: Report) -> None:
    values = asdict(report)
    timed: dict[str, Sequence[DecodeRow | PrefillRow | VisionRow]] = {
        "decode": report.decode,
        "prefill": report.prefill,
        "vision": report.vision,
    }
    for name, rows in timed.items():
        for row, entry in zip(rows, values[name], strict=True):
            entry["fraction_of_limit"] = round(report.fraction(row), 4)
    for sampled, entry in zip(report.sampler, values["sampler"], strict=True):
        entry["share"] = round(sampled.share, 4)
    (folder / JSON_FILE).write_text(json.dumps(values, indent=1) + "\n")


def write_tables(folder: Path, report: Report) -> None:
    (folder / TABLE_FILE).write_text(markdown(report))


# Tables -------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    parts = [f"# {report.label}, {report.date}", machine_line(report.machine)]
    if report.limits is not None:
        parts += _limits(report.limits)
    if report.subject is not None:
        subject = report.subject
        parts.append(f"## The engine alone: {subject.model}, {subject.dtype}, {subject.attention}")
    if report.decode:
        parts += _decode(report)
    if report.prefill:
        parts += _prefill(report)
    if report.vision:
        parts += _vision(report)
    if report.sampler:
        parts += _sampler(report)
    if report.loads:
        parts += _loads(report)
    if report.skipped:
        parts += ["## Left out", "\n".join(f"- {line}" for line in report.skipped)]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Machine) -> str:
    commit = f" ({machine.commit})" if machine.commit else ""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB, load before "
        f"{machine.load_before}; device {machine.device}, {machine.threads} threads; PyTorch "
        f"{machine.torch}; hcx-server {machine.server}{commit}."
    )


def _limits(limits: Limits) -> list[str]:
    reads = [(probe.name, probe.dtype, f"{probe.per_s / 1e9:.1f}") for probe in limits.reads]
    products = [(probe.name, probe.dtype, f"{probe.per_s / 1e9:.0f}") for probe in limits.products]
    rates = limits.operations_per_s
    return [
        "## The machine's limits",
        f"Reading memory: **{limits.read_bytes_per_s / 1e9:.1f} GB/s**. Matrix products: "
        f"**{rates['bfloat16'] / 1e9:.0f} GFLOP/s** in bfloat16, "
        f"**{rates['float32'] / 1e9:.0f}** in float32.",
        table(("reading 1 GiB", "type", "GB/s"), reads),
        table(("multiplying by 8192 x 2048", "type", "GFLOP/s"), products),
    ]


def _decode(report: Report) -> list[str]:
    contexts = sorted({row.context for row in report.decode})
    cells = {
        (row.rows, row.context): f"{ms(row.seconds)} ({percent(report.fraction(row))})"
        for row in report.decode
    }
    rows = [
        [num_rows, *(cells.get((num_rows, context), "-") for context in contexts)]
        for num_rows in sorted({row.rows for row in report.decode})
    ]
    columns = ("rows", *(f"context {context}" for context in contexts))
    return ["Decode, ms for a step of all rows (of the limit).", table(columns, rows)]


def _prefill(report: Report) -> list[str]:
    rows = [
        (row.prompt_tokens, ms(row.seconds), gigaflops(row), percent(report.fraction(row)))
        for row in report.prefill
    ]
    return ["Prefill, one prompt.", table(("tokens", "ms", "GFLOP/s", "of limit"), rows)]


def _vision(report: Report) -> list[str]:
    rows = [
        (
            row.tiles,
            ms(row.seconds),
            f"{row.tiles / row.seconds:.2f}",
            gigaflops(row),
            percent(report.fraction(row)),
        )
        for row in report.vision
    ]
    columns = ("tiles", "ms", "tiles/s", "GFLOP/s", "of limit")
    return ["Vision, tower and projector, tiles of one step.", table(columns, rows)]


def _sampler(report: Report) -> list[str]:
    rows = [
        (
            row.rows,
            row.logits,
            ms(row.greedy_step_s),
            ms(row.sampled_step_s),
            percent(row.share),
        )
        for row in report.sampler
    ]
    columns = ("rows", "logits", "greedy step, ms", "sampled step, ms", "share of sampling")
    about = (
        "Sampling with temperature 0.5 and top_p 0.6, from the model's own logits and from the "
        "same made as sharp as a trained model's."
    )
    return [about, table(columns, rows)]


def _loads(report: Report) -> list[str]:
    rows = [
        (
            load.load,
            load.prompt_tokens,
            load.output_tokens_per_s,
            load.requests_per_s,
            f"{load.ttft_p50_ms:.0f} / {load.ttft_p99_ms:.0f}",
            f"{load.itl_p50_ms:.1f} / {load.itl_p99_ms:.1f}",
            f"{load.longest_gap_p99_ms:.0f}",
        )
        for load in report.loads
    ]
    columns = (
        "load",
        "tokens in",
        "tokens/s out",
        "requests/s",
        "first token, ms (p50 / p99)",
        "further token, ms (p50 / p99)",
        "longest gap, ms (p99)",
    )
    parts = [f"## Over HTTP: {report.served}"]
    if report.start_s is not None:
        parts.append(f"First answer {report.start_s:.1f} s after the start.")
    return [*parts, table(columns, rows)]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def gigaflops(row: PrefillRow | VisionRow) -> str:
    return f"{row.work.operations / row.seconds / 1e9:.0f}"
