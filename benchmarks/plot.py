"""The plot of a run: how near to the limits, and what clients saw."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.report import PLOT_FILE, Report

PANEL_INCHES = (6.0, 4.2)


def write_plot(folder: Path, report: Report) -> None:
    """Only panels of what was measured; a run of the limits alone has those as bars."""
    panels = [
        draw
        for draw, has_data in (
            (_decode_times, report.decode),
            (_decode_fractions, report.decode),
            (_product_fractions, report.prefill or report.vision),
            (_loads, report.loads),
            (_limits, report.limits is not None and not report.decode),
        )
        if has_data
    ]
    columns = min(2, len(panels))
    rows = -(-len(panels) // 2)
    width, height = PANEL_INCHES
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for draw, axis in zip(panels, axes.flat, strict=False):
        draw(axis, report)
    figure.suptitle(f"{report.label}, {report.date}")
    figure.savefig(folder / PLOT_FILE, dpi=110)
    pyplot.close(figure)


def _decode_times(axis: Axes, report: Report) -> None:
    for num_rows in sorted({row.rows for row in report.decode}):
        own = [row for row in report.decode if row.rows == num_rows]
        contexts = [row.context for row in own]
        line = axis.plot(contexts, [row.seconds * 1e3 for row in own], "o-", label=f"{num_rows}")
        least_ms = [report.fraction(row) * row.seconds * 1e3 for row in own]
        axis.plot(contexts, least_ms, ":", color=line[0].get_color())
    axis.set(title="Decode step (dotted: limit)", xlabel="context, tokens", ylabel="ms")
    _ticks_at(axis, [row.context for row in report.decode])
    axis.set_yscale("log")
    axis.legend(title="rows", fontsize="small")


def _decode_fractions(axis: Axes, report: Report) -> None:
    for context in sorted({row.context for row in report.decode}):
        own = [row for row in report.decode if row.context == context]
        fractions = [100 * report.fraction(row) for row in own]
        axis.plot([row.rows for row in own], fractions, "o-", label=f"{context}")
    axis.set(title="Decode", xlabel="rows", ylabel="% of the limit", ylim=(0, 105))
    _ticks_at(axis, [row.rows for row in report.decode])
    axis.legend(title="context", fontsize="small")


def _ticks_at(axis: Axes, places: list[int]) -> None:
    axis.set_xscale("log", base=2)
    ticks = sorted(set(places))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def _product_fractions(axis: Axes, report: Report) -> None:
    bars = [(f"prompt of {row.prompt_tokens}", report.fraction(row)) for row in report.prefill]
    bars += [(f"tiles: {row.tiles}", report.fraction(row)) for row in report.vision]
    axis.barh([name for name, _ in bars], [100 * fraction for _, fraction in bars])
    axis.invert_yaxis()
    axis.set(title="Prefill and vision", xlabel="% of the rate of matrix products", xlim=(0, 105))


def _loads(axis: Axes, report: Report) -> None:
    names = [load.load for load in report.loads]
    bars = axis.barh(names, [load.output_tokens_per_s for load in report.loads])
    labels = [
        f"first {load.ttft_p50_ms:.0f} ms, further {load.itl_p50_ms:.1f} ms"
        for load in report.loads
    ]
    axis.bar_label(bars, labels, fontsize="x-small", padding=3)
    axis.margins(x=0.5)
    axis.invert_yaxis()
    axis.set(title="Over HTTP (medians)", xlabel="output tokens/s")


def _limits(axis: Axes, report: Report) -> None:
    assert report.limits is not None
    rates = report.limits.operations_per_s
    bars = {
        "reading, GB/s": report.limits.read_bytes_per_s / 1e9,
        "bfloat16, 10 GFLOP/s": rates["bfloat16"] / 1e10,
        "float32, 10 GFLOP/s": rates["float32"] / 1e10,
    }
    axis.bar_label(axis.barh(list(bars), list(bars.values())), fmt="%.1f")
    axis.set(title="The machine's limits")
