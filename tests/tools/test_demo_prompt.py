"""Training and serving see the same prompt: template, token ids, place of the features."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.chat.tokenizer import Tokenizer
from server.core import VisionLayout
from server.model.config import read_checkpoint
from tools.demo_model import labels, questions, samples, template
from tools.demo_model.tokenizer import TextCodec

DEMO = Path(__file__).parents[2] / "server" / "demo"


@pytest.fixture(scope="module")
def renderer():
    return PreTrainedTokenizerFast.from_pretrained(DEMO)


@pytest.mark.parametrize("kind", list(questions.KINDS))
def test_training_text_is_what_the_shipped_template_renders(renderer, kind):
    rng = random.Random(7)
    for _ in range(6):
        conversation = questions.make(rng, kind, weights={}, num_turns=3, paint=False)
        for upto in range(len(conversation.turns)):
            own = "".join(segment.text for segment in template.segments(conversation, upto=upto))
            rendered = renderer.apply_chat_template(
                template.messages(conversation, upto=upto),
                tokenize=False,
                add_generation_prompt=True,
            )
            assert rendered == own


def test_training_ids_are_the_servers_ids():
    codec, server = TextCodec(DEMO / "tokenizer.json"), Tokenizer.from_folder(DEMO)
    rng = random.Random(8)
    for _ in range(200):
        text = questions.sign_text(rng)
        assert list(codec.encode(text)) == server.encode_text(text)
        assert server.decode(codec.encode(text)) == text


def test_digits_are_single_tokens():
    codec = TextCodec(DEMO / "tokenizer.json")
    assert [codec.decode([token]) for token in codec.encode("4071")] == list("4071")


def test_the_shipped_settings_cut_pictures_as_training_did():
    vision = read_checkpoint(DEMO).vision
    assert vision is not None
    assert vision == replace(
        labels.SPEC,
        image_token_id=vision.image_token_id,
        video_token_id=vision.video_token_id,
    )


def test_features_come_in_the_servers_order():
    layout = VisionLayout((16,) * 5, local_grid=(2, 2), kept=(1, 0, 6, 8), newline=True)
    order = samples.token_order(layout)

    assert len(order) == layout.num_tokens
    assert order[:16] == [(0, token) for token in range(16)]
    # The first kept row is the second of the upper two tiles, then comes a newline.
    assert order[16:25] == [(1, token) for token in range(4, 8)] + [
        (2, token) for token in range(4, 8)
    ] + [(samples.NEWLINE, 0)]


def test_a_one_tile_picture_is_seen_once_and_used_twice():
    codec = TextCodec(DEMO / "tokenizer.json")
    rng = random.Random(9)
    conversation = questions.make(rng, "ocr", weights={}, num_turns=1)
    medium = replace(conversation.media[0], detail="high")
    batch = samples.collate(
        [replace(conversation, media=(medium,))], codec, with_tiles=True, num_groups=1
    )
    group = batch["groups"][0]
    features = group["feature"][group["feature"] >= 0]

    assert len(batch["tiles"]) == math.ceil(max(features) / 16) == 1
    assert sorted(set(features)) == list(range(17))  # sixteen features and the newline
