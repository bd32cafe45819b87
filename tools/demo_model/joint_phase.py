"""Second phase: the decoder learns to answer, first from ideal features, then from seen ones.

"decoder" trains on the sums of label directions that the tower is taught to put out, so that both
can be trained at the same time; "joint" joins the two and trains everything.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_model import labels
from tools.demo_model.feed import Feed
from tools.demo_model.network import DemoModel
from tools.demo_model.optimizer import Optimizer
from tools.demo_model.samples import TASKS, SampleMaker
from tools.demo_model.tokenizer import TextCodec
from tools.demo_model.tower_phase import dense_loss, save

CONVERSATIONS = 32  # in a batch
DENSE_WEIGHT = 0.03  # of the labels' loss beside the answers'

# task -> the conversation kind that its errors ask for more of
KIND_OF = {
    "number": "number",
    "which": "pair",
    "video": "clip",
    "direction": "clip",
    "change": "clip",
    "ocr": "ocr",
    "greeting": "text",
}


def ideal_features(model: DemoModel, tokens: list[Any]) -> dict[int, Tensor]:
    """What perfect eyes would put out, with some noise and some labels missing."""
    features = {}
    for count in (16, 4):
        chosen = [token for token in tokens if len(token) == count]
        if not chosen:
            continue
        held = torch.from_numpy(labels.many_hot(np.stack(chosen)))
        held = held * (torch.rand_like(held) > 0.03) * (0.7 + 0.4 * torch.rand_like(held))
        held = held + 0.1 * torch.randn_like(held)
        features[count] = held @ model.code_book
    return features


def flatten(model: DemoModel, features: dict[int, Tensor]) -> Tensor:
    """All features in the order the samples count them, the newline last."""
    parts = [features[count].flatten(0, 1) for count in (16, 4) if count in features]
    return torch.cat([*parts, model.newline[None]])


def answer_loss(model: DemoModel, flat: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed loss of the answers' tokens, and which turns were right throughout."""
    feature = torch.from_numpy(group["feature"])
    embeds = model.decoder.embed_tokens(torch.from_numpy(group["ids"]))
    is_feature = feature >= 0
    embeds = embeds.masked_scatter(is_feature[..., None], flat[feature[is_feature]])
    hidden = model.decoder(embeds)
    target = torch.from_numpy(group["target"])
    asked = target >= 0
    logits = model.decoder.logits(hidden[asked]).float()
    wanted = target[asked]
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    right = (logits.argmax(-1) == wanted).float()
    turns = torch.from_numpy(group["turn"])[asked]
    whole = torch.ones(len(group["tasks"])).scatter_reduce(0, turns, right, "amin")
    return loss, whole


@dataclass(frozen=True, slots=True)
class Judged:
    """How a batch was answered: a token's mean loss, and turn by turn whether all was right."""

    loss: float
    tasks: list[int]
    right: list[float]


def batch_loss(model: DemoModel, batch: dict[str, Any], *, sees: bool) -> tuple[Tensor, Judged]:
    """The loss to learn from; with `sees`, the labels' share of it is in it."""
    loss = torch.zeros(())
    features: dict[int, Tensor] = {}
    if sees and batch["tiles"] is not None:
        states, features = model.see(torch.from_numpy(batch["tiles"]), batch["queries"])
        dense, _ = dense_loss(model, states, features, batch)
        loss = DENSE_WEIGHT * dense
    elif not sees:
        features = ideal_features(model, batch["tokens"])
    flat = flatten(model, features)
    total = sum(float((group["target"] >= 0).sum()) for group in batch["groups"])
    mean, tasks, right = 0.0, [], []
    for group in batch["groups"]:
        answers, whole = answer_loss(model, flat, group)
        loss = loss + answers / total
        mean += float(answers.detach()) / total
        tasks += group["tasks"]
        right += whole.tolist()
    return loss, Judged(mean, tasks, right)


def run(
    model: DemoModel,
    optimizer: Optimizer,
    codec: TextCodec,
    folder: Path,
    *,
    seed: int,
    phase: str,
    budget_s: float,
    peak_rate: float,
    end_rate: float,
    small: float,
) -> None:
    """Trains for `budget_s` seconds in all, counting what a checkpoint says was spent before."""
    checkpoint = folder / f"{phase}.pt"
    spent, steps, weights = 0.0, 0, {}
    errors = {task: 0.5 for task in TASKS}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.load(saved["optimizer"])
        spent, steps, weights = saved["spent"], saved["steps"], saved["weights"]
        errors |= saved.get("errors", {})
    sees = phase == "joint"
    maker = SampleMaker(codec, CONVERSATIONS, sees, small)
    feed = Feed(maker, seed=seed, phase=phase, first=steps)
    if weights:
        feed.reweigh(weights)
    rights: dict[str, list[float]] = {task: [] for task in TASKS}
    losses: list[float] = []
    last = saved_at = time.monotonic()
    started = time.monotonic() - spent
    for batch in feed:
        progress = (time.monotonic() - started) / budget_s
        if progress >= 1:
            break
        falling = 1 - (1 - end_rate) * max(0.0, progress - 0.4) / 0.6
        rate = peak_rate * min(1.0, steps / 100 + 0.02) * falling
        with torch.autocast("cpu", torch.bfloat16):
            loss, judged = batch_loss(model, batch, sees=sees)
        losses.append(judged.loss)
        for task, right in zip(judged.tasks, judged.right, strict=True):
            rights[TASKS[task]].append(right)
        loss.backward()
        optimizer.step(rate)
        steps += 1
        if progress > 0.3:
            optimizer.follow(0.99 if progress < 0.8 else 0.995)
        if steps % 50 == 0:
            now = time.monotonic()
            line = {
                "phase": phase,
                "step": steps,
                "spent_s": round(now - started),
                "conversations_per_s": round(50 * CONVERSATIONS / (now - last), 1),
                "rate": round(rate, 3),
                "loss": round(sum(losses) / len(losses), 4),
                "right": {
                    task: round(sum(found) / max(len(found), 1), 3)
                    for task, found in rights.items()
                },
            }
            print(json.dumps(line), flush=True)
            for task, found in rights.items():
                if len(found) >= 10:
                    errors[task] = 0.6 * errors[task] + 0.4 * (1 - sum(found) / len(found))
            weights = {task: 0.25 + 3 * error for task, error in errors.items()}
            weights["count_shape"] = weights["count"]
            kinds: dict[str, list[float]] = {}
            for task, error in errors.items():
                kinds.setdefault(KIND_OF.get(task, "shapes"), []).append(error)
            for kind, found in kinds.items():
                weights[kind] = 0.4 + 3 * max(found)
            feed.reweigh(weights)
            rights = {task: [] for task in TASKS}
            losses, last = [], now
        if time.monotonic() - saved_at > 120:
            save(
                checkpoint,
                optimizer,
                steps=steps,
                spent=time.monotonic() - started,
                weights=weights,
                errors=errors,
            )
            saved_at = time.monotonic()
    feed.close()
    save(checkpoint, optimizer, steps=steps, spent=budget_s + 1, weights=weights, errors=errors)
