"""What training computes is what the server computes from the exported files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from server.attention.backend import choose_backend
from server.core import VisionInput
from server.model.checkpoint import load_model
from server.model.config import read_checkpoint
from server.vision.tiles import image_tiles
from tests.model.loading import all_logits, encode_tiles
from tools.demo_model import evaluate, export, labels, scenes
from tools.demo_model.network import DemoModel, Dimensions
from tools.demo_model.tokenizer import TextCodec

DEMO = Path(__file__).parents[2] / "server" / "demo"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, written as the trained one is."""
    folder = tmp_path_factory.mktemp("exported")
    codec = TextCodec(DEMO / "tokenizer.json")
    torch.manual_seed(3)
    model = DemoModel(Dimensions(vocab_size=codec.size), labels.CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)  # norms and biases too
    export.write(folder, DEMO / "tokenizer.json", dict(model.named_parameters()))
    return folder


def test_the_settings_that_ship_are_those_that_training_writes(exported: Path) -> None:
    for name in (
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert json.loads((exported / name).read_text()) == json.loads((DEMO / name).read_text())


def test_the_server_computes_what_training_computed(exported: Path) -> None:
    trained, _ = evaluate.load(exported)
    info = read_checkpoint(exported)
    assert info.vision is not None
    served = load_model(
        info,
        device="cpu",
        dtype="float32",
        backend=choose_backend(device="cpu", page_size=4),
        progress=lambda done, total: None,
    )
    scene = scenes.shape_scene(random.Random(5))
    medium, tiles = image_tiles(scene.image, info.vision, detail="high")
    assert isinstance(medium, VisionInput)
    pixels = torch.from_numpy(tiles)
    ids = list(range(20, 90))
    with torch.inference_mode():
        _, features = trained.see(pixels, medium.layout.tile_queries)
        _, frame = trained.see(pixels[:1], [4])
        expected = [*features[16], *frame[4]]
        found = encode_tiles(served, torch.cat([pixels, pixels[:1]]), (16,) * len(pixels) + (4,))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        hidden = trained.decoder(trained.decoder.embed_tokens(torch.tensor([ids])))
        logits = trained.decoder.logits(hidden)[0]
    torch.testing.assert_close(all_logits(served, [ids])[0], logits, atol=1e-3, rtol=1e-3)
