"""What is asked about a scene, in which words, and the one accepted answer to it.

Answers are short and canonical: the same truth always gets the same sentence. Knows no token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.demo_model import scenes
from tools.demo_model.feed import Weights
from tools.demo_model.scenes import PLACES, SHAPES, Clip, Held, Item, Scene
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
    Language,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and the one answer that is right."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or clip as a content part of the first user message."""

    content: Scene | Clip
    detail: Literal["low", "high"] = "high"
    filename: str = ""
    ocr: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...] = ()
    system: str | None = None
    text_first: bool = False


def thing(language: Language, colour: str, shape: str) -> str:
    """A shape with its colour, without article."""
    if language == "ko":
        return f"{COLOUR_KO[colour]} {SHAPE_KO[shape]}"
    return f"{colour} {shape}"


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def capital(words: str) -> str:
    return words[0].upper() + words[1:]


def listing(language: Language, items: Sequence[Item]) -> str:
    names = [thing(language, item.colour, item.shape) for item in items]
    if language == "ko":
        return ", ".join(names) + "이 있습니다."
    names = [article(name) for name in names]
    if len(names) == 1:
        return capital(names[0]) + "."
    return capital(", ".join(names[:-1]) + " and " + names[-1]) + "."


def place_phrase(language: Language, place: str) -> str:
    if language == "ko":
        return PLACE_KO[place]
    return "in the centre" if place == "centre" else f"at the {place}"


def wording(rng: random.Random, task: str, language: Language, **names: str) -> str:
    text = rng.choice(WORDINGS[task][language]).format(**names)
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if language == "en" and rng.random() < 0.1:
        text = text.lower()
    return text


def name_of(item: Item, items: Sequence[Item], language: Language) -> str | None:
    """How a question may call this item, or None where no name would be clear."""
    shape = SHAPE_KO[item.shape] if language == "ko" else item.shape
    if sum(other.shape == item.shape for other in items) == 1:
        return shape
    return None


def ask_shapes(rng: random.Random, scene: Scene, task: str, language: Language) -> Turn | None:
    """One question of that task about a picture of shapes; None where none would be clear."""
    items = scene.items
    ko = language == "ko"
    if task == "describe":
        return Turn(task, wording(rng, task, language), listing(language, items))
    if task == "count":
        count = len(items)
        if ko:
            answer = f"도형은 {COUNT_KO[count]} 개입니다."
        elif count == 1:
            answer = "There is one shape."
        else:
            answer = f"There are {COUNT_EN[count]} shapes."
        return Turn(task, wording(rng, task, language), answer)
    if task == "count_shape":
        shape = rng.choice(SHAPES) if rng.random() < 0.3 else rng.choice(items).shape
        count = sum(item.shape == shape for item in items)
        name = SHAPE_KO[shape] if ko else shape
        if ko:
            answer = f"{name}은 {COUNT_KO[count]} 개입니다." if count else f"{name}은 없습니다."
        elif count == 1:
            answer = f"There is one {name}."
        else:
            answer = f"There are {COUNT_EN[count]} {name}s."
        return Turn("count", wording(rng, task, language, shape=name), answer)
    if task == "what":
        place = rng.choice(list(PLACES)) if rng.random() < 0.2 else rng.choice(items).place
        found = [item for item in items if item.place == place]
        answer = NOTHING[language]
        if found:
            name = thing(language, found[0].colour, found[0].shape)
            answer = f"{name}입니다." if ko else capital(article(name)) + "."
        question = wording(rng, task, language, place=place_phrase(language, place))
        return Turn(task, question, answer)
    if rng.random() < 0.04:
        missing = [shape for shape in SHAPES if all(item.shape != shape for item in items)]
        if missing:
            shape = rng.choice(missing)
            name = SHAPE_KO[shape] if ko else shape
            answer = f"{name}은 없습니다." if ko else f"There is no {name}."
            return Turn(task, wording(rng, task, language, shape=name), answer)
    named = [(item, name_of(item, items, language)) for item in items]
    clear = [(item, name) for item, name in named if name]
    if not clear:
        return None
    item, name = rng.choice(clear)
    assert name is not None
    if task == "colour":
        answer = (
            f"{name}은 {COLOUR_KO[item.colour]}입니다." if ko else f"The {name} is {item.colour}."
        )
        return Turn(task, wording(rng, task, language, shape=name), answer)
    if task == "where":
        asked = name
        if rng.random() < 0.3:
            asked = thing(language, item.colour, item.shape)
        phrase = place_phrase(language, item.place)
        answer = f"{name}은 {phrase}에 있습니다." if ko else f"The {name} is {phrase}."
        return Turn(task, wording(rng, task, language, shape=asked), answer)
    raise ValueError(task)


