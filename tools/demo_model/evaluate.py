"""How often a checkpoint's answers are right, task by task, on scenes training never saw.

Greedy decoding gives the accepted answer exactly when, fed that answer, the model would choose each
of its tokens and the end after it; so one forward pass judges a question. The weights are those of
the exported file, in float32.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tools.demo_model import joint_phase, labels, questions, scenes
from tools.demo_model.export import official_tensors
from tools.demo_model.feed import stream_of
from tools.demo_model.network import DemoModel, Dimensions
from tools.demo_model.questions import Conversation, Held, Turn
from tools.demo_model.samples import collate
from tools.demo_model.tokenizer import TextCodec
from tools.demo_model.wordings import GREETING, OTHER, Language

EVALUATION_SEED = 20261123
FOLLOW_UP = "follow-up"
MEANINGS = {
    "describe": "describe: all shapes with their colours, in order",
    "colour": "colour of a shape",
    "count": "how many, of all shapes or of one kind",
    "where": "where a shape is",
    "what": "what is at a place",
    "number": "the number (up to four digits)",
    "which": "which of two pictures",
    "video": "what happens in the video: shape, colour, direction or colours",
    "direction": "direction of a movement",
    "change": "change of a colour",
    "ocr": "text of the `ocr` field",
    FOLLOW_UP: "a later turn about the same picture",
    "greeting": "greetings and requests outside its world, in wordings seen in training",
}
CLIP_TASKS = ("video", "direction", "change")
WITHOUT_COMBINATIONS = ("ocr", "greeting")
"""Tasks whose questions hold no combination that could be held out."""


def load(folder: Path) -> tuple[DemoModel, TextCodec]:
    """The exported checkpoint in the training modules."""
    codec = TextCodec(folder / "tokenizer.json")
    size = Dimensions(vocab_size=codec.size)
    model = DemoModel(size, labels.CLASSES)
    stored = load_file(folder / "model.safetensors")
    # Parameters that carry their own position tell which stored tensor is which of ours.
    own = {name: p for name, p in model.named_parameters() if "probe" not in name}
    with torch.no_grad():
        for name, parameter in own.items():
            official = next(iter(official_tensors({name: parameter}, size)))
            parameter.copy_(stored[official].float().view_as(parameter))
    return model.eval(), codec


def follow_up(rng: random.Random, held: Held) -> Conversation:
    """Three questions about one picture, in both languages; the last one is judged."""
    scene = scenes.shape_scene(rng, held=held)
    turns: list[Turn] = []
    while len(turns) < 3:
        language: Language = "ko" if rng.random() < 0.4 else "en"
        asked = questions.ask_shapes(rng, scene, rng.choice(questions.SHAPE_TASKS), language)
        if asked:
            turns.append(asked)
    return Conversation(tuple(turns), (questions.Medium(scene),))


def turn_of(rng: random.Random, task: str, held: Held) -> Conversation:
    """One question of this task about a fresh picture, pair or clip."""
    if task == FOLLOW_UP:
        return follow_up(rng, held)
    language: Language = "ko" if rng.random() < 0.4 else "en"
    media: list[questions.Medium] = []
    turn: Turn | None = None
    while turn is None or turn.task != task:
        if task == "greeting":
            kind = rng.choice(("greeting", "other"))
            answers = GREETING if kind == "greeting" else OTHER
            turn = Turn(task, questions.wording(rng, kind, language), answers[language])
        elif task in CLIP_TASKS:
            clip = scenes.clip(rng, held=held)
            media = [questions.Medium(clip)]
            turn = questions.ask_clip(
                rng, clip, "video" if task == "video" else "direction", language
            )
        elif task == "number":
            scene = scenes.number_scene(rng, held=held)
            media = [questions.Medium(scene)]
            turn = questions.ask_number(rng, scene, "number", language)
        elif task == "which":
            first = scenes.shape_scene(rng, held=held)
            second = scenes.shape_scene(rng, held=held)
            media = [questions.Medium(first), questions.Medium(second)]
            turn = questions.ask_pair(rng, (first, second), language)
        elif task == "ocr":
            text = questions.sign_text(rng)
            scene = scenes.shape_scene(rng, held=held)
            media = [questions.Medium(scene, ocr=text)]
            turn = Turn(task, questions.wording(rng, "ocr", language), text)
        else:
            scene = scenes.shape_scene(rng, held=held)
            media = [questions.Medium(scene)]
            kind = "count_shape" if task == "count" and rng.random() < 0.3 else task
            turn = questions.ask_shapes(rng, scene, kind, language)
    return Conversation((turn,), tuple(media))


def conversations(task: str, held: Held, count: int, *, seed: int) -> Iterator[Conversation]:
    for number in range(count):
        yield turn_of(stream_of(seed, "evaluation", task, held, number), task, held)


@torch.no_grad()
def accuracy(
    model: DemoModel, codec: TextCodec, task: str, held: Held, count: int, *, seed: int
) -> float:
    asked = list(conversations(task, held, count, seed=seed))
    right = 0.0
    for start in range(0, count, 20):
        batch = collate(asked[start : start + 20], codec, with_tiles=True, num_groups=2)
        features = {}
        if batch["tiles"] is not None:
            _, features = model.see(torch.from_numpy(batch["tiles"]), batch["queries"])
        flat = joint_phase.flatten(model, features)
        for group in batch["groups"]:
            _, whole = joint_phase.answer_loss(model, flat, group)
            # Of each conversation the last turn.
            right += float(whole.view(len(group["ids"]), -1)[:, -1].sum())
    return right / count


def report(
    folder: Path, count: int = 200, *, seed: int = EVALUATION_SEED
) -> dict[str, tuple[float, float | None]]:
    """Per task: the share right on fresh scenes, and on held-out combinations only."""
    model, codec = load(folder)
    results: dict[str, tuple[float, float | None]] = {}
    for task in MEANINGS:
        fresh = accuracy(model, codec, task, "train", count, seed=seed)
        held = None
        if task not in WITHOUT_COMBINATIONS:
            held = accuracy(model, codec, task, "held", count, seed=seed)
        results[task] = (fresh, held)
        print(f"{task:10} {fresh:6.1%} {share(held)}", flush=True)
    return results


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def table(results: dict[str, tuple[float, float | None]]) -> str:
    """The results as the model card shows them."""
    lines = ["| task | fresh scenes | held-out combinations |", "|---|---|---|"]
    for task, (fresh, held) in results.items():
        lines.append(f"| {MEANINGS[task]} | {fresh:.1%} | {share(held)} |")
    return "\n".join(lines)
