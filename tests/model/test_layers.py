"""Matrix products on CPUs with and without 16-bit arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from server.kernels.machine import has_half_units
from server.model import layers
from server.model.checkpoint import pack_for_cpu
from server.model.config import read_checkpoint
from server.model.layers import (
    MIN_ROWS_TO_WIDEN,
    pack_linear_layers,
    project,
)
from server.model.packed import PackedLinear
from tests.model.loading import all_logits, encode_tiles, load, relative_difference
from tools.random_checkpoint import write_checkpoint


def on_cpu_with(monkeypatch: pytest.MonkeyPatch, *, half_units: bool) -> None:
    monkeypatch.setattr(layers, "has_half_units", lambda dtype: half_units)


def layer_and_input(kind: str, rows: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(rows)
    if kind == "linear":
        return nn.Linear(512, 24), torch.randn(rows, 512)
    return nn.Conv2d(48, 24, 1), torch.randn(1, 48, 1, rows)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, MIN_ROWS_TO_WIDEN - 1, MIN_ROWS_TO_WIDEN, 200])
def test_many_rows_are_widened_where_the_cpu_has_no_16_bit_units(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, rows: int
) -> None:
    layer, hidden = layer_and_input(kind, rows)
    layer, hidden = layer.to(dtype), hidden.to(dtype)
    dtypes: list[torch.dtype] = []
    layer.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    for half_units in (True, False):
        on_cpu_with(monkeypatch, half_units=half_units)
        projected = project(layer, hidden)
        exact = layer.double()(hidden.double())
        layer.to(dtype)
        assert projected.dtype == dtype
        torch.testing.assert_close(projected.double(), exact, atol=3e-2, rtol=3e-2)
    is_widened = rows >= MIN_ROWS_TO_WIDEN
    assert dtypes[0::2] == [dtype, torch.float32 if is_widened else dtype]


def test_float32_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu_with(monkeypatch, half_units=False)
    layer, hidden = layer_and_input("linear", 64)
    assert torch.equal(project(layer, hidden), layer(hidden))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_compute_the_same(tmp_path: Path, dtype: str) -> None:
    """Of the whole model, tower and projector too, with and without biases."""
    folder = write_checkpoint(tmp_path)
    plain, packed = load(folder, dtype=dtype), load(folder, dtype=dtype)
    pack_linear_layers(packed)
    kinds = {type(module) for module in packed.modules()}
    is_packable = dtype == "float32" or has_half_units(getattr(torch, dtype))
    assert (PackedLinear in kinds, nn.Linear in kinds) == (is_packable, not is_packable)
    closeness = 1e-5 if dtype == "float32" else 3e-2
    sequences = [[1, 2, 3, 4, 5], [9, 8, 7]]
    ours, theirs = all_logits(packed, sequences), all_logits(plain, sequences)
    for mine, other in zip(ours, theirs, strict=True):
        finite = other.isfinite()
        assert torch.equal(finite, mine.isfinite())
        assert relative_difference(mine[finite], other[finite]) < closeness
    tiles = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8)
    with torch.inference_mode():
        ours, theirs = (encode_tiles(model, tiles, [16] * 3) for model in (packed, plain))
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_difference(mine, other) < closeness


def test_a_packed_layer_keeps_no_second_copy() -> None:
    layer = nn.Sequential(nn.Linear(64, 32))
    pack_linear_layers(layer)
    assert [name for name, _ in layer.named_parameters()] == ["0.bias"]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_head_is_held_once(tmp_path: Path, is_tied: bool, dtype: str) -> None:
    """Tied to it, the embedding is left in the file, whatever type it has there."""
    folder = write_checkpoint(tmp_path, is_tied=is_tied)
    plain, packed = load(folder, dtype=dtype), load(folder, dtype=dtype)
    pack_for_cpu(packed, read_checkpoint(folder))
    decoder = packed.language_model
    is_packable = dtype == "float32" or has_half_units(getattr(torch, dtype))
    assert isinstance(decoder.lm_head, PackedLinear) == is_packable
    in_memory = any(name.endswith("embed_tokens.weight") for name, _ in packed.named_parameters())
    assert in_memory == (not is_tied or not is_packable)
    ids = torch.tensor([3, 1, 2, 3])
    assert torch.equal(packed.embed(ids), plain.embed(ids))
    closeness = 1e-5 if dtype == "float32" else 3e-2
    ours, theirs = (all_logits(model, [[1, 2, 3]])[0] for model in (packed, plain))
    finite = theirs.isfinite()
    assert relative_difference(ours[finite], theirs[finite]) < closeness
