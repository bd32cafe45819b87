"""The pictures and clips of a seed that was fixed before training, for tests over HTTP."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from PIL import Image

from tools.demo_model import questions, scenes
from tools.demo_model.feed import stream_of
from tools.demo_model.questions import Turn
from tools.demo_model.wordings import Language

ACCEPTANCE_SEED = 20261122
SCENE_TASKS = ("describe", "colour", "count", "where", "what", "number")
SIZES = ((64, 64), (100, 80), (224, 224), (320, 240), (640, 480), (300, 500), (1200, 800))


@dataclass(frozen=True, slots=True)
class Item:
    """A picture (one frame) or a clip, a question about it and the accepted answer.

    Each frame of a clip stands for `spacing_s` seconds.
    """

    task: str
    frames: tuple[Image.Image, ...]
    spacing_s: float | None
    question: str
    answer: str

    def is_right(self, said: str) -> bool:
        return normal(said) == normal(self.answer)


def normal(text: str) -> str:
    """Without case, punctuation and doubled space."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def scene_item(rng: random.Random, number: int) -> Item:
    task = SCENE_TASKS[number % len(SCENE_TASKS)]
    language: Language = "ko" if number % 3 == 2 else "en"
    size = SIZES[number % len(SIZES)]
    turn: Turn | None = None
    while turn is None:
        if task == "number":
            fitting = (min(size[0], 440), min(size[1], 440))
            scene = scenes.number_scene(rng, held="any", size=fitting)
            turn = questions.ask_number(rng, scene, task, language)
        else:
            scene = scenes.shape_scene(rng, held="any", size=size)
            turn = questions.ask_shapes(rng, scene, task, language)
    return Item(turn.task, (scene.image,), None, turn.question, turn.answer)


def clip_item(rng: random.Random, number: int) -> Item:
    language: Language = "ko" if number % 3 == 2 else "en"
    clip = scenes.clip(rng, held="any", size=(160, 120), num_frames=6 + number)
    turn = questions.ask_clip(rng, clip, "video", language)
    return Item(turn.task, clip.frames, clip.spacing_s, turn.question, turn.answer)


def acceptance_set(*, num_scenes: int = 20, num_clips: int = 5) -> list[Item]:
    """The first scenes and clips of the seed, always the same."""
    pictures = [
        scene_item(stream_of(ACCEPTANCE_SEED, "scene", number), number)
        for number in range(num_scenes)
    ]
    clips = [
        clip_item(stream_of(ACCEPTANCE_SEED, "clip", number), number) for number in range(num_clips)
    ]
    return pictures + clips
