"""Linear layers on CPUs, whose weights lie in the order that oneDNN reads them in.

Where that order is the blocks of `server.kernels.pairs`, bfloat16 rows are multiplied by our own
loop, which reads the same memory: it takes less time than oneDNN, makes no program for each number
of rows, and computes a row as it would alone.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.kernels.machine import Call, ProductUnits, choose_units, product_units, run

FEWEST_ROWS = 4
"""That oneDNN is given: with one or two it reads a weight a fifth more slowly than with four."""


_log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies packed, and nowhere else.

    weight [out_features, in_features], bias [out_features]. For our own loop both
    are filled up with zeros to `num_columns`, whole vectors of outputs.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, units: ProductUnits | None = None
    ) -> None:
        """With the CPU's fastest units, or those named; ValueError where it has not those."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        chosen = choose_units(weight.dtype, units)
        if chosen is not None:
            weight, bias = _filled_up(weight), None if bias is None else _filled_up(bias)
        self.num_columns, self.bias = len(weight), bias
        # Where a CPU has tiles, oneDNN chooses our blocks only for what it takes for a single row.
        rows_hint = 1 if "tiles" in product_units(weight.dtype) else None
        self._pack(weight, rows_hint=rows_hint)
        self._units = chosen if chosen is not None and self._lies_in_blocks(weight) else None
        if rows_hint is not None and self._units is None:
            self._pack(weight, rows_hint=None)
        self.can_gate = False
        if self.has_blocks:
            from server.kernels.pairs import COLUMNS

            self._block_bytes = self.num_bytes // -(-self.num_columns // COLUMNS)
            # Whether each half of the outputs is a number of whole blocks.
            self.can_gate = self.out_features % (2 * COLUMNS) == 0

    def _pack(self, weight: Tensor, *, rows_hint: int | None) -> None:
        # No buffer: such a tensor cannot be moved, viewed or saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows_hint)
        self._address = torch.ops.mkldnn.data_ptr(self.packed)
        self.num_bytes = torch.ops.mkldnn._nbytes(self.packed)

    @property
    def has_blocks(self) -> bool:
        """Whether our own loops can read it."""
        return self._units is not None

    def forward(self, hidden: Tensor, *, activation: str = "none", algorithm: str = "") -> Tensor:
        """The activation, in oneDNN's words, is applied to the float32 sums before any rounding."""
        rows = hidden.reshape(-1, self.in_features)
        if self.has_blocks and activation == "none":
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            projected = rows.new_empty(len(rows), self.num_columns)
            run([self.call(rows, projected)])
        else:
            projected = self._multiply_by_library(rows, activation, algorithm)
        projected = projected[:, : self.out_features].contiguous()
        return projected.view(*hidden.shape[:-1], self.out_features)

    def gated(self, rows: Tensor) -> Tensor:
        """[rows, in] -> [rows, out / 2]: SiLU of the first half of the outputs times the second.

        Only where it `can_gate`. Nothing between is rounded.
        """
        output = rows.new_empty(len(rows), self.out_features // 2)
        run([self.call(rows, output, is_gated=True)])
        return output

    def call(self, rows: Tensor, output: Tensor, *, is_gated: bool = False) -> Call:
        """rows [rows, in] into output [rows, num_columns], contiguous, or gated into half as many.

        Only where it `has_blocks`, or `can_gate`. ValueError for tensors that do not fit.
        """
        from server.kernels.products import MULTIPLIERS, LinearArguments, num_tasks_of

        assert self._units is not None  # it has blocks
        num_rows, num_columns = rows.shape[0], self.num_columns // (2 if is_gated else 1)
        if (
            rows.dtype != torch.bfloat16
            or output.dtype != torch.bfloat16
            or rows.shape != (num_rows, self.in_features)
            or output.shape != (num_rows, num_columns)
            or rows.stride(1) != 1
            or not output.is_contiguous()
        ):
            raise ValueError("rows or output are not what this layer takes")
        arguments = LinearArguments(
            num_tasks=num_tasks_of(self._units, num_rows=num_rows, num_columns=num_columns),
            rows=rows.data_ptr(),
            row_bytes=rows.stride(0) * rows.element_size(),
            num_rows=num_rows,
            weight=self._address,
            block_bytes=self._block_bytes,
            num_pairs=self.in_features // 2,
            bias=0 if self.bias is None else self.bias.data_ptr(),
            output=output.data_ptr(),
            output_bytes=num_columns * output.element_size(),
            num_columns=num_columns,
        )
        has_bias = self.bias is not None
        function = _compiled_linear(self._units, has_bias=has_bias, is_gated=is_gated)
        num_walks = -(-num_rows // MULTIPLIERS[self._units].task_rows)
        return Call(function, arguments, num_walks * self.num_bytes)

    def _multiply_by_library(self, rows: Tensor, activation: str, algorithm: str) -> Tensor:
        num_missing = max(0, FEWEST_ROWS - len(rows))
        if num_missing:
            rows = F.pad(rows, (0, 0, 0, num_missing))
        projected: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.packed, self.bias, activation, [], algorithm
        )
        return projected[:-num_missing] if num_missing else projected

    def _lies_in_blocks(self, weight: Tensor) -> bool:
        """Whether our loops can read what was packed: the first and the last block are looked at.

        The order is oneDNN's own affair, and may be another with its next version or another CPU.
        """
        from server.kernels.pairs import COLUMNS, WIDTH

        num_blocks = -(-self.num_columns // COLUMNS)
        # A block may be filled up behind its last pair.
        block_bytes = self.num_bytes // num_blocks
        if (
            self.num_columns % WIDTH
            or self.in_features % 2
            or self.num_bytes % num_blocks
            or block_bytes < COLUMNS * self.in_features * weight.element_size()
        ):
            return False
        for block in (0, num_blocks - 1):
            columns = weight[block * COLUMNS : (block + 1) * COLUMNS].detach().view(torch.int16)
            columns = F.pad(columns, (0, 0, 0, COLUMNS - len(columns)))
            pairs = columns.view(COLUMNS, -1, 2).transpose(0, 1).reshape(-1)
            place = (ctypes.c_int16 * len(pairs)).from_address(self._address + block * block_bytes)
            if not torch.equal(pairs, torch.frombuffer(place, dtype=torch.int16)):
                _warn_of_another_order()
                return False
        return True


def _filled_up(outputs: Tensor) -> Tensor:
    """[out, ...] -> the same with zeros behind, as many as make whole vectors of outputs."""
    from server.kernels.pairs import WIDTH

    num_missing = -len(outputs) % WIDTH
    if not num_missing:
        return outputs
    return torch.cat([outputs.detach(), outputs.new_zeros(num_missing, *outputs.shape[1:])])


@cache
def _compiled_linear(units: ProductUnits, *, has_bias: bool, is_gated: bool) -> Any:
    from server.kernels import products

    return products.compile_linear(units, has_bias=has_bias, is_gated=is_gated)


@cache
def _warn_of_another_order() -> None:
    """Once, and not for every layer."""
    _log.warning("oneDNN packs weights in another order: its own products are taken, slower")
