"""The small parts the decoder is made of. Norms and rotations are computed in float32."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from server.kernels.machine import has_half_units
from server.model import pointwise
from server.model.config import Llama3Scaling
from server.model.packed import PackedLinear

MIN_ROWS_TO_WIDEN = 32
"""With fewer rows, reading the weights is what takes the time, and 16-bit ones are read faster."""


def project(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A linear layer or convolution on hidden [..., channels] or [tiles, channels, rows, columns].

    Where the CPU lacks 16-bit units, many rows are computed from a float32 copy of the weights,
    made for this call.
    """
    dtype = hidden.dtype
    if hidden.device.type == "cpu" and dtype != torch.float32 and not has_half_units(dtype):
        is_map = isinstance(layer, nn.Conv2d)
        num_rows = hidden.numel() // hidden.shape[1 if is_map else -1]
        if num_rows >= MIN_ROWS_TO_WIDEN:
            wide = {name: weight.float() for name, weight in layer.named_parameters()}
            widened: Tensor = functional_call(layer, wide, hidden.float())
            return widened.to(dtype)
    projected: Tensor = layer(hidden)
    return projected


class FusedLinear(nn.Module):
    """Linear layers of the same input as one: its output is theirs, side by side.

    `parts` are their names in the checkpoint, beside this layer, with their numbers of outputs.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(parts.values())
        self.parts = dict(parts)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


def project_gelu(
    layer: nn.Module, hidden: Tensor, *, approximate: Literal["tanh", "none"]
) -> Tensor:
    """`project` and GELU after it, in one pass where the layer is packed."""
    if isinstance(layer, PackedLinear):
        activated: Tensor = layer(hidden, activation="gelu", algorithm=approximate)
        return activated
    return F.gelu(project(layer, hidden), approximate=approximate)


def pack_linear_layers(model: nn.Module) -> None:
    """Packs every linear layer on the CPU, one after another.

    Only where the CPU multiplies the layer's type itself.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear | FusedLinear):
                continue
            weight = child.weight
            is_fast = weight.dtype == torch.float32 or has_half_units(weight.dtype)
            if weight.device.type == "cpu" and is_fast:
                setattr(module, name, PackedLinear(weight, child.bias))


class EmbeddingInFile(nn.Module):
    """Embeddings whose table stays in its file, of which only pages that are read take memory."""

    def __init__(self, table: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__()
        # No buffer: it must not be moved or saved.
        self.table, self.dtype = [table], dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table[0]).to(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm; torch widens 16-bit inputs to float32 inside."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        if pointwise.is_compiled(hidden):
            return pointwise.norm(hidden, self.weight, eps=self.eps)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """Llama's feed-forward: a SiLU gate times an up projection, projected down."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = FusedLinear(hidden_size, parts, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if isinstance(self.gate_up_proj, PackedLinear) and self.gate_up_proj.can_gate:
            return project(self.down_proj, self.gate_up_proj.gated(hidden))
        gate_up = project(self.gate_up_proj, hidden)
        if pointwise.is_compiled(gate_up):
            return project(self.down_proj, pointwise.gate(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return project(self.down_proj, F.silu(gate) * up)


class RotaryEmbedding(nn.Module):
    """Position -> (cosine, signed sine) [tokens, 1, head_dim], float32; for `rotate`.

    Both halves of the dimensions have the same angles; the sine of the first is negative.
    """

    inverse_frequencies: Tensor

    def __init__(self, head_dim: int, *, theta: float, scaling: Llama3Scaling | None) -> None:
        super().__init__()
        # An explicit device, because the model is built on "meta" and this is no checkpoint tensor.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            frequencies = stretch_low_frequencies(frequencies, scaling)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None, None] * self.inverse_frequencies
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def stretch_low_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: frequencies of long wavelengths are divided by `factor`, with a smooth passage."""
    wavelengths = 2 * math.pi / frequencies
    kept = scaling.original_context / wavelengths - scaling.low_freq_factor
    kept = (kept / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [tokens, heads, head_dim]: dimension i is paired with i + head_dim / 2."""
    if pointwise.is_compiled(heads):
        return pointwise.rotate(heads, rotation)
    cosine, signed_sine = rotation
    wide = heads.float()
    partners = wide.roll(wide.shape[-1] // 2, dims=-1)
    return (wide * cosine).addcmul_(partners, signed_sine).type_as(heads)
