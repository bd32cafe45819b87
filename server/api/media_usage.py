"""What is told of the media of one request: in `usage.media`, in `Server-Timing`, in the metrics.

The stages before the engine are known when the request is prepared, the last with the first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.chat.media import MediaReport
from server.telemetry.metrics import Metrics

STAGES = ("fetch", "decode", "preprocess", "encode")


class MediaUsage:
    """One for each request; tells nothing until it is told something."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._reports: Sequence[tuple[MediaReport, int | None]] = ()
        self._encode_times_s: Sequence[float] = ()

    def prepared(self, reports: Sequence[tuple[MediaReport, int | None]]) -> None:
        """Each medium with its place among those that go to the engine."""
        self._reports = reports
        for report, _ in reports:
            self._metrics.count_medium(report.kind, report.error_code or report.cache)
            for stage, seconds in _seconds_before_engine(report).items():
                self._metrics.observe_media_stage(report.kind, stage, seconds)

    def encoded(self, times_s: Sequence[float]) -> None:
        """How long the engine encoded each; may be told once."""
        self._encode_times_s = times_s
        for report, place in self._reports:
            if place is not None:
                self._metrics.observe_media_stage(report.kind, "encode", self._encode_s(place))

    @property
    def has_media(self) -> bool:
        return bool(self._reports)

    def usage(self) -> list[dict[str, object]]:
        return [_item(report, self._encode_s(place)) for report, place in self._reports]

    def headers(self) -> dict[str, str]:
        """`Server-Timing` with the sums of the stages, as far as they are known by now."""
        if not self._reports:
            return {}
        totals = dict.fromkeys(STAGES, 0.0)
        for report, place in self._reports:
            for stage, seconds in _seconds_before_engine(report).items():
                totals[stage] += seconds
            totals["encode"] += self._encode_s(place)
        return {
            "server-timing": ", ".join(
                f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in totals.items()
            )
        }

    def _encode_s(self, place: int | None) -> float:
        if place is None or place >= len(self._encode_times_s):
            return 0.0
        return self._encode_times_s[place]


def _seconds_before_engine(report: MediaReport) -> Mapping[str, float]:
    return {
        "fetch": report.fetch_s,
        "decode": report.decode_s,
        "preprocess": report.preprocess_s,
    }


def _item(report: MediaReport, encode_s: float) -> dict[str, object]:
    width, height = report.size or (None, None)
    return {
        "path": report.path,
        "type": report.kind,
        "width": width,
        "height": height,
        "duration_s": report.duration_s,
        "frames": report.num_frames,
        "grids": report.num_grids,
        "tokens": report.num_tokens,
        "options": dict(report.options),
        "cache": report.cache,
        "error": report.error_code,
        "fetch_ms": _milliseconds(report.fetch_s),
        "decode_ms": _milliseconds(report.decode_s),
        "preprocess_ms": _milliseconds(report.preprocess_s),
        "encode_ms": _milliseconds(encode_s),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
