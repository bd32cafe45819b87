"""From logits and each row's own parameters to one token id a row, in one pass over the batch.

In this order: repetition, presence and frequency penalty, bias, ends that may not come yet, mask,
temperature, min_p, top_k, top_p, draw. Every filter is a threshold on the row's scores, so equal
scores stay or go together and no order among them is invented:

    min_p   keeps what is at least this share of the likeliest as likely
    top_k   keeps what is at least the k-th largest
    top_p   keeps the fewest of the largest that have this share of what the two before kept

The draw is one uniform number, a function of the row's seed and position only, taken through the
inverse of the cumulative distribution in the order of token ids. So neighbours in the batch change
nothing, and neither does the way the candidates were found: usually among the few largest scores,
by a full sort only where those do not hold the whole nucleus. It must not know requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.core import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy; nothing is divided by them."""

NUM_CANDIDATES = 128
"""How many of the largest scores are looked at before a row is sorted whole."""

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is sampled with: `ids` are those of prompt and answer so far.

    The token that is chosen will be the one after the last of them. `mask`, int32
    [ceil(ids / 32)], has the bit i % 32 of word i // 32 set where id i may come.
    """

    params: SamplingParams
    ids: Sequence[int]
    num_prompt_ids: int
    choice: int = 0
    mask: npt.NDArray[np.int32] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt_ids

    @property
    def chance(self) -> float:
        # The client gives every request a seed; without one an answer would not be repeatable in
        # the step that is run again.
        return uniform(seed_of_choice(self.params.seed or 0, self.choice), len(self.ids))

    @property
    def least_score(self) -> float:
        """Below this, with the likeliest at 0, min_p keeps nothing."""
        return math.log(self.params.min_p) if self.params.min_p > 0 else -math.inf


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """logits float32 [rows, ids], which this overwrites -> an id for each row.

    None for a row that allows no id at all or holds a NaN.
    """
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    largest, ids = logits.max(dim=-1)  # NaN where the row holds one
    drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
    usable = largest.isfinite().tolist()
    drawn = [index for index in drawn if usable[index]]
    if drawn:
        drawn_rows = [rows[index] for index in drawn]
        temperatures = _column([row.params.temperature for row in drawn_rows], logits)
        scores = (logits[drawn] - largest[drawn, None]) / temperatures.float()
        ids[drawn] = _draw(scores, drawn_rows)
    return [
        token_id if is_usable else None
        for token_id, is_usable in zip(ids.tolist(), usable, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of these two alone (SplitMix64, twice)."""
    return (_mixed(_mixed(seed & _MASK_64) + position) >> 11) * 2.0**-53


