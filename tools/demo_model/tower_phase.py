"""First phase: tower and projector alone learn what every patch and output token shows."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_model import labels, scenes
from tools.demo_model.feed import Feed, Weights
from tools.demo_model.network import DemoModel
from tools.demo_model.optimizer import Optimizer

FIELD_WEIGHTS = (1.0, 0.7, 1.0, 0.5, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0)
TILES_PER_BATCH = 96


def tower_batch(rng: random.Random, weights: Weights) -> dict[str, Any]:
    """Loose tiles: half of them of numbers, the rest shapes and single video frames."""
    tiles, patches, tokens, queries = [], [], [], []

    def add(tile: Any, codes: Any, table: Any, count: int, *, whole: bool) -> None:
        seen = np.array([whole])
        tiles.append(tile)
        patches.append(labels.look_up(codes[None], table, 8, seen)[0])
        tokens.append(labels.look_up(codes[None], table, math.isqrt(count), seen)[0])
        queries.append(count)

    while len(tiles) < TILES_PER_BATCH:
        kind = rng.random()
        if kind < 0.12:
            clip = scenes.clip(rng, num_frames=rng.choice((2, 3)))
            _, cut, codes, tables = labels.clip_frames(clip)
            for index in range(2):
                count = rng.choice((16, 4, 4))
                add(cut[index], codes[index], tables[index], count, whole=True)
            continue
        size = scenes.random_size(rng, largest=440 if rng.random() < 0.2 else 240)
        if kind < 0.6:
            scene = scenes.number_scene(rng, size=size)
        else:
            scene = scenes.shape_scene(rng, size=size)
        _, cut, codes, table = labels.picture(scene)
        add(cut[0], codes[0], table, 16, whole=True)
        if len(cut) > 2:
            for index in rng.sample(range(1, len(cut)), rng.choice((0, 1, 1, 2))):
                add(cut[index], codes[index], table, 16, whole=False)
    return {
        "tiles": np.stack(tiles),
        "patches": np.stack(patches),
        "tokens": tokens,
        "queries": queries,
    }


def field_losses(outputs: list[Tensor], wanted: Tensor) -> Tensor:
    """Weighted cross-entropies of all fields; `wanted` [.., fields], where -1 asks nothing."""
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for index, (output, weight) in enumerate(zip(outputs, FIELD_WEIGHTS, strict=True)):
        target = wanted[..., index].reshape(-1)
        logits = output.reshape(len(target), -1).float()
        asked = target >= 0
        if not bool(asked.any()):
            continue
        losses = F.cross_entropy(logits[asked], target[asked], reduction="none")
        if index == 0:
            ground = target[asked] == 0
            losses = torch.where(ground, losses * 0.3, losses)
        total = total + weight * losses.mean()
    return total


def field_scores(outputs: list[Tensor], wanted: Tensor) -> list[tuple[float, int]]:
    scores = []
    for index, output in enumerate(outputs):
        target = wanted[..., index].reshape(-1)
        asked = target > 0 if index in (0, 6, 7, 8, 9) else target >= 0
        right = output.reshape(len(target), -1).argmax(-1)[asked] == target[asked]
        scores.append((float(right.sum()), int(asked.sum())))
    return scores


def token_targets(tokens: list[Any], queries: list[int], count: int) -> Tensor:
    chosen = [token for token, number in zip(tokens, queries, strict=True) if number == count]
    return torch.from_numpy(np.stack(chosen)).long()


def dense_loss(
    model: DemoModel, states: Tensor, outputs: dict[int, Tensor], batch: dict[str, Any]
) -> tuple[Tensor, list[tuple[float, int]]]:
    """Losses of the patches' probe and the tokens' fields, and how often the latter are right."""
    patches = torch.from_numpy(batch["patches"]).long()
    loss = 0.5 * field_losses(model.patch_probe(states), patches)
    totals = [(0.0, 0)] * len(FIELD_WEIGHTS)
    for count, output in outputs.items():
        wanted = token_targets(batch["tokens"], batch["queries"], count)
        held = model.read(output).float()
        goal = torch.from_numpy(labels.many_hot(wanted.numpy()))
        weight = torch.where(wanted[..., :1] > 0, 1.0, 0.25)
        share = 1.0 if count == 16 else 0.4
        read = list((held * 10).split(model.classes, dim=-1))
        loss = loss + share * field_losses(read, wanted)
        loss = loss + share * 2.0 * ((held - goal).square() * weight).sum(-1).mean()
        scores = field_scores(read, wanted)
        totals = [(a + c, b + d) for (a, b), (c, d) in zip(totals, scores, strict=True)]
    return loss, totals


def run(
    model: DemoModel, optimizer: Optimizer, folder: Path, *, seed: int, budget_s: float
) -> None:
    """Trains for `budget_s` seconds in all, counting what a checkpoint says was spent before."""
    checkpoint = folder / "tower.pt"
    spent, steps = 0.0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.load(saved["optimizer"])
        spent, steps = saved["spent"], saved["steps"]
    feed = Feed(tower_batch, seed=seed, phase="tower", first=steps)
    sums = [(0.0, 0)] * len(FIELD_WEIGHTS)
    total, seen, saved_at = 0.0, 0, time.monotonic()
    started = time.monotonic() - spent
    last = time.monotonic()
    for batch in feed:
        progress = (time.monotonic() - started) / budget_s
        if progress >= 1:
            break
        # warm-up, then flat, then down to a tenth: the joint phase goes on from here
        rate = min(1.0, steps / 100 + 0.02) * min(1.0, 0.1 + 1.8 * (1 - progress))
        with torch.autocast("cpu", torch.bfloat16):
            states, outputs = model.see(torch.from_numpy(batch["tiles"]), batch["queries"])
            loss, scores = dense_loss(model, states, outputs, batch)
        loss.backward()
        norm = optimizer.step(rate)
        steps += 1
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, scores, strict=True)]
        total, seen = total + float(loss.detach()), seen + 1
        if steps % 100 == 0:
            now = time.monotonic()
            line = {
                "phase": "tower",
                "step": steps,
                "spent_s": round(now - started),
                "tiles_per_s": round(seen * TILES_PER_BATCH / (now - last), 1),
                "rate": round(rate, 3),
                "loss": round(total / seen, 3),
                "norm": round(norm, 2),
                "right": [round(right / max(asked, 1), 3) for right, asked in sums],
            }
            print(json.dumps(line), flush=True)
            sums, total, seen, last = [(0.0, 0)] * len(FIELD_WEIGHTS), 0.0, 0, now
        if time.monotonic() - saved_at > 120:
            save(checkpoint, optimizer, steps=steps, spent=time.monotonic() - started)
            saved_at = time.monotonic()
    feed.close()
    save(checkpoint, optimizer, steps=steps, spent=budget_s + 1)


def save(path: Path, optimizer: Optimizer, **progress: float | dict[str, float]) -> None:
    part = path.with_suffix(".part")
    torch.save({"optimizer": optimizer.state(), **progress}, part)
    part.replace(path)
