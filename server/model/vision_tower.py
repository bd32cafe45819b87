"""The SigLIP encoder: uint8 tiles to the patch features the projector reads.

Modules carry the checkpoint's names below `vision_model.vision_model.`. Only the layers up to the
configured one exist, and there is no norm after them.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.core import VisionSpec
from server.kernels.machine import has_half_units
from server.model.config import VisionTowerConfig
from server.model.layers import project, project_gelu

HEADS_AT_ONCE = 4
"""Whose scores are computed together on a CPU: few, so that they are still in its cache when they
are read again."""


class TowerAttention(nn.Module):
    """Every patch sees every patch."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:2], self.num_heads, -1)
        queries, keys, values = (
            project(projection, hidden).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # each [tiles, heads, patches, head_dim]
        attended = attend(queries, keys, values)
        return project(self.out_proj, attended.transpose(1, 2).flatten(2))


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of every patch to every patch; all are [tiles, heads, patches, head_dim].

    torch's fused kernel for CPUs multiplies in float32 without AMX, and plain matrix products take
    half of its time where the CPU multiplies 16-bit matrices itself. They round the scores to 16
    bits, as queries and keys were before; the softmax is computed in float32 either way.
    """
    dtype = queries.dtype
    if queries.device.type != "cpu" or dtype == torch.float32 or not has_half_units(dtype):
        return F.scaled_dot_product_attention(queries, keys, values)
    no_bias, scale = queries.new_zeros(1), queries.shape[-1] ** -0.5
    groups = (torch.split(part.flatten(0, 1), HEADS_AT_ONCE) for part in (queries, keys, values))
    attended = []
    for some_queries, some_keys, some_values in zip(*groups, strict=True):
        transposed = some_keys.transpose(1, 2)
        # One call, for the scale to be applied before the rounding.
        scores = torch.baddbmm(no_bias, some_queries, transposed, beta=0, alpha=scale)
        attended.append(torch.bmm(scores.softmax(-1), some_values))
    return torch.cat(attended).view(queries.shape)


class TowerMLP(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        is_tanh = config.hidden_act == "gelu_pytorch_tanh"
        self.approximate: Literal["tanh", "none"] = "tanh" if is_tanh else "none"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return project(self.fc2, project_gelu(self.fc1, hidden, approximate=self.approximate))


class TowerLayer(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        # torch computes a LayerNorm of 16-bit tensors in float32 inside
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TowerAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TowerMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        output: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return output


class PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [tiles, 3, size, size] -> [tiles, patches, hidden], patches row-major."""
        patches = project(self.patch_embedding, pixels).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_layers_used))
        self.num_parts = config.num_parts

    def forward(self, hidden: Tensor, stages: range, num_stages: int) -> Tensor:
        """The layers of some of `num_stages` stages, which share all parts as evenly as can be.

        The last part is the projector, which comes after the last stage.
        """
        first, stop = (
            self.num_parts * stage // num_stages for stage in (stages.start, stages.stop)
        )
        for layer in self.layers[first:stop]:
            hidden = layer(hidden)
        return hidden


class VisionTower(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionTowerConfig, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Encoder(config)
        self.rescale_factor = spec.rescale_factor
        # "cpu" because the model is built on "meta" and these are no checkpoint tensors
        mean = torch.tensor(spec.image_mean, device="cpu").view(3, 1, 1)
        std = torch.tensor(spec.image_std, device="cpu").view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def start(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, size, size, 3] -> the first layer's input [tiles, patches, hidden]."""
        pixels = tiles.permute(0, 3, 1, 2).float() * self.rescale_factor
        pixels = (pixels - self.mean) / self.std
        states: Tensor = self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype))
        return states

    def advance(self, states: Tensor, stages: range, num_stages: int) -> Tensor:
        """States [tiles, patches, hidden] after these of `num_stages` stages.

        After all of them they are the features.
        """
        advanced: Tensor = self.encoder(states, stages, num_stages)
        return advanced
