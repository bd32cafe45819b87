"""Matrix products on CPUs with and without 16-bit arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from server.model import layers
from server.model.layers import MIN_ROWS_TO_WIDEN, project


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
