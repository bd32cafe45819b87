"""The admin port's application, and what it says of a server that is used."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.admin import AdminApp
from server.api.metrics import read_engine
from server.config import HttpConfig
from server.core import TokenEvent
from server.engine.client import EngineStats, QueueStats
from server.engine.facts import EngineTotals
from server.telemetry.metrics import Metrics
from tests.conftest import END, Serve, Server, TextPreparer, assert_error, chat, until
from tests.fakes import FakeEngine

URL = "/v1/chat/completions"
REPOSITORY = Path(__file__).parents[2]


def ask(metrics: Metrics, method: str, path: str) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(AdminApp(metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.request(method, path)

    return asyncio.run(asked())


def samples(metrics: Metrics) -> Mapping[str, float]:
    """What a scraper reads, by name and labels as they are printed."""
    text = ask(metrics, "GET", "/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found
            found[name] = sample.value
    return found


def test_metrics_are_plain_text_for_prometheus() -> None:
    response = ask(Metrics(), "GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.headers["x-request-id"]
    assert "# TYPE hcx_http_requests_total counter" in response.text
    assert ask(Metrics(), "HEAD", "/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/health", "/v1/models", "/%6detrics2"])
def test_there_is_nothing_else(path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert_error(ask(Metrics(), method, path), 404, "unknown_url")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_metrics_are_only_read(method: str) -> None:
    response = ask(Metrics(), method, "/metrics")
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD"


def test_a_fault_is_an_error_of_ours() -> None:
    metrics = Metrics()
    calls: list[int] = []

    def read() -> list[object]:
        calls.append(1)
        if len(calls) > 1:  # the first is to learn the names
            raise ZeroDivisionError("secret")
        return []

    metrics.add_reading(read)  # type: ignore[arg-type]
    assert_error(ask(metrics, "GET", "/metrics"), 500, "internal_error")


def test_the_main_port_has_no_metrics(server: Server) -> None:
    assert_error(server.http.get("/metrics"), 404, "unknown_url")


def test_every_name_says_whose_and_what_it_is(server: Server) -> None:
    text = server.app.state.metrics.text().decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 25
    described = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    for family in families:
        if family.name.endswith("_created"):
            continue  # the library's own, beside each of its counters
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert re.search(rf"`{name}[`{{]", described), name
        assert family.name.startswith("hcx_")
        assert family.documentation.endswith(".")
        assert not any(unit in family.name for unit in ("_ms", "_kb", "_mib"))


def test_what_the_engine_says_is_shown() -> None:
    """Told once with a value of its own for everything, so that no two can be confused."""
    engine = FakeEngine(status="silent")
    engine.worker_pid = 4321
    engine.num_restarts = 3
    engine.queue = QueueStats(5, 6, waiting_prompt_tokens=7, waiting_tile_bytes=8)
    steps = (2, 0, 1, *[0] * 10, 4)
    totals = EngineTotals(7, 8.5, steps, 9, 10, 11, 12, 13, 14, 15)
    engine.stats = EngineStats(16, 17, 18, 19, 20, 21, 22, totals)
    metrics = Metrics()
    metrics.add_reading(lambda: read_engine(engine))
    found = samples(metrics)
    bucket = "hcx_engine_step_duration_seconds_bucket"
    expected = {
        'hcx_engine_status{status="silent"}': 1,
        'hcx_engine_status{status="ready"}': 0,
        'hcx_engine_info{attention="fake",device="cpu",dtype="float32",pid="4321"}': 1,
        "hcx_engine_restarts_total": 3,
        "hcx_requests_running": 5,
        "hcx_requests_waiting": 6,
        "hcx_waiting_prompt_tokens": 7,
        "hcx_waiting_tile_bytes": 8,
        "hcx_engine_requests_running": 16,
        "hcx_engine_requests_waiting": 17,
        "hcx_kv_blocks": 64,
        "hcx_kv_blocks_used": 18,
        "hcx_kv_blocks_cached": 19,
        "hcx_encoder_cache_held_bytes": 20,
        "hcx_encoder_cache_kept_bytes": 21,
        "hcx_running_tile_bytes": 22,
        "hcx_engine_steps_total": 7,
        "hcx_engine_step_duration_seconds_sum": 8.5,
        "hcx_engine_step_duration_seconds_count": 7,
        f'{bucket}{{le="0.001"}}': 2,
        f'{bucket}{{le="0.002"}}': 2,
        f'{bucket}{{le="0.005"}}': 3,
        f'{bucket}{{le="10.0"}}': 3,
        f'{bucket}{{le="+Inf"}}': 7,
        "hcx_prompt_tokens_computed_total": 9,
        "hcx_generated_tokens_total": 10,
        "hcx_preemptions_total": 11,
        "hcx_prefix_cache_lookup_tokens_total": 12,
        "hcx_prefix_cache_hit_tokens_total": 13,
        "hcx_encoder_cache_hits_total": 14,
        "hcx_encoder_cache_misses_total": 15,
    }
    assert {name: found[name] for name in expected} == expected
    assert sum(found[name] for name in found if name.startswith("hcx_engine_status{")) == 1


def test_an_engine_that_is_not_there_yet_is_shown_too() -> None:
    metrics = Metrics()
    metrics.add_reading(lambda: read_engine(FakeEngine(status="loading", facts=None)))
    found = samples(metrics)
    assert found["hcx_kv_blocks"] == 0
    assert found['hcx_engine_info{attention="",device="",dtype="",pid=""}'] == 1


def finished(server: Server) -> dict[str, float]:
    """How the answers of the server ended."""
    start = 'hcx_answers_finished_total{reason="'
    found = samples(server.app.state.metrics)
    return {name[len(start) : -2]: found[name] for name in found if name.startswith(start)}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("engine", "fields", "reason"),
    [
        (FakeEngine([*b"hello", END]), {}, "stop"),
        (FakeEngine([*b"hello", END]), {"stop": "l"}, "stop"),
        (FakeEngine([*b"hello", END]), {"max_tokens": 2}, "length"),
        (FakeEngine(list(b"he"), error_code="worker_restarting"), {}, "worker_restarting"),
        (FakeEngine(list(b"he"), finish_reason="abort"), {}, "abort"),
    ],
    ids=["end", "stop string", "limit", "error", "abort"],
)
def test_answers_are_counted_by_how_they_ended(
    serve: Serve, engine: FakeEngine, fields: dict[str, object], reason: str, stream: bool
) -> None:
    server = serve(engine=engine)
    server.http.post(URL, json=chat(stream=stream, **fields))
    assert finished(server) == {reason: 1}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_whose_client_leaves_or_whose_time_is_up_is_an_abort(
    serve: Serve, stream: bool
) -> None:
    engine = FakeEngine([*b"hello", END], gate=asyncio.Semaphore(1))
    server = serve(engine=engine, http=HttpConfig(request_timeout_s=0.3))
    server.http.post(URL, json=chat(stream=stream))
    assert finished(server) == {"abort": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + URL, json=chat(stream=stream), timeout=0.05)
    until(lambda: finished(server) == {"abort": 2})


@pytest.mark.parametrize("stream", [True, False])
def test_each_choice_is_counted_by_how_it_ended(serve: Serve, stream: bool) -> None:
    """One by its end, one by its limit, and one that nobody waits for."""

    def tokens(request: object, choice: int) -> list[int]:
        return [[97, END], [97, 98, 99, 100], [97, 98, 99, 100]][choice]

    engine = FakeEngine(tokens, gate=asyncio.Semaphore(10))
    server = serve(engine=engine, http=HttpConfig(request_timeout_s=0.3))
    for num_choices in (2, 3):
        body = chat(stream=stream, n=num_choices, max_tokens=4)
        server.http.post(URL, json=body)
    # Six events of the first request; of the second four, which are the end of one choice.
    assert finished(server) == {"stop": 2, "length": 1, "abort": 2}


def test_a_fault_of_ours_in_an_answer_is_counted_as_one(serve: Serve) -> None:
    class Broken:
        def __aiter__(self) -> Broken:
            return self

        async def __anext__(self) -> TokenEvent:
            raise ZeroDivisionError

        def close(self) -> None:
            pass

    class BrokenEngine(FakeEngine):
        async def submit(self, request: object, tiles: object) -> Broken:  # type: ignore[override]
            return Broken()

    server = serve(engine=BrokenEngine())
    assert_error(server.http.post(URL, json=chat()), 500, "internal_error")
    assert finished(server) == {"internal_error": 1}


def test_requests_are_counted_by_status_without_those_for_health(serve: Serve) -> None:
    server = serve(preparer=TextPreparer(delay_s=0.2))
    for path in ("/health", "/ready", "/v1/models", "/v1/models", "/nothing"):
        server.http.get(path)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + URL, json=chat(), timeout=0.05)

    def found() -> dict[str, float]:
        everything = samples(server.app.state.metrics)
        return {
            name: value
            for name, value in everything.items()
            if name.startswith("hcx_http_requests_total")
        }

    expected = {"200": 2, "404": 1, "499": 1}
    until(
        lambda: (
            found()
            == {
                f'hcx_http_requests_total{{status="{key}"}}': value
                for key, value in expected.items()
            }
        )
    )


def test_fields_that_nobody_knows_are_counted(server: Server) -> None:
    server.http.post(URL, json=chat(foo=1, bar=2))
    server.http.post(URL, json=chat(foo=1))
    assert samples(server.app.state.metrics)["hcx_unknown_parameters_total"] == 3


def test_what_is_in_progress_is_shown(serve: Serve) -> None:
    engine = FakeEngine([*b"hello", END], gate=asyncio.Semaphore(1))
    server = serve(engine=engine)

    def running() -> float:
        return samples(server.app.state.metrics)["hcx_http_requests_running"]

    assert running() == 0
    with server.http.stream("POST", URL, json=chat(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        assert running() == 1
    until(lambda: running() == 0)


def test_a_priority_reaches_the_engine(server: Server) -> None:
    for fields, expected in (({}, 0), ({"priority": -3}, -3), ({"priority": None}, 0)):
        assert server.http.post(URL, json=chat(**fields)).status_code == 200
        request, _ = server.engine.submitted[-1]
        assert request.priority == expected
