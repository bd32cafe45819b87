"""From logits and each row's own parameters to one token id a row, in one pass over the batch.

In this order: repetition, presence and frequency penalty, bias, ends that may not come yet, mask,
temperature, min_p, top_k, top_p, draw. Every filter is a threshold on the row's scores, so equal
scores stay or go together and no order among them is invented:

    min_p   keeps what is at least this share of the likeliest as likely
    top_k   keeps what is at least the k-th largest
    top_p   keeps the fewest of the largest that have this share of what the two before kept

No row is sorted. The thresholds of top_k and top_p are found digit by digit, as a radix sort works:
how much of a row falls into each bin of the first digit says in which bin its threshold lies, and
only that bin's members are looked at for the next. Three digits are a whole score, so the threshold
is exact however flat the row is and however many scores are equal.

The draw is one uniform number, a function of the row's seed and position only, taken through the
inverse of the cumulative distribution in the order of token ids. Weights are integers, so that
their sums are the same in whatever order they are made. So neighbours in the batch change nothing.

On a CPU that is a compiled loop, after what each row alone asks for; what is written here is its
twin, for other devices and where there is no compiler. It must not know requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from server.core import SamplingParams
from server.kernels.machine import Call, has_compiler, run

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy; nothing is divided by them."""

_DIGIT_BITS = 9
_FIRST_SHIFT = 2 * _DIGIT_BITS
_FIRST_BITS = 31 - _FIRST_SHIFT
"""A distance's 31 bits are a first digit fine enough to leave few members, and two more."""

