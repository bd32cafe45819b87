"""The demo model's world: repeatable, within its stated domain, held-out parts really held out."""

import random

import numpy as np
import pytest
from PIL import Image

from tools.demo_model import acceptance, labels, scenes


def test_a_seed_repeats_a_scene_to_the_pixel():
    first = scenes.shape_scene(random.Random(5))
    second = scenes.shape_scene(random.Random(5))
    other = scenes.shape_scene(random.Random(6))

    assert first.image.tobytes() == second.image.tobytes()
    assert first.items == second.items
    assert first.items != other.items


@pytest.mark.parametrize("held", ["train", "held"])
def test_training_and_held_out_scenes_share_no_combination(held):
    rng = random.Random(1)
    for _ in range(60):
        for item in scenes.shape_scene(rng, held=held, size=(64, 64)).items:
            is_held = scenes.is_held_out(item.shape, item.colour, item.place)
            assert is_held == (held == "held")
        number = scenes.number_scene(rng, held=held, size=(100, 80)).number
        assert scenes.is_held_out("number", number.digits) == (held == "held")


def test_about_a_tenth_of_the_combinations_is_held_out():
    combinations = [
        scenes.is_held_out(shape, colour, place)
        for shape in scenes.SHAPES
        for colour in scenes.COLOURS
        for place in scenes.PLACES
    ]
    numbers = [scenes.is_held_out("number", str(value)) for value in range(10_000)]

    assert 0.05 < sum(combinations) / len(combinations) < 0.15
    assert 0.09 < sum(numbers) / len(numbers) < 0.11


def test_shapes_stand_where_their_place_says_and_inside_the_picture():
    rng = random.Random(2)
    for _ in range(40):
        scene = scenes.shape_scene(rng)
        width, height = scene.image.size
        assert 1 <= len(scene.items) <= 4
        for item in scene.items:
            x, y = item.centre[0] / width, item.centre[1] / height
            nearest = min(
                scenes.PLACES,
                key=lambda name: abs(scenes.PLACES[name][0] - x) + abs(scenes.PLACES[name][1] - y),
            )
            assert nearest == item.place


def test_numbers_are_legible_and_labels_cover_their_digits():
    rng = random.Random(3)
    for _ in range(30):
        scene = scenes.number_scene(rng)
        codes = np.asarray(scene.labels)
        shown = set(np.unique(codes)) - {0}
        assert shown == {10 + index for index in range(len(scene.number.digits))}
        left, top, _right, bottom = scene.number.boxes[0]
        assert bottom - top >= 0.95 * scenes.SMALLEST_DIGIT * max(scene.image.size)
        assert left >= -1 and scene.number.boxes[-1][2] <= scene.image.width + 4


@pytest.mark.parametrize("direction", list(scenes.DIRECTIONS))
def test_a_moving_shape_moves_the_way_it_says(direction):
    rng = random.Random(4)
    clips = [scenes.clip(rng, num_frames=4) for _ in range(60)]
    chosen = next(clip for clip in clips if clip.direction == direction)
    start, end = chosen.items[0].centre, chosen.items[-1].centre
    moved = (end[0] - start[0], end[1] - start[1])
    axis, sign = (0, 1) if direction in ("left", "right") else (1, 1)
    sign = -1 if direction in ("left", "up") else sign

    assert moved[axis] * sign > 0
    assert abs(moved[axis]) > abs(moved[1 - axis])


def test_labels_say_what_a_token_shows():
    ground = Image.new("RGB", (112, 112), (250, 250, 250))
    codes = Image.new("L", (112, 112), 0)
    item = scenes.Item("star", "red", "bottom right", (220, 30, 35), (84, 84), 18, 0.0)
    scenes.draw_item(codes, item, 1, smooth=False)
    scene = scenes.Scene(ground, codes, (item,))
    _, tiles, code_tiles, table = labels.picture(scene, detail="low")
    tokens = labels.look_up(code_tiles, table, 4, np.array([True]))[0].reshape(4, 4, -1)

    assert tiles.shape == (1, 112, 112, 3)
    assert tokens[3, 3, 0] == labels.SHAPE_NAMES.index("star") + 1
    assert tokens[3, 3, 1] == labels.COLOUR_NAMES.index("red") + 1
    assert tokens[3, 3, 3] == labels.PLACE_NAMES.index("bottom right") + 1
    assert tokens[0, 0].tolist() == [0] + [-1] * (len(labels.CLASSES) - 1)


def test_the_acceptance_set_is_fixed_and_judges_by_words():
    items = acceptance.acceptance_set()
    again = acceptance.acceptance_set()

    assert [item.question for item in items] == [item.question for item in again]
    assert len(items) == 25
    assert sum(item.spacing_s is not None for item in items) == 5
    assert items[0].is_right(items[0].answer.upper().replace(".", " "))
    assert not items[0].is_right(items[0].answer + " really")