def ask_number(rng: random.Random, scene: Scene, task: str, language: Language) -> Turn:
    assert scene.number is not None
    digits, ko = scene.number.digits, language == "ko"
    if task == "number":
        answer = f"숫자는 {digits}입니다." if ko else f"The number is {digits}."
        return Turn(task, wording(rng, "number", language), answer)
    if task == "describe":
        answer = f"숫자 {digits}입니다." if ko else f"The number {digits}."
        return Turn("number", wording(rng, "describe", language), answer)
    if task == "colour":
        name = "숫자" if ko else "number"
        colour = scene.number.colour
        answer = f"숫자는 {COLOUR_KO[colour]}입니다." if ko else f"The number is {colour}."
        question = wording(rng, "colour", language, shape=name).replace("숫자은", "숫자는")
        return Turn("colour", question, answer)
    raise ValueError(task)


def ask_clip(rng: random.Random, clip: Clip, task: str, language: Language) -> Turn:
    ko = language == "ko"
    shape = clip.items[0].shape
    name = SHAPE_KO[shape] if ko else shape
    first, last = clip.first_colour, clip.last_colour
    if clip.direction is None:
        if ko:
            answer = f"{name}이 {COLOUR_KO[first]}에서 {COLOUR_KO[last]}으로 바뀝니다."
        else:
            answer = f"The {name} changes from {first} to {last}."
        kind = "change" if task == "direction" else "video"
        return Turn("change", wording(rng, kind, language, shape=name), answer)
    if task == "direction":
        answer = (
            f"{DIRECTION_KO[clip.direction]} 움직입니다."
            if ko
            else f"It moves {DIRECTION_EN[clip.direction]}."
        )
        return Turn("direction", wording(rng, task, language, shape=name), answer)
    if task == "colour":
        answer = f"{name}은 {COLOUR_KO[first]}입니다." if ko else f"The {name} is {first}."
        return Turn("colour", wording(rng, task, language, shape=name), answer)
    subject = thing(language, first, shape)
    answer = (
        f"{subject}이 {DIRECTION_KO[clip.direction]} 움직입니다."
        if ko
        else f"{capital(article(subject))} moves {DIRECTION_EN[clip.direction]}."
    )
    return Turn("video", wording(rng, "video", language), answer)


def ask_pair(rng: random.Random, pair: tuple[Scene, Scene], language: Language) -> Turn | None:
    """Which of two pictures of shapes: by shape, by colour, or by how many."""
    ko = language == "ko"
    answers = (
        ("첫 번째 사진입니다.", "두 번째 사진입니다.")
        if ko
        else (
            "The first picture.",
            "The second picture.",
        )
    )
    kind = rng.choice(("which_shape", "which_colour", "which_more"))
    left, right = pair[0].items, pair[1].items
    if kind == "which_more":
        if len(left) == len(right):
            return None
        return Turn("which", wording(rng, kind, language), answers[len(right) > len(left)])
    if kind == "which_shape":
        sides = [{item.shape for item in items} for items in (left, right)]
    else:
        sides = [{item.colour for item in items} for items in (left, right)]
    only = [(name, 0) for name in sorted(sides[0] - sides[1])]
    only += [(name, 1) for name in sorted(sides[1] - sides[0])]
    if not only:
        return None
    name, side = rng.choice(only)
    if kind == "which_shape":
        question = wording(rng, kind, language, shape=SHAPE_KO[name] if ko else name)
    else:
        question = wording(rng, kind, language, colour=COLOUR_KO[name] if ko else name)
        question = question.replace(" a orange", " an orange")
    return Turn("which", question, answers[side])


def sign_text(rng: random.Random) -> str:
    """Words that nobody can know beforehand: signs, made-up words, letters, numbers, Korean."""
    words = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        kind = rng.random()
        if kind < 0.3:
            word = rng.choice(SIGN_WORDS)
        elif kind < 0.45:
            word = rng.choice(SIGN_WORDS_KO)
        elif kind < 0.6:
            count = rng.randint(1, 3)
            word = "".join(
                rng.choice("bcdfghjklmnprstvwz")
                + rng.choice("aeiou")
                + rng.choice(("", "n", "r", "s"))
                for _ in range(count)
            )
            word = rng.choice((word, word.upper(), word.capitalize()))
        elif kind < 0.72:
            word = "".join(rng.choice(SYLLABLES_KO) for _ in range(rng.randint(1, 3)))
        elif kind < 0.92:
            word = str(rng.randint(0, 10 ** rng.randint(1, 4)))
            word = rng.choice((word, word, "$" + word, word + "%", f"{word}:{rng.randint(10, 59)}"))
        else:
            letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
            word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 5)))
        words.append(rng.choice((word, word, word, word.lower(), word + rng.choice("!.,"))))
    return " ".join(words).strip()


