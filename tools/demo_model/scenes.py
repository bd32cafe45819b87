"""Synthetic pictures and clips of the demo model's small world, with the truth about them.

A scene is drawn from a `random.Random` alone, so a seed repeats it. Beside each picture stands a
label picture (object number per pixel) for the dense auxiliary losses; it knows no question, no
token and no model.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (245, 225, 40),
    "green": (40, 155, 60),
    "cyan": (60, 205, 225),
    "blue": (35, 70, 215),
    "purple": (130, 45, 170),
    "pink": (250, 130, 185),
    "black": (15, 15, 18),
    "white": (250, 250, 250),
}
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "centre": (0.5, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
FONT_FOLDER = Path(__file__).parent / "fonts"
FRAME_SPACING_S = 0.4
SMALLEST_DIGIT = 0.2  # digit height over the picture's longer side

Rgb = tuple[int, int, int]
Held = Literal["train", "held", "any"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Item:
    """One shape; `centre` and `radius` in pixels of the picture."""

    shape: str
    colour: str
    place: str
    rgb: Rgb
    centre: tuple[float, float]
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Number:
    """One written number; `boxes` are the pixel boxes of its digits, left to right."""

    digits: str
    colour: str
    rgb: Rgb
    font: str
    boxes: tuple[tuple[float, float, float, float], ...]
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture with what is on it. `labels` holds 0 for ground, 1.. for items, 10.. for digits."""

    image: Image.Image
    labels: Image.Image
    items: tuple[Item, ...]
    number: Number | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """A video of one shape; `direction` is None where it changes its colour instead."""

    frames: tuple[Image.Image, ...]
    labels: tuple[Image.Image, ...]
    items: tuple[Item, ...]  # one per frame
    direction: str | None
    spacing_s: float = FRAME_SPACING_S

    @property
    def first_colour(self) -> str:
        return self.items[0].colour

    @property
    def last_colour(self) -> str:
        return self.items[-1].colour


def is_held_out(*names: str) -> bool:
    """Whether this combination belongs to the tenth that training never sees."""
    return hashlib.sha256("|".join(names).encode()).digest()[0] % 10 == 0


def fits(held: Held, *names: str) -> bool:
    return held == "any" or is_held_out(*names) == (held == "held")


def shade(rng: random.Random, colour: str) -> Rgb:
    """A shade near the named colour: brightness and each channel move a little."""
    base = COLOURS[colour]
    if colour == "black":
        grey = rng.randint(0, 38)
        return tuple(max(0, grey + rng.randint(-6, 6)) for _ in base)  # type: ignore[return-value]
    if colour == "white":
        grey = rng.randint(238, 255)
        return tuple(min(255, grey + rng.randint(-5, 5)) for _ in base)  # type: ignore[return-value]
    gain = rng.uniform(0.85, 1.1)
    return tuple(  # type: ignore[return-value]
        max(0, min(255, round(channel * gain + rng.uniform(-12, 12)))) for channel in base
    )


def ground_colour(rng: random.Random, against: list[Rgb]) -> Rgb:
    """A light or dark, weakly tinted colour that all of `against` stand out from."""
    choice: Rgb = (128, 128, 128)
    best = -1.0
    for _ in range(6):
        level = rng.uniform(195, 255) if rng.random() < 0.6 else rng.uniform(0, 75)
        if rng.random() < 0.12:
            level = rng.uniform(75, 195)
        tint = rng.uniform(0, 26)
        colour: Rgb = tuple(  # type: ignore[assignment]
            max(0, min(255, round(level + rng.uniform(-tint, tint)))) for _ in range(3)
        )
        distance = min((math.dist(colour, other) for other in against), default=999.0)
        if distance >= 110:
            return colour
        if distance > best:
            best, choice = distance, colour
    return choice


