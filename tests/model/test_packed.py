"""Packed linear layers, by our own loop and by oneDNN, against the same in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from server.kernels import machine
from server.kernels.machine import ProductUnits, product_units
from server.kernels.products import MULTIPLIERS
from server.model.packed import PackedLinear, _warn_of_another_order

REPOSITORY = Path(__file__).parents[2]

needs_product_units = pytest.mark.skipif(
    not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16"
)

UNITS = product_units(torch.bfloat16)

MOST_ROWS = max(each.task_rows for each in MULTIPLIERS.values())
NUM_ROWS = (1, 5, 6, 7, 13, 16, 17, 48, 97, MOST_ROWS + 1, 300)
"""With six by pairs and sixteen by tiles multiplied at once, whole such parts and others."""

BLOCKS = [(128, 64), (192, 1024), (224, 224), (80, 32), (64, 98), (128, 18), (64, 4096)]
"""Outputs and inputs that lie in blocks, the last of which need not be full."""

FILLED_UP = [(100, 64), (8, 2), (1579, 160)]
"""Which lie in blocks after rows of zeros have been put behind their outputs."""

NO_BLOCKS = [(64, 33), (7, 3)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def layer(
    out: int, size: int, *, has_bias: bool = True, units: ProductUnits | None = None
) -> tuple[PackedLinear, Tensor, Tensor]:
    """A layer, and its weight and bias in float64."""
    weight, bias = normal(out, size, seed=1) / size**0.5, normal(out, seed=2)
    packed = PackedLinear(weight, bias if has_bias else None, units=units)
    return packed, weight.double(), bias.double() if has_bias else torch.zeros(out).double()


def assert_close(result: Tensor, exact: Tensor) -> None:
    assert result.dtype == torch.bfloat16
    # One rounding at the end, and sums of float32.
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [*BLOCKS, *FILLED_UP, *NO_BLOCKS], ids=str)
def test_a_layer_is_the_product(shape: tuple[int, int], has_bias: bool, num_rows: int) -> None:
    rows = normal(num_rows, shape[1])
    for units in UNITS or (None,):
        packed, weight, bias = layer(*shape, has_bias=has_bias, units=units)
        assert_close(packed(rows), F.linear(rows.double(), weight, bias))


@needs_product_units
@pytest.mark.parametrize("units", UNITS)
def test_many_tasks(units: ProductUnits) -> None:
    packed, weight, bias = layer(192, 1024, units=units)
    rows = normal(4 * MOST_ROWS - 5, 1024)
    assert_close(packed(rows), F.linear(rows.double(), weight, bias))


@pytest.mark.parametrize("units", [each for each in UNITS if each == "tiles"])
def test_our_tiles_and_those_of_the_library_in_turn(units: ProductUnits) -> None:
    """Neither takes the other's shapes of tiles for its own."""
    packed, weight, bias = layer(192, 96, units=units)
    rows = normal(37, 96)
    exact = F.linear(rows.double(), weight, bias)
    for _ in range(20):
        for num_rows in (1, 5, 37):
            some = rows[:num_rows]
            assert_close(packed(some), exact[:num_rows])
            assert_close(packed._multiply_by_library(some, "none", ""), exact[:num_rows])


@needs_product_units
def test_our_loop_is_taken_where_the_weight_lies_in_blocks() -> None:
    assert all(layer(*shape)[0].has_blocks for shape in [*BLOCKS, *FILLED_UP])
    assert not any(layer(*shape)[0].has_blocks for shape in NO_BLOCKS)


@needs_product_units
def test_it_is_not_taken_where_something_else_was_packed(caplog: pytest.LogCaptureFixture) -> None:
    """As with a version of oneDNN that packs in another order."""
    _warn_of_another_order.cache_clear()
    packed, weight, _ = layer(128, 64)
    assert packed._lies_in_blocks(weight.bfloat16())
    for changed in ((0, 0), (127, 63)):
        other = weight.bfloat16()
        other[changed] += 1
        assert not packed._lies_in_blocks(other)
    assert "oneDNN packs weights in another order" in caplog.text
    assert len(caplog.messages) == 1


@needs_product_units
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("shape", [*BLOCKS, *FILLED_UP], ids=str)
def test_a_row_is_computed_as_it_would_be_alone(
    shape: tuple[int, int], units: ProductUnits
) -> None:
    packed, _, _ = layer(*shape, units=units)
    rows = normal(MOST_ROWS + 20, shape[1])
    alone = torch.cat([packed(row[None]) for row in rows])
    for start, stop in ((0, len(rows)), (3, 10), (1, MOST_ROWS), (7, 7 + 6), (7, 7 + 16)):
        assert torch.equal(packed(rows[start:stop]), alone[start:stop])