SHAPE_TASKS = ("describe", "colour", "count", "count_shape", "where", "what")


def pick(rng: random.Random, tasks: Sequence[str], weights: Weights) -> str:
    return rng.choices(tasks, [weights.get(task, 1.0) for task in tasks])[0]


def dress(rng: random.Random, content: Scene | Clip, ocr: str = "") -> Medium:
    """A part with the optional fields people send or leave away."""
    filename = rng.choice(FILENAMES) if rng.random() < 0.35 else ""
    detail: Literal["low", "high"] = "low" if rng.random() < 0.15 else "high"
    return Medium(content, detail, filename, ocr)


def frame(rng: random.Random, turns: Sequence[Turn], media: Sequence[Medium]) -> Conversation:
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    return Conversation(tuple(turns), tuple(media), system, rng.random() < 0.15)


def make(
    rng: random.Random,
    kind: str,
    *,
    weights: Weights,
    num_turns: int,
    held: Held = "train",
    small: float = 0.0,
    paint: bool = True,
) -> Conversation:
    """A conversation of one of KINDS. Every turn is independent of the turns before it.

    `small` is the share of pictures that fit one tile, which cost least. Without `paint`
    only the label pictures are drawn.
    """

    def language() -> Language:
        return "ko" if rng.random() < 0.4 else "en"

    if kind == "text":
        tasks = rng.choices(("greeting", "other"), (0.6, 0.4), k=rng.choice((1, 1, 2)))
        turns = []
        for task in tasks:
            spoken = language()
            answer = GREETING[spoken] if task == "greeting" else OTHER[spoken]
            turns.append(Turn("greeting", wording(rng, task, spoken), answer))
        return frame(rng, turns, [])
    if kind == "clip":
        clip = scenes.clip(rng, held=held, paint=paint)
        turns = [
            ask_clip(rng, clip, rng.choice(("video", "video", "direction", "colour")), language())
            for _ in range(min(num_turns, 4))
        ]
        return frame(rng, turns, [dress(rng, clip)])
    if kind == "number":
        size = scenes.random_size(rng, largest=112) if rng.random() < small else None
        scene = scenes.number_scene(rng, held=held, size=size, paint=paint)
        tasks = ["number", *rng.choices(("number", "describe", "colour"), k=min(num_turns, 3) - 1)]
        rng.shuffle(tasks)
        turns = [ask_number(rng, scene, task, language()) for task in tasks]
        return frame(rng, turns, [dress(rng, scene)])
    if kind == "pair":
        size = scenes.random_size(rng, largest=170)
        first = scenes.shape_scene(rng, held=held, size=size, paint=paint)
        second = scenes.shape_scene(rng, held=held, paint=paint)
        turns = []
        for _ in range(40):
            asked = ask_pair(rng, (first, second), language())
            if asked:
                turns.append(asked)
            if len(turns) == min(num_turns, 5):
                break
        if turns:
            return frame(rng, turns, [dress(rng, first), dress(rng, second)])
        kind = "shapes"
    if kind == "ocr":
        text = sign_text(rng)
        scene = scenes.shape_scene(
            rng, held=held, size=scenes.random_size(rng, largest=112), paint=paint
        )
        turns = [Turn("ocr", wording(rng, "ocr", language()), text) for _ in range(3)]
        for _ in range(rng.choice((0, 1))):
            asked = ask_shapes(rng, scene, pick(rng, SHAPE_TASKS, weights), language())
            if asked:
                turns.insert(rng.randint(0, len(turns)), asked)
        return frame(rng, turns, [dress(rng, scene, text)])
    size = scenes.random_size(rng, largest=112) if rng.random() < small else None
    scene = scenes.shape_scene(rng, held=held, size=size, paint=paint)
    turns = []
    while len(turns) < num_turns:
        asked = ask_shapes(rng, scene, pick(rng, SHAPE_TASKS, weights), language())
        if asked:
            turns.append(asked)
    ocr = ""
    if rng.random() < 0.12:
        ocr = sign_text(rng)
        turns[rng.randrange(len(turns))] = Turn("ocr", wording(rng, "ocr", language()), ocr)
    return frame(rng, turns, [dress(rng, scene, ocr)])


KINDS = {"shapes": 0.4, "number": 0.14, "clip": 0.18, "pair": 0.2, "ocr": 0.12, "text": 0.03}
