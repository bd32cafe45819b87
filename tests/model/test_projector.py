"""The projectors against a second implementation: float64, straight from the description."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.model.config import PROJECTOR_KINDS
from server.model.projector import PROJECTORS, ConvNorm, SqueezeExcite
from tests.model.loading import change_tensors, load, relative_difference, stored_tensors
from tools.random_checkpoint import SIZES, write_checkpoint

Weights = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normed(x: Tensor, weights: Weights, name: str, *, eps: float) -> Tensor:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """3x3, one kernel a channel, zeros outside: x [rows, columns, channels]."""
    rows, columns, channels = x.shape
    padded = x.new_zeros(rows + 2, columns + 2, channels)
    padded[1:-1, 1:-1] = x
    summed = torch.zeros_like(x)
    for dy in range(3):
        for dx in range(3):
            summed += padded[dy : dy + rows, dx : dx + columns] * kernel[:, 0, dy, dx]
    return summed


def block(x: Tensor, weights: Weights, name: str) -> Tensor:
    """One RegNet bottleneck: x [rows, columns, channels]."""
    y = x @ weights[f"{name}.conv1.conv.weight"][:, :, 0, 0].T
    y = silu(normed(y, weights, f"{name}.conv1.bn", eps=1e-5))
    y = depthwise(y, weights[f"{name}.conv2.conv.weight"])
    y = silu(normed(y, weights, f"{name}.conv2.bn", eps=1e-5))
    gate = y.mean((0, 1)) @ weights[f"{name}.se.fc1.weight"][:, :, 0, 0].T
    gate = silu(gate + weights[f"{name}.se.fc1.bias"])
    gate = gate @ weights[f"{name}.se.fc2.weight"][:, :, 0, 0].T + weights[f"{name}.se.fc2.bias"]
    y = y / (1 + torch.exp(-gate))
    y = y @ weights[f"{name}.conv3.conv.weight"][:, :, 0, 0].T
    return silu(normed(y, weights, f"{name}.conv3.bn", eps=1e-5) + x)


def pooled(x: Tensor, side: int) -> Tensor:
    """Adaptive mean pooling: bin i covers [floor(i * n / side), ceil((i + 1) * n / side))."""
    bins = [(i * len(x) // side, -(-(i + 1) * len(x) // side)) for i in range(side)]
    means = [x[top:end, left:right].mean((0, 1)) for top, end in bins for left, right in bins]
    return torch.stack(means).view(side, side, -1)


def before_pooling(features: Tensor, weights: Weights) -> Tensor:
    """One tile: [patches, channels] -> [side, side, channels]."""
    if "prenorm.weight" in weights:
        features = normed(features, weights, "prenorm", eps=1e-6)
    if "pos_emb" in weights:
        features = features + weights["pos_emb"][0]
    side = int(len(features) ** 0.5)
    x = features.reshape(side, side, -1)
    for name in ("net.0.b1", "net.0.b2", "net.0.b3"):
        x = block(x, weights, name)
    return x


def after_pooling(x: Tensor, weights: Weights, queries: int) -> Tensor:
    """One tile: [side, side, channels] -> [queries, hidden]."""
    x = pooled(x, int(queries**0.5))
    for name in ("net.2.b1", "net.2.b2", "net.2.b3"):
        x = block(x, weights, name)
    x = x.reshape(queries, -1) @ weights["readout.0.weight"].T + weights["readout.0.bias"]
    return silu(x) @ weights["readout.2.weight"].T + weights["readout.2.bias"]


def random_features(tiles: int, patches: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tiles, patches, channels, generator=generator)


def projector_of(folder: Path, *, dtype: str = "float32") -> nn.Module:
    projector = load(folder, dtype=dtype).mm_projector
    assert projector is not None
    return projector


def in_float64(folder: Path) -> Weights:
    stored = stored_tensors(folder, prefix="mm_projector.")
    return {name: value.double() for name, value in stored.items()}


@pytest.mark.parametrize("has_prenorm", [False, True], ids=["plain", "prenorm"])
def test_c_abstractor_matches_float64(tmp_path: Path, has_prenorm: bool) -> None:
    write_checkpoint(tmp_path, has_prenorm=has_prenorm)
    # so weak that the epsilons of the norms, 1e-5 and 1e-6, count for much
    weak = ("conv.weight", "pos_emb")
    change_tensors(
        tmp_path,
        lambda tensors: [tensors[name].mul_(0.01) for name in tensors if name.endswith(weak)],
    )
    features = random_features(6, 64, 48) * 1e-2
    counts = [16, 4, 16, 4, 1, 9]
    with torch.inference_mode():
        ours = projector_of(tmp_path)(features, counts)
    weights = in_float64(tmp_path)
    assert ("prenorm.weight" in weights) == has_prenorm
    for index, count in enumerate(counts):
        tile_map = before_pooling(features[index].double(), weights)
        assert relative_difference(ours[index], after_pooling(tile_map, weights, count)) < 1e-4


def test_c_abstractor_matches_float64_at_real_width(tmp_path: Path) -> None:
    real = SIZES["real"]
    size = replace(
        SIZES["tiny"],
        hidden_size=real.hidden_size,
        num_layers=1,
        image_size=real.image_size,
        patch_size=real.patch_size,
        vision_hidden_size=real.vision_hidden_size,
        vision_layers=1,
        vision_heads=real.vision_heads,
        image_queries=real.image_queries,
        fast_queries=real.fast_queries,
    )
    write_checkpoint(tmp_path, size=size)
    features = random_features(1, 729, 1152)
    with torch.inference_mode():
        ours = projector_of(tmp_path)(features.expand(2, -1, -1), [81, 9])
    weights = in_float64(tmp_path)
    tile_map = before_pooling(features[0].double(), weights)
    for index, count in enumerate([81, 9]):
        expected = after_pooling(tile_map, weights, count)
        assert expected.shape == (count, 3072)
        assert relative_difference(ours[index], expected) < 1e-4


def test_mixed_counts_equal_runs_of_one_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    projector = projector_of(tmp_path)
    features = random_features(11, 64, 48)
    # the slow and fast tiles of two canvases, the second with two frames
    counts = [16, *[4] * 8, 16, 4]
    with torch.inference_mode():
        mixed = projector(features, counts)
        for start, stop in ((0, 1), (1, 9), (9, 10), (10, 11)):
            alone = projector(features[start:stop], counts[start:stop])
            for ours, expected in zip(mixed[start:stop], alone, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert [len(output) for output in mixed] == counts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path)
    features = random_features(2, 64, 48)
    exact = projector_of(tmp_path)(features, [16, 4])
    projector = projector_of(tmp_path, dtype=dtype)
    rounded = projector(features.to(getattr(torch, dtype)), [16, 4])
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == getattr(torch, dtype)
        assert 0 < relative_difference(ours, expected) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_and_means_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    """On values whose differences vanish in 16-bit sums: a mean far larger than the spread."""
    torch.manual_seed(1)
    hidden = (100 + torch.randn(2, 48, 8, 8)).to(dtype)
    same = ConvNorm(48, kernel_size=1, groups=1).to(dtype)
    nn.init.dirac_(same.conv.weight)
    exact = F.layer_norm(hidden.double().permute(0, 2, 3, 1), (48,), eps=1e-5)
    normed = same(hidden).double().permute(0, 2, 3, 1)
    torch.testing.assert_close(normed, exact, atol=2e-2, rtol=1e-2)

    excite = SqueezeExcite(48, 12).to(dtype)
    seen: list[Tensor] = []
    excite.fc1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    excite(hidden)
    assert torch.equal(seen[0], hidden.double().mean((2, 3), keepdim=True).to(dtype))


@pytest.mark.parametrize("kind", ["linear", "mlp", "inverted_mlp"])
def test_projectors_without_pooling_keep_every_patch(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, projector=kind)
    features = random_features(2, 64, 48)
    weights = stored_tensors(tmp_path, prefix="mm_projector.")
    if kind == "linear":
        expected = features @ weights["weight"].T + weights["bias"]
    else:
        assert len(weights["fc1.bias"]) == {"mlp": 48, "inverted_mlp": 96}[kind]
        inner = features @ weights["fc1.weight"].T + weights["fc1.bias"]
        erf_gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        expected = F.linear(erf_gelu, weights["fc2.weight"], weights["fc2.bias"])
    with torch.inference_mode():
        ours = projector_of(tmp_path)(features, [64, 64])
    torch.testing.assert_close(torch.stack(ours), expected, atol=1e-5, rtol=1e-5)


def test_every_kind_that_config_accepts_has_a_projector() -> None:
    assert set(PROJECTOR_KINDS) == set(PROJECTORS)
