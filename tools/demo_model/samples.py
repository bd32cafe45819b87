"""Conversations as arrays: token ids, which feature stands where, and what must be answered."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.core import VisionLayout
from tools.demo_model import labels, questions
from tools.demo_model.feed import Weights
from tools.demo_model.questions import Conversation, Medium
from tools.demo_model.scenes import Clip
from tools.demo_model.template import IMAGE_TOKEN, VIDEO_TOKEN, segments
from tools.demo_model.tokenizer import TextCodec

TASKS = (
    "describe",
    "colour",
    "count",
    "where",
    "what",
    "number",
    "which",
    "video",
    "direction",
    "change",
    "ocr",
    "greeting",
)
NEWLINE = -1


@dataclass(frozen=True, slots=True)
class SampleMaker:
    """Called by the feed: makes one batch. `with_tiles` is off where the tower is not used."""

    codec: TextCodec
    conversations: int
    with_tiles: bool
    small: float

    def __call__(self, rng: random.Random, weights: Weights) -> dict[str, Any]:
        names = list(questions.KINDS)
        shares = [share * weights.get(name, 1.0) for name, share in questions.KINDS.items()]
        chosen = [
            questions.make(
                rng,
                rng.choices(names, shares)[0],
                weights=weights,
                num_turns=6,
                small=self.small,
                paint=self.with_tiles,
            )
            for _ in range(self.conversations)
        ]
        return collate(chosen, self.codec, with_tiles=self.with_tiles, num_groups=2)


def token_order(layout: VisionLayout) -> list[tuple[int, int]]:
    """(tile, token within the tile) of every feature in prompt order; tile -1 is the newline."""
    order = [(0, token) for token in range(layout.tile_queries[0])]
    if layout.local_grid is None or layout.kept is None:
        for tile in range(1, len(layout.tile_queries)):
            order += [(tile, token) for token in range(layout.tile_queries[tile])]
        return order + [(NEWLINE, 0)] * int(layout.newline)
    side = math.isqrt(layout.tile_queries[0])
    _, tile_columns = layout.local_grid
    top, left, rows, columns = layout.kept
    for row in range(top, top + rows):
        for column in range(left, left + columns):
            tile = 1 + (row // side) * tile_columns + column // side
            order.append((tile, (row % side) * side + column % side))
        if layout.newline:
            order.append((NEWLINE, 0))
    return order


class Canvas:
    """Collects the tiles of a batch, each distinct one once, by query count."""

    def __init__(self, *, with_tiles: bool) -> None:
        self.with_tiles = with_tiles
        self.tiles: dict[int, list[Any]] = {16: [], 4: []}
        self.patches: dict[int, list[Any]] = {16: [], 4: []}
        self.tokens: dict[int, list[Any]] = {16: [], 4: []}

    def add(self, medium: Medium) -> tuple[VisionLayout, list[int]]:
        """The layout and, for each of its tiles, the number of that tile among its kind."""
        content = medium.content
        if isinstance(content, Clip):
            vision, tiles, codes, tables = labels.clip_frames(content, with_tiles=self.with_tiles)
            whole = [True] * len(codes)
        else:
            vision, tiles, codes, table = labels.picture(
                content, detail=medium.detail, with_tiles=self.with_tiles
            )
            tables = [table] * len(codes)
            whole = [len(codes) <= 2 or index == 0 for index in range(len(codes))]
        numbers: list[int] = []
        for index, count in enumerate(vision.layout.tile_queries):
            if index == 1 and len(codes) == 2 and not isinstance(content, Clip):
                numbers.append(numbers[0])  # one tile: local and thumbnail are the same pixels
                continue
            numbers.append(len(self.tokens[count]))
            seen = np.array([whole[index]])
            one = codes[index : index + 1]
            self.tokens[count].append(
                labels.look_up(one, tables[index], math.isqrt(count), seen)[0]
            )
            if self.with_tiles:
                self.patches[count].append(labels.look_up(one, tables[index], 8, seen)[0])
                self.tiles[count].append(tiles[index])
        return vision.layout, numbers


def stacked(by_count: dict[int, list[Any]]) -> Any:
    """Those with 16 queries, then those with 4; None where there are none."""
    both = by_count[16] + by_count[4]
    return np.stack(both) if both else None


def collate(
    conversations: list[Conversation], codec: TextCodec, *, with_tiles: bool, num_groups: int
) -> dict[str, Any]:
    canvas = Canvas(with_tiles=with_tiles)
    rows: list[tuple[list[int], list[tuple[int, int, int]], list[bool], list[str]]] = []
    marks = {codec.ids[IMAGE_TOKEN], codec.ids[VIDEO_TOKEN]}
    for conversation in conversations:
        media = iter(conversation.media)
        ids: list[int] = []
        places: list[tuple[int, int, int]] = []  # (query count, tile number, token) or newline
        answers: list[bool] = []
        for segment in segments(conversation):
            for token in codec.encode(segment.text):
                if token not in marks:
                    ids.append(token)
                    places.append((0, 0, 0))
                    answers.append(segment.answer)
                    continue
                layout, numbers = canvas.add(next(media))
                for tile, index in token_order(layout):
                    count = 0 if tile == NEWLINE else layout.tile_queries[tile]
                    ids.append(token)
                    places.append((count, 0 if tile == NEWLINE else numbers[tile], index))
                    answers.append(False)
        rows.append((ids, places, answers, [turn.task for turn in conversation.turns]))
    rows.sort(key=lambda row: len(row[0]))
    first = 16 * len(canvas.tokens[16])
    newline = first + 4 * len(canvas.tokens[4])
    groups = []
    for part in np.array_split(np.arange(len(rows)), num_groups):
        if not len(part):
            continue
        longest = max(len(rows[index][0]) for index in part)
        ids_array = np.zeros((len(part), longest), dtype=np.int64)
        feature = np.full((len(part), longest), -1, dtype=np.int64)
        target = np.full((len(part), longest), -1, dtype=np.int64)
        turn = np.zeros((len(part), longest), dtype=np.int64)
        tasks: list[int] = []
        for line, index in enumerate(part):
            ids, places, answers, names = rows[index]
            ids_array[line, : len(ids)] = ids
            number = -1
            for place, (count, tile, token) in enumerate(places):
                if ids[place] in marks:
                    feature[line, place] = (
                        newline
                        if count == 0
                        else tile * count + token + (first if count == 4 else 0)
                    )
            for place in range(len(ids) - 1):
                if answers[place + 1]:
                    if not answers[place]:
                        number += 1
                        tasks.append(TASKS.index(names[number]))
                    target[line, place] = ids[place + 1]
                    turn[line, place] = len(tasks) - 1
        groups.append(
            {"ids": ids_array, "feature": feature, "target": target, "turn": turn, "tasks": tasks}
        )
    return {
        "groups": groups,
        "queries": [16] * len(canvas.tokens[16]) + [4] * len(canvas.tokens[4]),
        "tokens": canvas.tokens[16] + canvas.tokens[4],
        "tiles": stacked(canvas.tiles),
        "patches": stacked(canvas.patches),
    }
