"""The sampler, row by row, against a slow reference in NumPy that sorts everything."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.engine.sampler import NUM_CANDIDATES, SamplingRow, sample, uniform

PLAIN = SamplingRow(
    temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=1, position=7, seen_ids=[]
)
NUM_IDS = 1000


def reference(logits: npt.NDArray[np.float32], row: SamplingRow) -> int:
    scores = logits.astype(np.float64)
    for token_id in set(row.seen_ids):
        value, penalty = scores[token_id], row.repetition_penalty
        scores[token_id] = value / penalty if value > 0 else value * penalty
    if row.temperature < 1e-5:
        return int(scores.argmax())
    scores = (scores - scores.max()) / row.temperature
    order = np.argsort(-scores, kind="stable")
    if 0 < row.top_k < len(order):
        order = order[scores[order] >= scores[order[row.top_k - 1]]]
    weights = np.exp(scores[order])
    if row.top_p < 1.0:
        before = np.cumsum(weights) - weights
        last = scores[order[(before < row.top_p * weights.sum()).sum() - 1]]
        order = order[scores[order] >= last]
    kept = np.sort(order)
    cumulative = np.cumsum(np.exp(scores[kept]))
    chance = uniform(row.seed, row.position)
    return int(kept[np.searchsorted(cumulative, chance * cumulative[-1], side="right")])


def noise(num_rows: int, *, scale: float, seed: int = 0) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal((num_rows, NUM_IDS)) * scale
    return noise.astype(np.float32)


def mixed_rows(num_rows: int) -> list[SamplingRow]:
    """Every combination of settings, in one batch."""
    rng = np.random.default_rng(3)
    return [
        SamplingRow(
            temperature=float(rng.choice([0.0, 1e-6, 0.3, 1.0, 2.0])),
            top_p=float(rng.choice([0.01, 0.6, 0.95, 0.9999, 1.0])),
            top_k=int(rng.choice([0, 1, 5, NUM_CANDIDATES, 300, NUM_IDS, 10 * NUM_IDS])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            seed=int(rng.integers(-(2**62), 2**62)),
            position=index,
            seen_ids=[int(i) for i in rng.integers(0, NUM_IDS, 50)],
        )
        for index in range(num_rows)
    ]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
def test_a_mixed_batch_equals_the_sorted_reference(scale: float) -> None:
    """From a nucleus that is nearly all ids (scale 0.1) to one that is a single id (30)."""
    logits, rows = noise(120, scale=scale), mixed_rows(120)
    expected = [reference(logits[index], row) for index, row in enumerate(rows)]
    assert sample(torch.from_numpy(logits.copy()), rows) == expected


def test_neighbours_change_nothing() -> None:
    logits, rows = noise(40, scale=2.0), mixed_rows(40)
    alone = [
        sample(torch.from_numpy(logits[index : index + 1].copy()), [row])[0]
        for index, row in enumerate(rows)
    ]
    assert sample(torch.from_numpy(logits.copy()), rows) == alone


def test_the_draw_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(6000, 1)
    rows = [replace(PLAIN, position=position) for position in range(6000)]
    counts = np.bincount(np.array(sample(logits, rows)), minlength=3) / 6000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


def test_the_draw_depends_on_seed_and_position() -> None:
    logits = torch.zeros(4, NUM_IDS)
    rows = [PLAIN, PLAIN, replace(PLAIN, seed=2), replace(PLAIN, position=8)]
    first, same, other_seed, other_position = sample(logits, rows)
    assert first == same
    assert len({first, other_seed, other_position}) == 3


def test_equal_scores_are_kept_together() -> None:
    """Three ids share the first place: top_k 1 and a tiny top_p both keep all three."""
    logits = torch.full((600, NUM_IDS), -5.0)
    logits[:, [7, 400, 999]] = 3.0
    rows = [replace(PLAIN, top_k=1, position=position) for position in range(300)]
    rows += [replace(PLAIN, top_p=0.01, position=position) for position in range(300)]
    ids = sample(logits, rows)
    assert set(ids[:300]) == set(ids[300:]) == {7, 400, 999}


def test_more_equal_scores_than_candidates_are_still_kept_together() -> None:
    logits = torch.zeros(2000, NUM_IDS)
    rows = [replace(PLAIN, top_k=1, position=position) for position in range(2000)]
    assert len(set(sample(logits, rows))) > 2 * NUM_CANDIDATES


@pytest.mark.parametrize("row", [PLAIN, replace(PLAIN, top_p=0.5), replace(PLAIN, temperature=0.0)])
def test_an_unusable_row_fails_alone(row: SamplingRow) -> None:
    logits = torch.zeros(4, NUM_IDS)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    logits[2, 5] = math.inf
    logits[3, 42] = 100.0
    assert sample(logits, [row] * 4) == [None, None, None, 42]


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_masked_id_is_never_drawn(top_p: float) -> None:
    logits = torch.zeros(500, NUM_IDS)
    logits[:, 3:] = -math.inf
    rows = [replace(PLAIN, top_p=top_p, position=position) for position in range(500)]
    assert set(sample(logits, rows)) <= {0, 1, 2}


def test_uniform_covers_its_interval() -> None:
    values = np.array(
        [uniform(seed, position) for seed in range(-20, 20) for position in range(99)]
    )
    assert values.min() >= 0.0 and values.max() < 1.0
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 300 and len(np.unique(values)) == len(values)
