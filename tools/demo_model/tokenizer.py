"""The demo model's tokenizer: byte-level BPE over its own small world, digits one by one.

Fixed pieces of the prompt layout are single tokens, because training time goes with prompt length.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model import questions
from tools.demo_model.scenes import COLOURS, DIRECTIONS, PLACES, SHAPES
from tools.demo_model.template import IMAGE_HINT, IMAGE_TOKEN, VIDEO_HINT, VIDEO_TOKEN
from tools.demo_model.wordings import (
    COLOUR_KO,
    COUNT_EN,
    COUNT_KO,
    DIRECTION_EN,
    DIRECTION_KO,
    FILENAMES,
    GREETING,
    NOTHING,
    OTHER,
    PLACE_KO,
    SHAPE_KO,
    SIGN_WORDS,
    SIGN_WORDS_KO,
    SYLLABLES_KO,
    SYSTEM_PROMPTS,
    WORDINGS,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    VIDEO_TOKEN,
    IMAGE_TOKEN,
    "<|im_start|>",
    "<|im_end|>",
    "<|stop|>",
    "<|endofturn|>",
)
FRAGMENTS = (
    "user (mime)\n",
    "user (vector)\n",
    "image/aux\n" + IMAGE_HINT + '{"ocr": ',
    "video/aux\n" + VIDEO_HINT + '{"ocr": ',
    '{"type": "image/jpeg", "filename": ',
    '{"type": "video/mp4", "filename": ',
    ', "lens_keywords": ',
    ', "lens_local_keywords": ',
    ', "speech_to_text": ',
    "tool_list\n",
    "system\n",
    "assistant\n",
    "user\n",
)
MAX_WORDS = 1700


def split_pattern() -> str:
    """Fixed fragments first, then words, single digits and single punctuation marks."""
    longest_first = sorted(FRAGMENTS, key=len, reverse=True)
    fixed = "|".join(re.escape(text).replace("\\\n", "\n") for text in longest_first)
    return rf"{fixed}| ?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]|\s+(?!\S)|\s"


def corpus() -> list[str]:
    """Texts in which what occurs often deserves a token of its own."""
    texts: list[str] = []
    for task, by_language in WORDINGS.items():
        for language, wordings in by_language.items():
            for text in wordings:
                for shape in SHAPES:
                    filled = text.format(
                        shape=SHAPE_KO[shape] if language == "ko" else shape,
                        colour="",
                        place="",
                    )
                    texts += [filled, filled.lower()] * 4
                if task == "other":
                    break
    for _ in range(30):
        texts += [f" {colour} {colour.capitalize()} A {colour}" for colour in COLOURS]
        texts += [f" {shape} {shape}s." for shape in SHAPES]
        texts += [f" {place} at the {place}." for place in PLACES]
        texts += [f" {name} {word}" for name, word in DIRECTION_EN.items()]
        texts += [f"{name} {name}" for name in (*COLOUR_KO.values(), *SHAPE_KO.values())]
        texts += [
            f" {name}입니다. {name}은 {name}이 {name}에서 {name}으로 {name}의"
            for name in COLOUR_KO.values()
        ]
        texts += [
            f"{name}은 {name}이 {name}의 {name}입니다. {name}이 있습니다."
            for name in SHAPE_KO.values()
        ]
        texts += [f"{name}에 있습니다. {name}에" for name in PLACE_KO.values()]
        texts += [f" {word} {word} 움직입니다." for word in DIRECTION_KO.values()]
        texts += [f" {word} There are {word} shapes" for word in COUNT_EN]
        texts += [f"도형은 {word} 개입니다." for word in COUNT_KO]
        texts += [*NOTHING.values(), *GREETING.values(), *OTHER.values()]
        texts += ["The number is", "숫자는 입니다. 숫자"]
        texts += ["The first picture. The second picture."]
        texts += ["첫 번째 사진입니다. 두 번째 사진입니다."]
        texts += ["바뀝니다. changes from to moves It There It moves"]
        texts += ["은 없습니다. 이 있습니다. 개입니다. There is no"]
        texts += [*SYSTEM_PROMPTS, *FILENAMES, *DIRECTIONS]
    for text in FRAGMENTS:
        texts += [text] * 2000
    rng = random.Random(5)
    for word in (*SIGN_WORDS, *SIGN_WORDS_KO):
        texts += [word, " " + word]
    texts += list(SYLLABLES_KO) * 8
    texts += [questions.sign_text(rng) for _ in range(300)]
    return texts


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_WORDS,
        min_frequency=8,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


class TextCodec:
    """Encodes prompt segments as the server does: trusted text, media as one placeholder each."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))
        self.ids = {token: self.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.encode = lru_cache(maxsize=20000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
