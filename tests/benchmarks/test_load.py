"""The load generator against a real server, and what a side-by-side makes of its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loads import Load, LoadRefused, LoadResult, run_load
from benchmarks.peer import BOUNDS, Comparison, Measured, markdown, median_of
from benchmarks.report import describe_machine
from benchmarks.servers import free_port, our_command, started, tree_pss_bytes

RESULT = LoadResult("8 clients", 8, 270, 100.0, 1.0, 100.0, 200.0, 10.0, 20.0, 30.0)


def test_a_load_counts_what_a_server_says(tmp_path: Path) -> None:
    port = free_port()
    with started(our_command(None, port), port, log=tmp_path / "server.log") as server:
        assert server.first_answer_s is not None and server.process_id is not None
        assert tree_pss_bytes(server.process_id) > 10**8
        load = Load("few", "--concurrency 2 --requests 4 --prompt-words 8 --output-tokens 5")
        result = run_load(server.url, server.model, load, seed=1)
        assert (result.load, result.concurrency) == ("few", 2)
        assert result.prompt_tokens > 8
        assert result.output_tokens_per_s == pytest.approx(5 * result.requests_per_s, rel=0.05)
        assert 0 < result.ttft_p50_ms <= result.ttft_p99_ms
        with pytest.raises(LoadRefused, match="context"):
            beyond = Load("beyond", "--requests 1 --prompt-words 20000 --output-tokens 5")
            run_load(server.url, server.model, beyond, seed=1)


def test_a_side_by_side_compares_medians_and_says_what_is_not_reached() -> None:
    comparison = Comparison("today", describe_machine("cpu"), "mid", weight_bytes=10**9)
    for number, rate in enumerate((100.0, 150.0, 900.0), start=1):
        ours = replace(RESULT, output_tokens_per_s=rate, ttft_p50_ms=90.0, itl_p50_ms=6.0)
        comparison.measured.append(Measured(number, "ours", ours, None))
        comparison.measured.append(Measured(number, "peer", RESULT, None))
    assert median_of(comparison, "ours", "8 clients", "output_tokens_per_s") == 150.0
    text = markdown(comparison)
    assert "1.50 **aim**" in text  # tokens a second
    assert "0.90 **NO**" in text  # first token
    assert "0.60 **aim**" in text  # further token


def test_a_bound_holds_at_its_edge() -> None:
    tokens, first = BOUNDS["output_tokens_per_s"], BOUNDS["ttft_p50_ms"]
    assert [tokens.judge(ratio) for ratio in (1.19, 1.2, 1.5)] == ["NO", "yes", "aim"]
    assert [first.judge(ratio) for ratio in (0.81, 0.8, 0.5)] == ["NO", "yes", "aim"]
