"""The compiled loops between matrix products against the same in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.kernels import machine
from server.model import pointwise
from server.model.layers import GatedMLP, RMSNorm, RotaryEmbedding, rotate

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""How far off a number may be, as a share of itself: half of what the type can tell apart."""

SHAPES = [(1, 1024), (300, 96), (7, 224), (5, 6)]
"""Rows and their size; the last is no multiple of any vector."""


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


def assert_as_near_as_can_be(result: Tensor, exact: Tensor) -> None:
    assert exact.dtype == torch.float64
    closeness = DTYPES[result.dtype]
    torch.testing.assert_close(result.double(), exact, rtol=1.01 * closeness, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1)
    exact = F.rms_norm(hidden.double(), (shape[1],), weight.double(), 1e-5)
    assert_as_near_as_can_be(pointwise.norm(hidden, weight, eps=1e-5), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_rows, size = shape
    both = normal(num_rows, 2 * size, dtype=dtype)
    gates, values = both.double().chunk(2, dim=-1)
    assert_as_near_as_can_be(pointwise.gate(both), F.silu(gates) * values)


def test_gates_far_from_zero_neither_overflow_nor_vanish() -> None:
    gates = torch.tensor([[-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30, -0.0]])
    result = pointwise.gate(torch.cat([gates, torch.ones_like(gates)], dim=-1))
    torch.testing.assert_close(result, F.silu(gates), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (5, 12), (1, 2)])
def test_rotate(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 17, 4000])
    rotation = RotaryEmbedding(head_dim, theta=1e4, scaling=None)(positions)
    # As in the decoder: the first heads of rows that have more.
    wider = normal(len(positions), heads + 2, head_dim, dtype=dtype)
    cosine, signed_sine = (each.double() for each in rotation)
    turned = wider[:, :heads].double()
    exact = turned * cosine + turned.roll(head_dim // 2, dims=-1) * signed_sine
    assert_as_near_as_can_be(pointwise.rotate(wider[:, :heads], rotation), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    """The sampler looks for it. The bits of some would become a number if they were rounded."""
    rows = torch.ones(2, 64, dtype=dtype)
    rows[0, 3] = float("nan")
    if dtype == torch.bfloat16:
        rows.view(torch.int16)[0, 3] = -1
    assert pointwise.norm(rows, torch.ones(64, dtype=dtype), eps=1e-5)[0].isnan().all()
    assert pointwise.gate(rows).isnan().sum() == 1
    rotation = RotaryEmbedding(64, theta=1e4, scaling=None)(torch.tensor([5, 6]))
    assert pointwise.rotate(rows[:, None], rotation).isnan().sum() == 2


def test_threads_that_share_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    both = normal(300, 256, dtype=torch.bfloat16)
    alone = pointwise.gate(both)
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = pointwise.gate(both)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_layers_are_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(RMSNorm(64, eps=1e-5), GatedMLP(64, 96, bias=True))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    heads = normal(9, 4, 16, dtype=torch.float32)
    rotation = RotaryEmbedding(16, theta=1e4, scaling=None)(torch.arange(9))

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return layers(heads.view(9, 64)), rotate(heads, rotation)

    compiled = outputs()
    monkeypatch.setitem(sys.modules, "numba", None)
    machine.has_compiler.cache_clear()
    try:
        assert not pointwise.is_compiled(heads)
        plain = outputs()
    finally:
        machine.has_compiler.cache_clear()
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