def draw_ground(rng: random.Random, size: tuple[int, int], against: list[Rgb]) -> Pixels:
    """A plain, gradient or noisy ground as uint8 [height, width, 3]."""
    width, height = size
    first = ground_colour(rng, against)
    kind = rng.choice(("plain", "gradient", "noise"))
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = first
    if kind == "gradient":
        second: Rgb = tuple(  # type: ignore[assignment]
            max(0, min(255, channel + rng.randint(-45, 45))) for channel in first
        )
        turn = rng.uniform(0, 2 * math.pi)
        across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] * math.cos(turn)
        down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * math.sin(turn)
        mix = np.clip(across + down + 0.5, 0, 1)[..., None]
        start, end = np.float32(first), np.float32(second)
        pixels[:] = (start + (end - start) * mix).astype(np.uint8)
    elif kind == "noise":
        noise = np.random.default_rng(rng.getrandbits(32))
        strength = rng.randint(4, 22)
        side_y, side_x = min(height, 256), min(width, 256)
        speck = noise.integers(-strength, strength + 1, (side_y, side_x, 3), dtype=np.int16)
        repeat = (-(-height // side_y), -(-width // side_x), 1)
        speck = np.tile(speck, repeat)[:height, :width]
        pixels[:] = np.clip(pixels.astype(np.int16) + speck, 0, 255).astype(np.uint8)
    return pixels


def outline(item: Item) -> list[tuple[float, float]]:
    """The corners of a shape; a circle has none and is drawn as an ellipse."""
    x, y = item.centre
    if item.shape == "square":
        corners = [(math.pi / 4 + k * math.pi / 2, 1.0) for k in range(4)]
    elif item.shape == "triangle":
        corners = [(-math.pi / 2 + k * 2 * math.pi / 3, 1.1) for k in range(3)]
    else:
        corners = [(-math.pi / 2 + k * math.pi / 5, 1.15 if k % 2 == 0 else 0.5) for k in range(10)]
    return [
        (
            x + item.radius * reach * math.cos(turn + item.angle),
            y + item.radius * reach * math.sin(turn + item.angle),
        )
        for turn, reach in corners
    ]


def draw_item(image: Image.Image, item: Item, fill: Rgb | int, *, smooth: bool) -> None:
    """Draws one shape, smoothed by four times oversampling of its own box where asked."""
    x, y = item.centre
    radius = item.radius
    corners = outline(item) if item.shape != "circle" else []
    if not smooth:
        draw = ImageDraw.Draw(image)
        if corners:
            draw.polygon(corners, fill=fill)
        else:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    scale = 4 if radius < 60 else 2
    left, top = math.floor(x - 1.2 * radius) - 1, math.floor(y - 1.2 * radius) - 1
    side = math.ceil(2.4 * radius) + 3
    mask = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(mask)
    if corners:
        draw.polygon([((cx - left) * scale, (cy - top) * scale) for cx, cy in corners], fill=255)
    else:
        box = (x - radius - left, y - radius - top, x + radius - left, y + radius - top)
        draw.ellipse([value * scale for value in box], fill=255)
    image.paste(fill, (left, top), mask.reduce(scale))


def random_size(rng: random.Random, *, smallest: int = 64, largest: int = 480) -> tuple[int, int]:
    """Width and height, both within the limits, aspect up to 3:1, small ones more often."""
    if largest == 480 and rng.random() < 0.03:
        largest = 2000
    longer = round(math.exp(rng.uniform(math.log(smallest), math.log(largest))))
    aspect = 1.0 if rng.random() < 0.25 else math.exp(rng.uniform(0, math.log(3)) ** 1.3)
    shorter = max(min(smallest, longer), round(longer / min(aspect, 3.0)))
    return (longer, shorter) if rng.random() < 0.6 else (shorter, longer)


def place_item(
    rng: random.Random, shape: str, colour: str, place: str, size: tuple[int, int], alone: bool
) -> Item:
    """A shape at a named place, jittered, sized so that neighbours do not touch."""
    width, height = size
    short = min(size)
    stretch = (max(size) / short - 1) / 2  # 0 for a square picture, 1 at 3:1
    largest = 0.165 + 0.06 * min(stretch, 1.0) + (0.05 if alone else 0.0)
    smallest = 0.11 + 0.055 * min(stretch, 1.0)
    radius = rng.uniform(smallest, largest) * short
    x, y = PLACES[place]
    jitter = 0.045
    angle = 0.0
    if shape == "square":
        angle = rng.uniform(-0.2, 0.2)
    elif shape in ("triangle", "star"):
        angle = rng.uniform(-0.3, 0.3)
    centre = (
        (x + rng.uniform(-jitter, jitter)) * width,
        (y + rng.uniform(-jitter, jitter)) * height,
    )
    return Item(shape, colour, place, shade(rng, colour), centre, radius, angle)


def shape_scene(
    rng: random.Random,
    *,
    held: Held = "train",
    size: tuple[int, int] | None = None,
    num_items: int | None = None,
    paint: bool = True,
) -> Scene:
    """One to four shapes at different places. `held` says which combinations may occur:
    "held" wants every item from the held-out tenth, "train" none of them."""
    size = size or random_size(rng)
    wanted = num_items or rng.randint(1, 4)
    places = rng.sample(list(PLACES), wanted)
    repeats = rng.random() < 0.3
    chosen: list[tuple[str, str, str]] = []
    for place in places:
        taken = {shape for shape, _, _ in chosen}
        for _ in range(200):
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            if shape in taken and not repeats:
                continue
            if fits(held, shape, colour, place):
                chosen.append((shape, colour, place))
                break
    if {"black", "white"} <= {colour for _, colour, _ in chosen}:
        # No ground sets both off well: keep the first of the two.
        first = next(colour for _, colour, _ in chosen if colour in ("black", "white"))
        drop = "white" if first == "black" else "black"
        chosen = [entry for entry in chosen if entry[1] != drop]
    items = [place_item(rng, *entry, size, len(chosen) == 1) for entry in chosen]
    items.sort(key=lambda item: list(PLACES).index(item.place))
    labels = Image.new("L", size, 0)
    for index, item in enumerate(items):
        draw_item(labels, item, index + 1, smooth=False)
    if not paint:
        return Scene(labels, labels, tuple(items))
    image = Image.fromarray(draw_ground(rng, size, [item.rgb for item in items]))
    for item in items:
        draw_item(image, item, item.rgb, smooth=True)
    return Scene(image, labels, tuple(items))


@lru_cache(maxsize=512)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "built-in":
        built_in = ImageFont.load_default(size)
        if not isinstance(built_in, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType")
        return built_in
    return ImageFont.truetype(str(FONT_FOLDER / f"{name}-digits.ttf"), size)


FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansCondensed",
    "built-in",
)


def random_number(rng: random.Random, held: Held) -> str:
    """Up to four digits; a number of several digits does not begin with 0."""
    while True:
        length = rng.choice((1, 2, 2, 3, 3, 4, 4))
        value = str(rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1))
        if fits(held, "number", value):
            return value


def number_scene(
    rng: random.Random,
    *,
    held: Held = "train",
    size: tuple[int, int] | None = None,
    paint: bool = True,
) -> Scene:
    """A number alone on a ground, its digits 24 to 96 px and a fifth of the longer side or more."""
    for attempt in range(1000):
        digits = random_number(rng, held)
        width, height = size if size and attempt < 20 else random_size(rng, largest=440)
        name = rng.choice(FONTS)
        smallest = max(24.0, SMALLEST_DIGIT * max(width, height))
        per_height = font(name, 100).getlength(digits) / 73  # width over digit height
        largest = min(96.0, 0.94 * width / per_height, 0.8 * height, 0.6 * max(width, height))
        if largest >= smallest:
            break
    colour = rng.choice(list(COLOURS))
    rgb = shade(rng, colour)
    tall = rng.uniform(smallest, largest)
    face = font(name, max(8, round(tall / 0.73)))
    left, top, right, bottom = face.getbbox(digits)
    room_x, room_y = width - (right - left), height - (bottom - top)
    x = rng.uniform(0.03, 0.97) * room_x if rng.random() < 0.5 else 0.5 * room_x
    y = rng.uniform(0.05, 0.95) * room_y if rng.random() < 0.5 else 0.5 * room_y
    labels = Image.new("L", (width, height), 0)
    image = labels
    if paint:
        image = Image.fromarray(draw_ground(rng, (width, height), [rgb]))
        ImageDraw.Draw(image).text((x - left, y - top), digits, fill=rgb, font=face)
    draw = ImageDraw.Draw(labels)
    boxes = []
    for index in range(len(digits)):
        start = x - left + face.getlength(digits[:index])
        end = x - left + face.getlength(digits[: index + 1])
        box = (start, y, end, y + bottom - top)
        boxes.append(box)
        draw.rectangle(box, fill=10 + index)
    middle = ((x + (right - left) / 2) / width, (y + (bottom - top) / 2) / height)
    place = min(PLACES, key=lambda name: math.dist(PLACES[name], middle))
    return Scene(image, labels, (), Number(digits, colour, rgb, name, tuple(boxes), place))


def clip(
    rng: random.Random,
    *,
    held: Held = "train",
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    paint: bool = True,
) -> Clip:
    """One shape that crosses part of the picture, or stays and changes its colour midway."""
    width, height = size or random_size(rng, largest=200)
    count = num_frames or min(rng.randint(4, 16), rng.randint(4, 16))
    changes = rng.random() < 0.3
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        direction = rng.choice(list(DIRECTIONS))
        other = rng.choice([name for name in COLOURS if name != colour])
        if changes:
            wrong = {colour, other} == {"black", "white"}
            if not wrong and fits(held, shape, colour, other):
                break
        elif fits(held, shape, colour, direction):
            break
    short = min(width, height)
    stretch = min((max(width, height) / short - 1) / 2, 1.0)
    radius = rng.uniform(0.13 + 0.04 * stretch, 0.21) * short
    rgb, other_rgb = shade(rng, colour), shade(rng, other)
    margin_x, margin_y = 1.1 * radius / width, 1.1 * radius / height
    low_x, high_x, low_y, high_y = margin_x, 1 - margin_x, margin_y, 1 - margin_y
    start = [rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)]
    end = list(start)
    if not changes:
        dx, dy = DIRECTIONS[direction]
        axis = 0 if dx else 1
        low, high = (low_x, high_x) if dx else (low_y, high_y)
        span = high - low
        travel = rng.uniform(0.5, 1.0) * span
        first = low + rng.uniform(0, span - travel)
        pair = (first, first + travel)
        start[axis], end[axis] = pair if (dx + dy) > 0 else pair[::-1]
        end[1 - axis] = start[1 - axis] + rng.uniform(-0.02, 0.02)
    ground = None
    if paint:
        ground = draw_ground(rng, (width, height), [rgb, other_rgb] if changes else [rgb])
    angle = rng.uniform(-0.2, 0.2)
    switch = rng.uniform(0.25, 0.75)
    frames, labels, items = [], [], []
    for index in range(count):
        # The middle of the frame's share of the clip, as the server samples it.
        when = (index + 0.5) / count
        x = (start[0] + (end[0] - start[0]) * when) * width
        y = (start[1] + (end[1] - start[1]) * when) * height
        after = changes and when > switch
        item = Item(
            shape,
            other if after else colour,
            "",
            other_rgb if after else rgb,
            (x, y),
            radius,
            angle,
        )
        label = Image.new("L", (width, height), 0)
        draw_item(label, item, 1, smooth=False)
        image = label
        if ground is not None:
            image = Image.fromarray(ground)
            draw_item(image, item, item.rgb, smooth=True)
        frames.append(image)
        labels.append(label)
        items.append(item)
    return Clip(tuple(frames), tuple(labels), tuple(items), None if changes else direction)
