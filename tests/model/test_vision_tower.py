"""The tower against Hugging Face's SiglipVisionModel, at every layer that can be configured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from server.model import vision_tower
from server.model.vision_tower import attend
from tests.model.loading import (
    change_json,
    change_tensors,
    load,
    relative_difference,
    stored_tensors,
)
from tools.random_checkpoint import SIZES, Dimensions, write_checkpoint


def tiles_of(size: Dimensions, count: int) -> Tensor:
    shape = (count, size.image_size, size.image_size, 3)
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))


def reference_states(folder: Path, tiles: Tensor) -> list[Tensor]:
    """Hugging Face's `hidden_states`: the embeddings, then the state after each layer."""
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    del config["model_type"]
    model = SiglipVisionModel(SiglipVisionConfig(**config)).eval()
    weights = stored_tensors(folder, prefix="vision_model.vision_model.")
    prefix = "" if "post_layernorm.weight" in model.state_dict() else "vision_model."
    model.load_state_dict({prefix + name: value for name, value in weights.items()})
    pixels = (tiles.numpy().astype(np.float64) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        output = model(
            torch.from_numpy(pixels).float().permute(0, 3, 1, 2), output_hidden_states=True
        )
    return list(output.hidden_states)


def our_state(
    folder: Path, tiles: Tensor, *, dtype: str = "float32", num_stages: int = 1
) -> Tensor:
    tower = load(folder, dtype=dtype).vision_model
    assert tower is not None
    with torch.inference_mode():
        return tower.advance(tower.start(tiles), range(num_stages), num_stages)


@pytest.mark.parametrize("nth", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_parity_of_each_layer(tmp_path: Path, nth: int, activation: str) -> None:
    write_checkpoint(tmp_path)
    change_json(
        tmp_path / "config.json",
        lambda config: (
            config.update(use_nth_layer=nth),
            config["vision_config"].update(hidden_act=activation, layer_norm_eps=0.01),
        ),
    )
    tiles = tiles_of(SIZES["tiny"], 3)
    reference = reference_states(tmp_path, tiles)
    assert len(reference) == 4
    assert relative_difference(our_state(tmp_path, tiles), reference[nth]) < 1e-4


def test_parity_at_real_width(tmp_path: Path) -> None:
    real = SIZES["real"]
    size = replace(
        SIZES["tiny"],
        image_size=real.image_size,
        patch_size=real.patch_size,
        vision_hidden_size=real.vision_hidden_size,
        vision_heads=real.vision_heads,
        vision_intermediate_size=real.vision_intermediate_size,
    )
    write_checkpoint(tmp_path, size=size, projector="linear")
    tiles = tiles_of(size, 1)
    assert relative_difference(our_state(tmp_path, tiles), reference_states(tmp_path, tiles)[2]) < (
        1e-4
    )


@pytest.mark.parametrize("nth", [0, -1])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_are_the_layers_in_turn(tmp_path: Path, nth: int, num_stages: int) -> None:
    """Also more stages than there are layers: some are empty then."""
    write_checkpoint(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(use_nth_layer=nth))
    tiles = tiles_of(SIZES["tiny"], 2)
    tower = load(tmp_path).vision_model
    assert tower is not None
    with torch.inference_mode():
        states = tower.start(tiles)
        for stage in range(num_stages):
            states = tower.advance(states, range(stage, stage + 1), num_stages)
    assert torch.equal(states, our_state(tmp_path, tiles))
    assert torch.equal(states, our_state(tmp_path, tiles, num_stages=num_stages))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_are_even_with_the_projector_as_one_more_layer(
    tmp_path: Path, num_stages: int
) -> None:
    write_checkpoint(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(use_nth_layer=-1))
    tower = load(tmp_path).vision_model
    assert tower is not None
    passed: list[nn.Module] = []
    for layer in tower.encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: passed.append(module))
    parts = []
    with torch.inference_mode():
        states = tower.start(tiles_of(SIZES["tiny"], 1))
        for stage in range(num_stages):
            before = len(passed)
            states = tower.advance(states, range(stage, stage + 1), num_stages)
            parts.append(len(passed) - before)
    assert passed == list(tower.encoder.layers)
    parts[-1] += 1
    assert max(parts) - min(parts) <= 1


def test_layers_after_the_configured_one_are_not_built(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(use_nth_layer=-3))
    tower = load(tmp_path).vision_model
    assert tower is not None
    assert len(tower.encoder.layers) == 1


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tiles = tiles_of(SIZES["tiny"], 2)
    rounded = our_state(tmp_path, tiles, dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    assert 0 < relative_difference(rounded, our_state(tmp_path, tiles)) < 5e-2


@pytest.mark.parametrize("has_half_units", [True, False])
@pytest.mark.parametrize("num_heads", [3, 4, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_is_the_same_by_either_route(
    monkeypatch: pytest.MonkeyPatch, has_half_units: bool, num_heads: int, dtype: torch.dtype
) -> None:
    """Of peaked scores: they reach 16, and a rounding that is too coarse would show."""
    monkeypatch.setattr(vision_tower, "has_half_units", lambda dtype: has_half_units)
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(3, 2, 50, num_heads, 24, generator=generator)
    patches[:2] *= 1.8
    queries, keys, values = patches.to(dtype).transpose(2, 3)
    exact = F.scaled_dot_product_attention(queries.double(), keys.double(), values.double())
    attended = attend(queries, keys, values)
    assert attended.dtype == dtype
    closeness = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_difference(attended.double(), exact) < closeness


def test_pixels_are_normalised_as_the_preprocessor_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tiles = tiles_of(SIZES["tiny"], 1)
    standard = our_state(tmp_path, tiles)
    change_json(
        tmp_path / "preprocessor_config.json",
        lambda config: config.update(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]),
    )
    # the same change made by hand: fold the difference of the normalisations into the patches
    changed = our_state(tmp_path, tiles)
    assert relative_difference(changed, standard) > 1e-2
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    name = "vision_model.vision_model.embeddings.patch_embedding"

    def fold(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{name}.weight"]
        scale, shift = 0.5 / std, (0.5 - mean) / std
        tensors[f"{name}.bias"] += (weight * shift[None, :, None, None]).sum((1, 2, 3))
        tensors[f"{name}.weight"] = weight * scale[None, :, None, None]

    change_tensors(tmp_path, fold)
    change_json(
        tmp_path / "preprocessor_config.json",
        lambda config: config.update(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    )
    assert relative_difference(our_state(tmp_path, tiles), changed) < 1e-4


def test_pixels_are_scaled_as_the_preprocessor_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tiles = tiles_of(SIZES["tiny"], 1)
    half = our_state(tmp_path, tiles // 2 * 2)
    change_json(
        tmp_path / "preprocessor_config.json", lambda config: config.update(rescale_factor=2 / 255)
    )
    assert relative_difference(our_state(tmp_path, tiles // 2), half) < 1e-6
