"""The demo model as it is trained: the served architecture in plain PyTorch, batched for training.

Parameter names are the checkpoint's, so that export is a copy. The projector's modules are the
server's own; only its forward is rewritten channels-last, because training lives on it. Knows
nothing of pictures or questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.model.projector import Block, CAbstractor, ConvNorm
from tools.demo_model.labels import CODE_LENGTH, code_book


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Everything config.json says about sizes. The tower has one layer more, which never runs."""

    image_size: int = 112
    patch_size: int = 14
    tower_width: int = 160
    tower_layers: int = 4
    tower_heads: int = 5
    tower_inner: int = 480
    hidden_size: int = 160
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 416
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Attention in float32 whatever the rest is computed in: on a CPU the backward pass of the
    16-bit kernel takes five times as long."""
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=is_causal
        )
    return mixed.to(query.dtype)


class TowerAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        tiles, patches, width = hidden.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections])
        joined = F.linear(hidden, weight, bias).view(tiles, patches, 3, self.heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, is_causal=False)
        return self.out_proj(mixed.transpose(1, 2).reshape(tiles, patches, width))


class TowerMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class TowerLayer(nn.Module):
    def __init__(self, size: Dimensions) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size.tower_width, eps=1e-6)
        self.self_attn = TowerAttention(size.tower_width, size.tower_heads)
        self.layer_norm2 = nn.LayerNorm(size.tower_width, eps=1e-6)
        self.mlp = TowerMlp(size.tower_width, size.tower_inner)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Tower(nn.Module):
    """SigLIP up to the layer that is used: patches in, their states out, no norm behind."""

    def __init__(self, size: Dimensions) -> None:
        super().__init__()
        width, patch = size.tower_width, size.patch_size
        self.patch = patch
        self.patch_weight = nn.Parameter(torch.randn(width, 3 * patch * patch) * 0.02)
        self.patch_bias = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(size.num_patches, width) * 0.02)
        self.layers = nn.ModuleList([TowerLayer(size) for _ in range(size.tower_layers)])

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, side, side, 3] -> [tiles, patches, width]."""
        count, side, _, _ = tiles.shape
        rows = side // self.patch
        pixels = (tiles.to(torch.float32) / 127.5 - 1).to(self.patch_weight.dtype)
        patches = pixels.view(count, rows, self.patch, rows, self.patch, 3)
        # channel-major inside a patch, as a Conv2d weight is laid out
        patches = patches.permute(0, 1, 3, 5, 2, 4).reshape(count, rows * rows, -1)
        hidden = F.linear(patches, self.patch_weight, self.patch_bias) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def point_conv(hidden: Tensor, block: ConvNorm) -> Tensor:
    norm = block.bn
    mixed = F.linear(hidden, block.conv.weight.flatten(1))
    return F.layer_norm(mixed, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def run_block(hidden: Tensor, block: Block) -> Tensor:
    """The server's Block on channels-last [tiles, rows, columns, channels]."""
    inner = F.silu(point_conv(hidden, block.conv1))
    depthwise = F.conv2d(
        inner.permute(0, 3, 1, 2), block.conv2.conv.weight, padding=1, groups=inner.shape[-1]
    ).permute(0, 2, 3, 1)
    norm = block.conv2.bn
    inner = F.silu(F.layer_norm(depthwise, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    excite = block.se
    gate = F.silu(F.linear(inner.mean(dim=(1, 2)), excite.fc1.weight.flatten(1), excite.fc1.bias))
    gate = torch.sigmoid(F.linear(gate, excite.fc2.weight.flatten(1), excite.fc2.bias))
    inner = inner * gate[:, None, None, :]
    return F.silu(point_conv(inner, block.conv3) + hidden)


def project(projector: CAbstractor, features: Tensor, queries: Sequence[int]) -> dict[int, Tensor]:
    """features [tiles, patches, width] -> query count -> [tiles with it, count, hidden]."""
    assert projector.pos_emb is not None
    hidden = features + projector.pos_emb
    hidden = hidden.view(len(features), projector.side, projector.side, -1)
    for block in projector.net[0].children():
        hidden = run_block(hidden, block)
    outputs = {}
    wanted = torch.tensor(queries)
    for count in sorted(set(queries)):
        chosen = hidden if len(set(queries)) == 1 else hidden[wanted == count]
        side = math.isqrt(count)
        step = projector.side // side
        pooled = chosen.reshape(len(chosen), side, step, side, step, -1).mean(dim=(2, 4))
        for block in projector.net[2].children():
            pooled = run_block(pooled, block)
        outputs[count] = projector.readout(pooled.flatten(1, 2))
    return outputs


class DecoderLayer(nn.Module):
    def __init__(self, size: Dimensions) -> None:
        super().__init__()
        self.size = size
        wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.input_layernorm = nn.RMSNorm(size.hidden_size, eps=size.norm_eps)
        self.q_proj = nn.Linear(size.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(size.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, size.hidden_size, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden_size, eps=size.norm_eps)
        self.gate_proj = nn.Linear(size.hidden_size, size.inner, bias=False)
        self.up_proj = nn.Linear(size.hidden_size, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        size = self.size
        normed = self.input_layernorm(hidden)
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        joined = F.linear(normed, weight).view(rows, length, -1, size.head_dim).transpose(1, 2)
        turned = joined[:, : size.heads + size.kv_heads]
        value = joined[:, size.heads + size.kv_heads :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
        query, key = turned[:, : size.heads], turned[:, size.heads :]
        group = size.heads // size.kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = attend(query, key, value, is_causal=True)
        hidden = hidden + self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        normed = self.post_attention_layernorm(hidden)
        both = F.linear(normed, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        gate, up = both.chunk(2, dim=-1)
        return hidden + self.down_proj(F.silu(gate) * up)


class Decoder(nn.Module):
    """Llama over right-padded rows; a padded place can only be seen by later padding."""

    def __init__(self, size: Dimensions) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(size) for _ in range(size.layers)])
        self.norm = nn.RMSNorm(size.hidden_size, eps=size.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if deep else 0.03)

    def forward(self, embeds: Tensor) -> Tensor:
        size = self.size
        length = embeds.shape[1]
        rates = size.rope_theta ** (-torch.arange(0, size.head_dim, 2) / size.head_dim)
        angles = torch.arange(length)[:, None] * rates
        angles = torch.cat([angles, angles], dim=-1)
        cosine, sine = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        hidden = embeds
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)


class Probe(nn.Module):
    """Throw-away linear heads that read what a state says about the object it covers."""

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(classes))
        self.classes = tuple(classes)

    def forward(self, states: Tensor) -> list[Tensor]:
        return list(self.head(self.norm(states)).split(self.classes, dim=-1))


class DemoModel(nn.Module):
    """Tower, projector, newline and decoder; `patch_probe` is for training only."""

    def __init__(self, size: Dimensions, classes: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.tower = Tower(size)
        self.projector = CAbstractor(
            size.tower_width, size.hidden_size, num_patches=size.num_patches
        )
        nn.init.normal_(self.projector.pos_emb, std=0.02)
        self.newline = nn.Parameter(torch.randn(size.hidden_size) * 0.02)
        self.decoder = Decoder(size)
        self.patch_probe = Probe(size.tower_width, classes)
        self.classes = tuple(classes)
        self.register_buffer("code_book", torch.from_numpy(code_book(size.hidden_size)))

    def read(self, tokens: Tensor) -> Tensor:
        """How much of each label an output token holds: [.., labels], 1 where it is sure."""
        return tokens @ self.code_book.T / CODE_LENGTH**2

    def see(self, tiles: Tensor, queries: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Patch states, and the output tokens by query count."""
        states = self.tower(tiles)
        return states, project(self.projector, states, queries)
