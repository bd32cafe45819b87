"""Tiles to decoder embeddings: order, cropping and newlines, against the plain description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from server.core import VisionLayout
from server.model.config import read_checkpoint
from server.model.vlm import VisionLanguageModel
from server.vision.tiles import image_tiles
from tests.model.loading import (
    change_json,
    change_tensors,
    encode_tiles,
    encode_vision,
    load,
    relative_difference,
)
from tools.random_checkpoint import write_checkpoint

THUMBNAIL = VisionLayout(tile_queries=(16,), newline=True)
PICTURE = VisionLayout(tile_queries=(16,) * 3, local_grid=(1, 2), kept=(1, 0, 2, 8), newline=True)
TALL = VisionLayout(tile_queries=(16,) * 5, local_grid=(2, 2), kept=(0, 1, 8, 6), newline=True)
NOT_UNPADDED = VisionLayout(tile_queries=(16,) * 3, local_grid=(2, 1), kept=(0, 0, 8, 4))
VIDEO = VisionLayout(tile_queries=(16, 4, 4, 4, 4, 4, 4, 4, 4, 16, 4))
ALL = [THUMBNAIL, PICTURE, VIDEO, TALL, NOT_UNPADDED]


def random_tiles(count: int) -> Tensor:
    values = np.random.default_rng(1).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny")))


def tile_features(model: VisionLanguageModel, tile: Tensor, queries: int) -> Tensor:
    return encode_tiles(model, tile[None], [queries])[0]


def assembled_by_hand(model: VisionLanguageModel, tiles: Tensor, layout: VisionLayout) -> Tensor:
    """Walk the feature map one cell at a time."""
    features = [
        tile_features(model, tile, queries)
        for tile, queries in zip(tiles, layout.tile_queries, strict=True)
    ]
    newline = model.image_newline
    assert newline is not None
    if layout.local_grid is None or layout.kept is None:
        return torch.cat([*features, newline[None]] if layout.newline else features)
    tokens = list(features[0])
    top, left, rows, columns = layout.kept
    for y in range(top, top + rows):
        for x in range(left, left + columns):
            tile = features[1 + (y // 4) * layout.local_grid[1] + x // 4]
            tokens.append(tile[(y % 4) * 4 + x % 4])
        if layout.newline:
            tokens.append(newline)
    return torch.stack(tokens)


@pytest.mark.parametrize("layout", ALL, ids=["low", "wide", "tall", "no_unpad", "video"])
def test_one_medium(model: VisionLanguageModel, layout: VisionLayout) -> None:
    tiles = random_tiles(len(layout.tile_queries))
    with torch.inference_mode():
        features = encode_vision(model, tiles, [layout])
        expected = assembled_by_hand(model, tiles, layout)
    assert len(features) == 1
    assert features[0].shape == (layout.num_tokens, 64)
    torch.testing.assert_close(features[0], expected, atol=1e-4, rtol=1e-4)


def test_several_media_together(model: VisionLanguageModel) -> None:
    counts = [len(layout.tile_queries) for layout in ALL]
    tiles = random_tiles(sum(counts))
    with torch.inference_mode():
        together = encode_vision(model, tiles, ALL)
        alone = [
            encode_vision(model, own, [layout])[0]
            for own, layout in zip(tiles.split(counts), ALL, strict=True)
        ]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projector", ["cabstractor", "linear", "mlp", "inverted_mlp"])
@pytest.mark.parametrize("size", [(56, 56), (50, 37), (200, 90), (30, 300), (640, 480), (1, 200)])
def test_features_are_as_many_as_the_tokens_promised(
    tmp_path: Path, projector: str, size: tuple[int, int]
) -> None:
    folder = write_checkpoint(tmp_path, projector=projector)
    spec = read_checkpoint(folder).vision
    assert spec is not None
    medium, tiles = image_tiles(Image.new("RGB", size, (10, 200, 30)), spec)
    with torch.inference_mode():
        features = encode_vision(load(folder), torch.from_numpy(tiles), [medium.layout])
    assert features[0].shape == (medium.num_tokens, 64)


def test_another_number_of_features_than_promised_is_refused(model: VisionLanguageModel) -> None:
    beyond = VisionLayout(
        tile_queries=(16,) * 3, local_grid=(1, 2), kept=(3, 0, 4, 8), newline=True
    )
    with pytest.raises(ValueError, match="placeholders"), torch.inference_mode():
        encode_vision(model, random_tiles(3), [beyond])


def test_a_head_smaller_than_the_embedding_masks_what_it_has(tmp_path: Path) -> None:
    """Ids without a token are masked where there is a row for them, and nowhere else."""
    folder = write_checkpoint(tmp_path, is_tied=False)

    def cut_head(tensors: dict[str, Tensor]) -> None:
        name = "language_model.lm_head.weight"
        tensors[name] = tensors[name][:264].clone()

    change_tensors(folder, cut_head)
    change_json(folder / "config.json", lambda c: c["text_config"].update(vocab_size=264))

    def add_a_token_behind_the_head(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][-1], "id": 268, "content": "<|far|>"}
        )

    change_json(folder / "tokenizer.json", add_a_token_behind_the_head)
    info = read_checkpoint(folder)
    assert (info.text.embedding_rows, info.text.logits_rows) == (272, 264)
    assert max(info.missing_token_ids) > 264
    with torch.inference_mode():
        logits = load(folder).logits(torch.ones(1, info.text.hidden_size))
    assert logits.shape == (1, 264)
    masked = (logits[0] == -torch.inf).nonzero()[:, 0].tolist()
    assert masked == [token_id for token_id in info.missing_token_ids if token_id < 264]


def test_a_text_checkpoint_has_no_eyes(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, layout="text"))
    with pytest.raises(ValueError, match="no vision tower"):
        encode_vision(model, random_tiles(1), [THUMBNAIL])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tmp_path: Path, dtype: str) -> None:
    folder = write_checkpoint(tmp_path)
    tiles = random_tiles(3)
    with torch.inference_mode():
        exact = encode_vision(load(folder), tiles, [PICTURE])[0]
        rounded = encode_vision(load(folder, dtype=dtype), tiles, [PICTURE])[0]
    assert rounded.dtype == getattr(torch, dtype)
    assert 0 < relative_difference(rounded, exact) < 5e-2
