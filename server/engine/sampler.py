"""From logits and each row's own parameters to one token id a row, in one pass over the batch.

In this order: repetition penalty, temperature, top_k, top_p, draw. Every filter is a threshold on
the row's scores, so equal scores stay or go together and no order among them is invented:

    top_k   keeps what is at least the k-th largest
    top_p   keeps the fewest of the largest that have this share of what top_k kept

The draw is one uniform number, a function of the row's seed and position only, taken through the
inverse of the cumulative distribution in the order of token ids. So neighbours in the batch change
nothing, and neither does the way the candidates were found: usually among the few largest scores,
by a full sort only where those do not hold the whole nucleus. It must not know requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy; nothing is divided by them."""

NUM_CANDIDATES = 128
"""How many of the largest scores are looked at before a row is sorted whole."""

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is sampled with. `position` is the index its token will have.

    `seen_ids` are the ids of prompt and answer; they are only needed for a repetition penalty.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    position: int
    seen_ids: Sequence[int]


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """logits float32 [rows, ids], which this overwrites -> an id for each row.

    None for a row that allows no id at all or holds a NaN.
    """
    _penalise_repetition(logits, rows)
    largest, ids = logits.max(dim=-1)  # NaN where the row holds one
    drawn = [index for index, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    usable = largest.isfinite().tolist()
    drawn = [index for index in drawn if usable[index]]
    if drawn:
        drawn_rows = [rows[index] for index in drawn]
        temperatures = _column([row.temperature for row in drawn_rows], logits)
        scores = (logits[drawn] - largest[drawn, None]) / temperatures.float()
        ids[drawn] = _draw(scores, drawn_rows)
    return [
        token_id if is_usable else None
        for token_id, is_usable in zip(ids.tolist(), usable, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of these two alone (SplitMix64, twice)."""
    return (_mixed(_mixed(seed & _MASK_64) + position) >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _penalise_repetition(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divides positive logits of ids already seen by the penalty and multiplies negative ones."""
    for index, row in enumerate(rows):
        if row.repetition_penalty != 1.0:
            seen = torch.tensor(row.seen_ids, device=logits.device)
            values = logits[index, seen]  # an id seen twice is read twice and written the same
            penalty = row.repetition_penalty
            logits[index, seen] = torch.where(values > 0, values / penalty, values * penalty)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """scores [rows, ids], the largest of each row 0 -> ids [rows]."""
    chances = _column([uniform(row.seed, row.position) for row in rows], scores)
    ids = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
    plain = [index for index, row in enumerate(rows) if _keeps_all(row, scores.shape[1])]
    filtered = [index for index in range(len(rows)) if index not in set(plain)]
    if plain:
        ids[plain] = _pick(scores[plain].exp(), chances[plain])
    if filtered:
        few, is_enough = _draw_among_few(
            scores[filtered], [rows[index] for index in filtered], chances[filtered]
        )
        ids[filtered] = few
        for index, enough in zip(filtered, is_enough, strict=True):
            if not enough:
                ids[index] = _draw_among_all(scores[index], rows[index], chances[index])
    return ids


def _keeps_all(row: SamplingRow, num_ids: int) -> bool:
    return row.top_p >= 1.0 and not 0 < row.top_k < num_ids


def _draw_among_few(
    scores: Tensor, rows: Sequence[SamplingRow], chances: Tensor
) -> tuple[Tensor, list[bool]]:
    """Draws from the largest scores; the flags say for which rows they held all that counts."""
    num_ids = scores.shape[1]
    num_candidates = min(NUM_CANDIDATES, num_ids)
    values, candidates = scores.topk(num_candidates, dim=-1)
    totals = scores.exp().sum(dim=-1, dtype=torch.float64, keepdim=True)
    # Without top_k, or with one beyond the candidates, the nucleus is a share of the whole row.
    top_ks = torch.tensor([row.top_k or num_ids for row in rows], device=scores.device)
    has_few = top_ks <= num_candidates
    kth = values.gather(1, top_ks.clamp(max=num_candidates)[:, None] - 1)
    kept = torch.where(has_few[:, None], values >= kth, True)
    weights = torch.where(kept, values.exp().double(), 0.0)
    totals = torch.where(has_few[:, None], weights.sum(dim=-1, keepdim=True), totals)
    before = weights.cumsum(dim=-1) - weights
    kept &= before < _column([_share(row) for row in rows], scores) * totals
    # Where the last candidate is kept, others like it may have been left out.
    is_enough = ~kept[:, -1] if num_candidates < num_ids else torch.ones_like(has_few)
    is_enough &= has_few | (top_ks >= num_ids)
    # An id whose score equals the last one kept belongs in, though the sum is reached before it.
    last_kept = values.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    kept = values >= last_kept
    if num_candidates < num_ids:
        is_enough &= ~kept[:, -1]
    by_id = candidates.argsort(dim=-1)
    weights = torch.where(kept, values.exp(), 0.0).gather(1, by_id)
    picked = _pick(weights, chances)
    return candidates.gather(1, by_id).gather(1, picked[:, None])[:, 0], is_enough.tolist()


def _draw_among_all(scores: Tensor, row: SamplingRow, chance: Tensor) -> Tensor:
    """scores [ids] -> the id, by sorting the whole row."""
    values = scores.sort(descending=True).values
    if 0 < row.top_k < len(values):
        values = values[values >= values[row.top_k - 1]]
    weights = values.exp().double()
    before = weights.cumsum(dim=0) - weights
    num_kept = int((before < _share(row) * weights.sum()).sum())
    kept = torch.where(scores >= values[num_kept - 1], scores.exp(), 0.0)
    return _pick(kept[None], chance[None])[0]


def _share(row: SamplingRow) -> float:
    # A top_p of 1 must not lose the last candidates to the rounding of a sum.
    return row.top_p if row.top_p < 1.0 else math.inf


def _pick(weights: Tensor, chances: Tensor) -> Tensor:
    """weights [rows, n], chances [rows, 1] in [0, 1) -> the index each falls on, [rows]."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # Strictly under the total, so that rounding never lands behind the last weight.
    totals = cumulative[:, -1:]
    target = torch.minimum(chances * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