def seed_of_choice(seed: int, choice: int) -> int:
    """Each choice of a request draws for itself, and the first as if it were alone."""
    return _mixed((seed & _MASK_64) ^ _mixed(choice)) if choice else seed


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """logits [ids] of one row: penalties, bias, no end before it may come, and the mask."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(row.ids, device=logits.device)
        values = logits[seen]  # an id seen twice is read twice and written the same
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.num_generated:
        generated = torch.tensor(row.ids[row.num_prompt_ids :], device=logits.device)
        said, counts = torch.unique(generated, return_counts=True)
        logits[said] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biased = torch.tensor([token_id for token_id, _ in params.logit_bias], device=logits.device)
        logits[biased] += torch.tensor(
            [bias for _, bias in params.logit_bias], device=logits.device
        )
    if row.num_generated < params.min_tokens and params.stop_token_ids:
        logits[torch.tensor(params.stop_token_ids, device=logits.device)] = -math.inf
    if row.mask is not None:
        logits.masked_fill_(_forbidden(row.mask, logits), -math.inf)


def _forbidden(mask: npt.NDArray[np.int32], logits: Tensor) -> Tensor:
    """One bit an id, packed -> bool [ids], true where the bit is not set."""
    num_ids = len(logits)
    if mask.shape != (-(-num_ids // 32),):
        raise ValueError(f"a mask of shape {mask.shape} for {num_ids} ids")
    # Little-endian words, so that bit i is bit i % 8 of byte i // 8 as well.
    packed = torch.from_numpy(mask.astype("<i4")).view(torch.uint8).to(logits.device)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=logits.device)
    return (packed[:, None] & bits == 0).flatten()[:num_ids]


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """scores [rows, ids], the largest of each row 0 -> ids [rows]."""
    chances = _column([row.chance for row in rows], scores)
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
    params = row.params
    return params.top_p >= 1.0 and not 0 < params.top_k < num_ids and not params.min_p > 0


def _draw_among_few(
    scores: Tensor, rows: Sequence[SamplingRow], chances: Tensor
) -> tuple[Tensor, list[bool]]:
    """Draws from the largest scores; the flags say for which rows they held all that counts."""
    num_ids = scores.shape[1]
    num_candidates = min(NUM_CANDIDATES, num_ids)
    values, candidates = scores.topk(num_candidates, dim=-1)
    weights_of_all = scores.exp()
    least = _column([row.least_score for row in rows], scores).float()
    if any(row.params.min_p > 0 for row in rows):
        weights_of_all = torch.where(scores >= least, weights_of_all, 0.0)
    totals = weights_of_all.sum(dim=-1, dtype=torch.float64, keepdim=True)
    # Without top_k, or with one beyond the candidates, the nucleus is a share of the whole row.
    top_ks = torch.tensor([row.params.top_k or num_ids for row in rows], device=scores.device)
    has_few = top_ks <= num_candidates
    kth = values.gather(1, top_ks.clamp(max=num_candidates)[:, None] - 1)
    kept = torch.where(has_few[:, None], values >= kth, True) & (values >= least)
    # Where even the last candidate is kept, others like it may have been left out.
    is_enough = ~kept[:, -1] | ~has_few & (top_ks >= num_ids)
    weights = torch.where(kept, values.exp().double(), 0.0)
    totals = torch.where(has_few[:, None], weights.sum(dim=-1, keepdim=True), totals)
    before = weights.cumsum(dim=-1) - weights
    kept &= before < _column([_share(row) for row in rows], scores) * totals
    # An id whose score equals the last one kept belongs in, though the sum is reached before it.
    last_kept = values.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    kept = values >= last_kept
    is_enough &= ~kept[:, -1]
    if num_candidates == num_ids:
        is_enough = torch.ones_like(is_enough)
    by_id = candidates.argsort(dim=-1)
    weights = torch.where(kept, values.exp(), 0.0).gather(1, by_id)
    picked = _pick(weights, chances)
    return candidates.gather(1, by_id).gather(1, picked[:, None])[:, 0], is_enough.tolist()


def _draw_among_all(scores: Tensor, row: SamplingRow, chance: Tensor) -> Tensor:
    """scores [ids] -> the id, by sorting the whole row."""
    values = scores.sort(descending=True).values
    values = values[values >= row.least_score]
    if 0 < row.params.top_k < len(values):
        values = values[values >= values[row.params.top_k - 1]]
    weights = values.exp().double()
    before = weights.cumsum(dim=0) - weights
    num_kept = int((before < _share(row) * weights.sum()).sum())
    kept = torch.where(scores >= values[num_kept - 1], scores.exp(), 0.0)
    return _pick(kept[None], chance[None])[0]


def _share(row: SamplingRow) -> float:
    # A top_p of 1 must not lose the last candidates to the rounding of a sum.
    return row.params.top_p if row.params.top_p < 1.0 else math.inf


def _pick(weights: Tensor, chances: Tensor) -> Tensor:
    """weights [rows, n], chances [rows, 1] in [0, 1) -> the index each falls on, [rows]."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # Strictly under the total, so that rounding never lands behind the last weight.
    totals = cumulative[:, -1:]
    target = torch.minimum(chances * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