_SCORES_AT_ONCE = 1 << 19
"""Rows of so many scores are drawn for together. More make fewer and longer steps, but take more
than the some 20 MB on the way that an allocator keeps at hand."""

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
    if is_compiled(logits):
        return _sample_compiled(logits, rows)
    largest = logits.amax(dim=-1)  # NaN where the row holds one
    usable = largest.isfinite().tolist()
    has_greedy = any(row.is_greedy for row in rows)
    ids = logits.argmax(dim=-1) if has_greedy else torch.zeros_like(largest, dtype=torch.int64)
    drawn = [i for i, row in enumerate(rows) if usable[i] and not row.is_greedy]
    at_once = max(1, _SCORES_AT_ONCE // logits.shape[1])
    for group in (drawn[start : start + at_once] for start in range(0, len(drawn), at_once)):
        group_rows = [rows[index] for index in group]
        chosen = _ids(group, logits)
        temperatures = _column([row.params.temperature for row in group_rows], logits).float()
        scores = logits[chosen].sub_(largest[chosen, None]).div_(temperatures)
        ids[chosen] = _draw(scores, group_rows)
    return [
        token_id if is_usable else None
        for token_id, is_usable in zip(ids.tolist(), usable, strict=True)
    ]


def is_compiled(logits: Tensor) -> bool:
    """Whether these are sampled by a compiled loop, and not by its twin that is written here."""
    return logits.device.type == "cpu" and has_compiler()


def _sample_compiled(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """As `sample`, of logits that have been adjusted."""
    from server.kernels import sampling

    num_rows, num_ids = logits.shape
    padding = -num_ids % sampling.WIDTH
    logits = F.pad(logits, (0, padding), value=-math.inf) if padding else logits.contiguous()
    num_padded = num_ids + padding
    wishes = np.zeros((num_rows, sampling.NUM_WISHES))
    for wish, row in zip(wishes, rows, strict=True):
        if not row.is_greedy:
            wish[:] = _wishes(row, num_ids)
    chosen = np.empty(num_rows, np.int64)
    rooms = _rooms(torch.get_num_threads(), sampling.room_bytes(num_padded))
    arguments = sampling.SamplingArguments(
        num_tasks=num_rows,
        rooms=rooms.data_ptr(),
        room_bytes=rooms.shape[1],
        logits=logits.data_ptr(),
        num_ids=num_padded,
        weight_unit=1 << _unit_bits(num_ids),
        wishes=wishes.ctypes.data,
        chosen=chosen.ctypes.data,
    )
    shared_bytes = logits.nbytes if num_rows > 1 else 0  # a row is one thread's
    run([Call(_compiled_sampling(), arguments, num_bytes=shared_bytes)])
    return [None if token_id < 0 else token_id for token_id in chosen.tolist()]


def _wishes(row: SamplingRow, num_ids: int) -> tuple[float, ...]:
    """In the order that `server.kernels.sampling` reads them in."""
    params = row.params
    # The loop's rows may be wider than these: what is no limit here must be none there.
    top_k = params.top_k if 0 < params.top_k < num_ids else math.inf
    return (params.temperature, row.least_score, top_k, params.top_p, row.chance)


@lru_cache(maxsize=1)
def _rooms(num_threads: int, room_bytes: int) -> Tensor:
    """uint8 [threads, bytes], kept: memory that is asked for anew is slow when first used.

    So only one thread at a time may sample: the engine process has one that computes steps.
    """
    return torch.empty(num_threads, room_bytes, dtype=torch.uint8)


@cache
def _compiled_sampling() -> Any:
    from server.kernels.sampling import compile_sampling

    return compile_sampling()


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
        seen = _ids(row.ids, logits)
        values = logits[seen]  # an id seen twice is read twice and written the same
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.num_generated:
        generated = _ids(row.ids[row.num_prompt_ids :], logits)
        said, counts = torch.unique(generated, return_counts=True)
        logits[said] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biased = _ids([token_id for token_id, _ in params.logit_bias], logits)
        logits[biased] += torch.tensor(
            [bias for _, bias in params.logit_bias], device=logits.device
        )
    forbidden = None if row.mask is None else _forbidden(row.mask, logits)
    if row.num_generated < params.min_tokens and params.stop_token_ids:
        ends = _ids(params.stop_token_ids, logits)
        # What its grammar has completed ends, however short it is.
        if forbidden is None or not bool(forbidden.index_fill(0, ends, True).all()):
            logits[ends] = -math.inf
    if forbidden is not None:
        least = torch.full((), -math.inf, device=logits.device)
        torch.where(forbidden, least, logits, out=logits)  # a CPU fills by a mask half as fast


def _forbidden(mask: npt.NDArray[np.int32], logits: Tensor) -> Tensor:
    """One bit an id, packed -> bool [ids], true where the bit is not set."""
    num_ids = len(logits)
    if mask.shape != (-(-num_ids // 32),):
        raise ValueError(f"a mask of shape {mask.shape} for {num_ids} ids")
    # Little-endian words, so that bit i is bit i % 8 of byte i // 8 as well.
    unset = np.invert(mask.astype("<i4")).view(np.uint8)
    bits = np.unpackbits(unset, bitorder="little", count=num_ids)
    return torch.from_numpy(bits.view(np.bool_)).to(logits.device)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """scores [rows, ids], the largest of each row 0 -> ids [rows].

    Where one row asks for a filter the others pass it too, with a threshold that keeps all.
    """
    num_ids = scores.shape[1]
    distances, weights = _distances(scores), _weights(scores)
    if any(row.params.min_p > 0 for row in rows):
        least = _column([row.least_score for row in rows], scores).float()
        weights &= _within(distances, _distances(least))
    top_ks = [min(row.params.top_k or num_ids, num_ids) for row in rows]
    if min(top_ks) < num_ids:
        counts = _ids(top_ks, scores)[:, None]
        weights &= _within(distances, _limits(distances, torch.ones_like(weights), counts))
    top_ps = [row.params.top_p for row in rows]
    if min(top_ps) < 1.0:
        shares = _shares(weights, _column(top_ps, scores))
        weights &= _within(distances, _limits(distances, weights, shares))
    return _pick(weights, _column([row.chance for row in rows], scores))


def _distances(scores: Tensor) -> Tensor:
    """float32, none above 0 -> int32 in the opposite order: how far each is below 0, as bits."""
    return scores.abs().view(torch.int32)


def _weights(scores: Tensor) -> Tensor:
    """float32 [rows, ids], none above 0 -> their exp, int64, in the least unit whose sums fit.

    With 110,592 ids it is 2^-45 of the likeliest id's weight; what is lighter is never drawn.
    """
    return scores.exp().mul_(2.0 ** _unit_bits(scores.shape[1])).long()


def _unit_bits(num_ids: int) -> int:
    """The likeliest id weighs 2 to this power: so many weights have a sum that int64 holds."""
    return 62 - num_ids.bit_length()


def _shares(weights: Tensor, top_ps: Tensor) -> Tensor:
    """weights int64 [rows, ids] -> the least sums that have the share top_p, int64 [rows, 1]."""
    totals = weights.sum(dim=-1, keepdim=True)
    shares = (top_ps * totals).ceil().long().minimum(totals)
    # A top_p of 1 must not lose the last ids to the rounding of a float64.
    return torch.where(top_ps < 1.0, shares, totals)


def _within(distances: Tensor, limits: Tensor) -> Tensor:
    """int32 [rows, ids] and [rows, 1] -> int64 [rows, ids], every bit set where not beyond it."""
    # In place and without booleans: a CPU compares so many times faster.
    return distances.clone().le_(limits).neg_().long()


def _limits(distances: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """The least distance of each row within which the weights reach its sum, int32 [rows, 1].

    distances int32 and weights int64 [rows, ids]; sums int64 [rows, 1], each from 1 to the sum of
    the row's weights.
    """
    num_rows, num_ids = distances.shape
    digits = distances >> _FIRST_SHIFT
    held = weights.new_zeros(num_rows, 1 << _FIRST_BITS).scatter_add_(1, digits.long(), weights)
    found, sums = _reached(held, sums)
    limits = found << _FIRST_SHIFT
    members = digits.eq_(found.int()).flatten().nonzero()[:, 0]
    rows, distances, weights = members // num_ids, distances.take(members), weights.take(members)
    for shift in (_DIGIT_BITS, 0):
        digits = distances >> shift & (1 << _DIGIT_BITS) - 1
        bins = (rows << _DIGIT_BITS) + digits
        held = weights.new_zeros(num_rows << _DIGIT_BITS).scatter_add_(0, bins, weights)
        found, sums = _reached(held.view(num_rows, -1), sums)
        limits |= found << shift
        if shift:
            members = (digits == found[:, 0][rows]).nonzero()[:, 0]
            rows, distances, weights = rows[members], distances[members], weights[members]
    return limits.int()


def _reached(held: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """held [rows, bins], sums [rows, 1] -> the bin that reaches each sum, and what it must add."""
    cumulative = held.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, sums)
    return found, sums - (cumulative - held).gather(1, found)


def _pick(weights: Tensor, chances: Tensor) -> Tensor:
    """weights int64 [rows, n], chances [rows, 1] in [0, 1) -> the index each falls on, [rows]."""
    cumulative = weights.cumsum(dim=-1)
    totals = cumulative[:, -1:]
    # Under the total, so that rounding never lands behind the last weight.
    targets = (chances * totals).long().minimum(totals - 1)
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _ids(values: Sequence[int], like: Tensor) -> Tensor:
    # By way of NumPy, which reads thousands of them several times faster.
    return torch.from_numpy(np.array(values, np.int64)).to(like.device)
