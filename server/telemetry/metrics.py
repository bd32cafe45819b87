"""What is counted for an operator, in the text form that Prometheus reads.

Two kinds: what is counted here as it happens, and what others hold anyway and is read when somebody
asks. Knows nothing of ours: it is given numbers and words. Words that become labels must be few,
and never a client's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

__all__ = ["MEDIA_TYPE", "Metric", "Metrics", "counter", "gauge", "histogram", "info", "one_of"]

MEDIA_STAGE_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """One for each server, made where its parts are put together."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._http_requests = Counter(
            "hcx_http_requests",
            "HTTP requests that have ended, by the status of their answer; 499 is a client that "
            "left. Without those for /health and /ready.",
            ["status"],
            registry=self._registry,
        )
        self._answers = Counter(
            "hcx_answers_finished",
            "Admitted answers that have ended: stop, length, abort (the client left or the time of "
            "the request was up) or an error's code.",
            ["reason"],
            registry=self._registry,
        )
        self._rejections = Counter(
            "hcx_requests_rejected",
            "Requests for which there was no room, by what was short.",
            ["reason"],
            registry=self._registry,
        )
        self._unknown_parameters = Counter(
            "hcx_unknown_parameters",
            "Top-level fields of requests that nobody knows and that were ignored.",
            registry=self._registry,
        )

        self._media = Counter(
            "hcx_media",
            "Pictures and videos of prepared requests: hit (finished pixels were there), bytes "
            "(the file was), miss, or an error's code: of one that was left out, or that a request "
            "failed by.",
            ["kind", "outcome"],
            registry=self._registry,
        )
        self._media_stages = Histogram(
            "hcx_media_stage_seconds",
            "How long a picture or video took to fetch, decode, cut into tiles and encode.",
            ["kind", "stage"],
            buckets=MEDIA_STAGE_BOUNDS_S,
            registry=self._registry,
        )

    def count_medium(self, kind: str, outcome: str) -> None:
        self._media.labels(kind, outcome).inc()

    def observe_media_stage(self, kind: str, stage: str, seconds: float) -> None:
        self._media_stages.labels(kind, stage).observe(seconds)

    def count_http_request(self, status: int) -> None:
        self._http_requests.labels(str(status)).inc()

    def count_answer(self, reason: str) -> None:
        self._answers.labels(reason).inc()

    def count_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def count_unknown_parameters(self, count: int) -> None:
        self._unknown_parameters.inc(count)

    def add_reading(self, read: Callable[[], Iterable[Metric]]) -> None:
        """What `read` returns is part of every text from now on; its names must not change."""
        self._registry.register(_Reading(read))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Reading:
    """A function as the registry wants it."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def counter(name: str, help_text: str, value: float) -> Metric:
    """`_total` is added to the name."""
    return CounterMetricFamily(name, help_text, value=value)


def info(name: str, help_text: str, labels: Mapping[str, str]) -> Metric:
    """Facts in words; `_info` is added to the name."""
    return InfoMetricFamily(name, help_text, value=dict(labels))


def one_of(name: str, help_text: str, label: str, value: str, choices: Sequence[str]) -> Metric:
    """A row for each choice, which is 1 for the one that holds and else 0."""
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for choice in choices:
        family.add_metric([choice], float(choice == value))
    return family


def histogram(
    name: str, help_text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> Metric:
    """`counts[i]` is how many values were between `bounds[i - 1]` and `bounds[i]`; the last one,
    how many were beyond all bounds. `total` is the sum of the values."""
    buckets: list[tuple[str, float]] = []
    num_so_far = 0
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        num_so_far += count
        buckets.append((bound, num_so_far))
    return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=total)
