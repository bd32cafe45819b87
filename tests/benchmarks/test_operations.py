"""What the benchmarks hold times against, worked out by hand for small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.limits import Limits, Probe
from benchmarks.operations import Work, decode_work, prefill_work, tower_operations
from server.model.config import CheckpointInfo, read_checkpoint
from tools.random_checkpoint import write_checkpoint

LIMITS = Limits(
    reads=(Probe("slow", "bfloat16", 10.0), Probe("fast", "float32", 40.0)),
    products=(
        Probe("a", "bfloat16", 100.0),
        Probe("b", "bfloat16", 200.0),
        Probe("c", "float32", 50.0),
    ),
)


@pytest.fixture
def tiny_info(tmp_path: Path) -> CheckpointInfo:
    return read_checkpoint(write_checkpoint(tmp_path))


@pytest.fixture
def info(tiny_info: CheckpointInfo) -> CheckpointInfo:
    """Two layers, 2 heads and 1 key/value head of 4, hidden 8, feed-forward 16, 10 logits."""
    text = replace(
        tiny_info.text,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_size=8,
        intermediate_size=16,
        logits_rows=10,
        attention_bias=False,
        mlp_bias=False,
    )
    return replace(tiny_info, text=text)


# query 8 x 8, key and value 8 x 4 each, output 8 x 8, gate, up and down 8 x 16 each
LAYER = 64 + 2 * 32 + 64 + 3 * 128
HEAD = 10 * 8


def test_a_decode_step_reads_every_weight_once_and_all_keys_and_values(
    info: CheckpointInfo,
) -> None:
    work = decode_work(info, "bfloat16", num_rows=3, context=5)
    # Scores and weighted sum: two products of 8 numbers for each of 5 positions, in both layers.
    assert work.operations == 3 * (2 * (2 * LAYER + HEAD) + 2 * 2 * 2 * 8 * 5)
    norms = 2 * 2 * 8 + 8
    keys_and_values = 2 * 2 * 4
    assert work.num_bytes == 2 * (2 * LAYER + norms + HEAD) + 2 * 3 * 5 * keys_and_values


def test_a_prompt_needs_of_the_last_layer_little_more_than_keys_and_values(
    info: CheckpointInfo,
) -> None:
    work = prefill_work(info, num_tokens=3)
    matrices = 3 * LAYER + 3 * 64 + (LAYER - 64) + HEAD
    pairs = (1 + 2 + 3) + 3
    assert work.operations == 2 * matrices + 2 * 2 * 8 * pairs


def test_every_patch_of_a_tile_sees_every_other(tiny_info: CheckpointInfo) -> None:
    tower = tiny_info.tower
    assert tower is not None
    twice = replace(tower, num_layers_used=2 * tower.num_layers_used)
    patches, hidden = tower.num_patches, tower.hidden_size
    layers = tower_operations(twice) - tower_operations(tower)
    matrices = 4 * hidden**2 + 2 * hidden * tower.intermediate_size
    assert layers == tower.num_layers_used * (2 * patches * matrices + 4 * patches**2 * hidden)


def test_work_takes_as_long_as_what_the_machine_is_slower_at() -> None:
    assert Work(operations=400, num_bytes=40).least_s(LIMITS, "bfloat16") == 2.0
    assert Work(operations=400, num_bytes=400).least_s(LIMITS, "bfloat16") == 10.0
    assert Work(operations=400, num_bytes=0).least_s(LIMITS, "float32") == 8.0