@needs_product_units
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gated(num_rows: int, has_bias: bool, units: ProductUnits) -> None:
    packed, weight, bias = layer(2 * 192, 64, has_bias=has_bias, units=units)
    assert packed.can_gate
    assert not layer(2 * 96, 64)[0].can_gate
    rows = normal(num_rows, 64)
    gates, values = F.linear(rows.double(), weight, bias).chunk(2, dim=-1)
    assert_close(packed.gated(rows), F.silu(gates) * values)


@pytest.mark.parametrize("shape", [(128, 64), (100, 64), (64, 64)], ids=str)
def test_rows_may_lie_apart_and_have_any_number_of_dimensions(shape: tuple[int, int]) -> None:
    packed, _, _ = layer(*shape)
    wide = normal(2, 5, 3 * 64)
    apart = wide[:, :, 64:128]
    assert torch.equal(packed(apart), packed(apart.contiguous()))
    crosswise = normal(64, 9).T
    assert torch.equal(packed(crosswise), packed(crosswise.contiguous()))
    assert packed(wide[:0, :, :64]).shape == (0, 5, shape[0])


@needs_product_units
@pytest.mark.parametrize(
    ("rows", "output", "is_gated"),
    [
        (normal(3, 64), normal(128, 3).T, False),
        (normal(3, 64), normal(4, 128), False),
        (normal(3, 64), normal(3, 64), False),
        (normal(3, 64), normal(3, 128), True),
        (normal(3, 32), normal(3, 128), False),
        (normal(64, 3).T, normal(3, 128), False),
        (normal(3, 64).float(), normal(3, 128), False),
        (normal(3, 64), normal(3, 128).float(), False),
    ],
)
def test_tensors_that_do_not_fit_are_refused(rows: Tensor, output: Tensor, is_gated: bool) -> None:
    packed, _, _ = layer(128, 64)
    with pytest.raises(ValueError, match="not what this layer takes"):
        packed.call(rows, output, is_gated=is_gated)


@needs_product_units
def test_a_compiler_for_another_cpu_is_not_asked_for_pairs() -> None:
    command = "import torch; from server.kernels.machine import product_units"
    finished = subprocess.run(
        [sys.executable, "-c", f"{command}; print(product_units(torch.bfloat16))"],
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == "()\n"


@needs_product_units
def test_each_kind_of_units_has_a_loop_of_its_own() -> None:
    rows, output = normal(3, 64), normal(3, 128)
    calls = [layer(128, 64, units=units)[0].call(rows, output) for units in UNITS]
    assert len({call.function.address for call in calls}) == len(UNITS)
    with pytest.raises(ValueError, match="multiplies no tiles"):
        PackedLinear(torch.zeros(128, 64), None, units="tiles")


@needs_product_units
def test_pairs_are_taken_where_tiles_are_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert product_units.__wrapped__(torch.bfloat16) == ("pairs",)


IN_ONE_ARENA = """
import torch
from server.kernels import machine
from server.model.packed import PackedLinear, _warn_of_another_order
from tests.attention.scenes import attend, build_scene

machine.MIN_BYTES_TO_SHARE = 0
torch.manual_seed(0)
layer = PackedLinear(torch.randn(512, 256).bfloat16(), None)
rows = torch.randn(300, 256).bfloat16()

def scene():
    lengths = [(1, 64), (1, 300), (70, 200), (1, 130)]
    return build_scene("cpu-pairs", lengths, page_size=64, head_dim=64, dtype=torch.bfloat16)

torch.set_num_threads(1)
alone, attended = layer(rows), attend(scene())
torch.set_num_threads(4)
assert all(torch.equal(layer(rows), alone) for _ in range(300))
one = scene()
assert all(torch.equal(attend(one), attended) for _ in range(300))
"""


@needs_product_units
def test_threads_do_not_share_what_they_work_in() -> None:
    """Where all memory is of one arena, what is freed too soon is another thread's at once."""
    finished = subprocess.run(
        [sys.executable, "-c", IN_ONE_ARENA],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


@needs_product_units
def test_threads_that_share_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _, _ = layer(192, 1024)
    rows = normal(MOST_ROWS + 20, 1024)
    alone = packed(rows)
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    torch.set_num_threads(2)
    try:
        together = packed(rows)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, alone)


@needs_product_units
def test_what_is_not_a_number_stays_so_and_in_its_row() -> None:
    packed, _, _ = layer(2 * 64, 64)
    rows = normal(8, 64)
    rows[3, 5] = torch.nan
    for result in (packed(rows), packed.gated(rows)):
        assert result[3].isnan().all()
        assert result[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
