"""Projectors: from a tile's patch features to the decoder's embeddings.

Modules carry the checkpoint's own parameter names. `PROJECTORS` is keyed by the checkpoint's
`mm_projector_type`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.model.config import ProjectorConfig
from server.model.layers import project

BLOCK_NORM_EPS = 1e-5  # timm turns RegStage's norms into LayerNormAct2d, whose default this is
PRE_NORM_EPS = 1e-6
SQUEEZE_RATIO = 4
STAGE_DEPTH = 3


class Projector(Protocol):
    """features [tiles, patches, channels], a query count a tile -> a list of [queries, hidden]."""

    def __call__(self, features: Tensor, tile_queries: Sequence[int]) -> list[Tensor]: ...


class ConvNorm(nn.Module):
    """A bias-free convolution and the LayerNorm over channels that the checkpoint calls `bn`."""

    def __init__(self, channels: int, *, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        # torch computes a LayerNorm of 16-bit tensors in float32 inside
        self.bn = nn.LayerNorm(channels, eps=BLOCK_NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        channels_last = project(self.conv, hidden).permute(0, 2, 3, 1)
        normed: Tensor = self.bn(channels_last)
        return normed.permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all of them (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        means = hidden.float().mean(dim=(2, 3), keepdim=True).type_as(hidden)
        return hidden * torch.sigmoid(self.fc2(F.silu(self.fc1(means))))


class Block(nn.Module):
    """RegNet bottleneck (arXiv:2003.13678): 1x1, depthwise 3x3, squeeze-excite, 1x1, shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, kernel_size=1, groups=1)
        self.conv2 = ConvNorm(channels, kernel_size=3, groups=channels)
        self.se = SqueezeExcite(channels, channels // SQUEEZE_RATIO)
        self.conv3 = ConvNorm(channels, kernel_size=1, groups=1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.silu(self.conv1(hidden))
        inner = self.se(F.silu(self.conv2(inner)))
        return F.silu(self.conv3(inner) + hidden)


class Stage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b1, self.b2, self.b3 = (Block(channels) for _ in range(STAGE_DEPTH))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in (self.b1, self.b2, self.b3):
            hidden = block(hidden)
        return hidden


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (arXiv:2312.06742): convolve, pool to a square of queries, convolve.

    Tiles may be pooled to different numbers of queries (slow and fast video frames): everything
    before the pooling runs once on all of them, the rest once per query count.
    """

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        *,
        num_patches: int,
        pos_emb: bool = True,
        prenorm: bool = False,
    ) -> None:
        super().__init__()
        self.prenorm = nn.LayerNorm(channels, eps=PRE_NORM_EPS) if prenorm else None
        self.pos_emb = nn.Parameter(torch.zeros(1, num_patches, channels)) if pos_emb else None
        self.side = math.isqrt(num_patches)
        # index 1 is the pooling, which has no parameters: the checkpoint's keys are net.0 and net.2
        self.net = nn.ModuleList([Stage(channels), nn.Identity(), Stage(channels)])
        self.readout = nn.Sequential(
            nn.Linear(channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features: Tensor, tile_queries: Sequence[int]) -> list[Tensor]:
        """features [tiles, patches, channels] -> per tile [tile_queries[i], hidden_size]."""
        if self.prenorm is not None:
            features = self.prenorm(features)
        if self.pos_emb is not None:
            features = features + self.pos_emb
        hidden = features.transpose(1, 2).reshape(len(features), -1, self.side, self.side)
        hidden = self.net[0](hidden)  # [tiles, channels, side, side]
        outputs: list[Tensor] = [hidden.new_empty(0)] * len(tile_queries)
        by_count = sorted(range(len(tile_queries)), key=tile_queries.__getitem__)
        for queries, group in groupby(by_count, key=tile_queries.__getitem__):
            indices = list(group)
            for index, output in zip(indices, self._pooled(hidden[indices], queries), strict=True):
                outputs[index] = output
        return outputs

    def _pooled(self, hidden: Tensor, queries: int) -> Tensor:
        """[tiles, channels, side, side] -> [tiles, queries, hidden_size]."""
        pooled = F.adaptive_avg_pool2d(hidden, math.isqrt(queries))
        hidden = self.net[2](pooled).flatten(2).transpose(1, 2)
        return project(self.readout[2], F.silu(project(self.readout[0], hidden)))


class LinearProjector(nn.Module):
    """One linear layer on every patch; the checkpoint's keys are `weight` and `bias` themselves."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, channels))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, features: Tensor, tile_queries: Sequence[int]) -> list[Tensor]:
        return list(F.linear(features, self.weight, self.bias))


class MlpProjector(nn.Module):
    """Two linear layers with GELU (erf) between, on every patch."""

    def __init__(self, channels: int, inner: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, features: Tensor, tile_queries: Sequence[int]) -> list[Tensor]:
        return list(project(self.fc2, F.gelu(project(self.fc1, features))))


PROJECTORS: dict[str, Callable[[ProjectorConfig], nn.Module]] = {
    "cabstractor": lambda c: CAbstractor(
        c.channels, c.hidden_size, num_patches=c.num_patches, pos_emb=c.pos_emb, prenorm=c.prenorm
    ),
    "linear": lambda c: LinearProjector(c.channels, c.hidden_size),
    "mlp": lambda c: MlpProjector(c.channels, c.channels, c.hidden_size),
    "inverted_mlp": lambda c: MlpProjector(c.channels, 2 * c.channels, c.hidden_size),
}
