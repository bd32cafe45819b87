"""The sampler, row by row, against a slow reference in NumPy that sorts everything.

Each test is run with the compiled loop and with its twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.core import SamplingParams
from server.engine import sampler
from server.engine.sampler import SamplingRow as Row
from server.engine.sampler import sample, seed_of_choice, uniform
from server.kernels import machine

NUM_IDS = 1000


@pytest.fixture(autouse=True, params=["compiled", "twin"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "twin":
        monkeypatch.setattr(sampler, "is_compiled", lambda logits: False)
    elif not machine.has_compiler():
        pytest.skip("without numba there is no loop")


def row(
    *,
    position: int = 7,
    ids: Sequence[int] = (),
    num_generated: int = 0,
    choice: int = 0,
    mask: npt.NDArray[np.int32] | None = None,
    **params: Any,
) -> Row:
    """Before the token at `position`, behind `ids`, of which the last are generated."""
    defaults = SamplingParams(max_tokens=1, seed=1)
    padded = [0] * (position - len(ids)) + list(ids)
    return Row(replace(defaults, **params), padded, position - num_generated, choice, mask)


def reference(logits: npt.NDArray[np.float32], row: Row) -> int | None:
    params, generated = row.params, list(row.ids[row.num_prompt_ids :])
    scores = logits.astype(np.float32)
    for token_id in set(row.ids):
        value, penalty = scores[token_id], np.float32(params.repetition_penalty)
        scores[token_id] = value / penalty if value > 0 else value * penalty
    for token_id in set(generated):
        count = generated.count(token_id)
        scores[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    allowed = set(range(len(scores)))
    if row.mask is not None:
        allowed = {i for i in allowed if int(row.mask[i // 32]) >> i % 32 & 1}
    ends = set(params.stop_token_ids)
    if len(generated) < params.min_tokens and not allowed <= ends:
        allowed -= ends
    scores[list(set(range(len(scores))) - allowed)] = -np.inf
    if not np.isfinite(scores.max()):
        return None
    if params.temperature < 1e-5:
        return int(scores.argmax())
    scores = (scores.astype(np.float64) - scores.max()) / params.temperature
    order = np.argsort(-scores, kind="stable")
    if params.min_p > 0:
        order = order[scores[order] >= math.log(params.min_p)]
    if 0 < params.top_k < len(order):
        order = order[scores[order] >= scores[order[params.top_k - 1]]]
    weights = np.exp(scores[order])
    if params.top_p < 1.0:
        before = np.cumsum(weights) - weights
        last = scores[order[(before < params.top_p * weights.sum()).sum() - 1]]
        order = order[scores[order] >= last]
    kept = np.sort(order)
    cumulative = np.cumsum(np.exp(scores[kept]))
    chance = uniform(seed_of_choice(params.seed or 0, row.choice), len(row.ids))
    return int(kept[np.searchsorted(cumulative, chance * cumulative[-1], side="right")])


def noise(num_rows: int, *, scale: float, seed: int = 0) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal((num_rows, NUM_IDS)) * scale
    return noise.astype(np.float32)


def mask_of(ids: Sequence[int], num_ids: int = NUM_IDS) -> npt.NDArray[np.int32]:
    words = [0] * -(-num_ids // 32)
    for token_id in ids:
        words[token_id // 32] |= 1 << token_id % 32
    return np.array(words, np.uint32).view(np.int32)


def mixed_rows(num_rows: int) -> list[Row]:
    """Every combination of settings, in one batch."""
    rng = np.random.default_rng(3)
    few = [int(i) for i in rng.integers(0, NUM_IDS, 20)]
    return [
        row(
            position=100 + index,
            ids=[int(i) for i in rng.choice(few, 50)],
            num_generated=int(rng.integers(0, 50)),
            temperature=float(rng.choice([0.0, 1e-6, 0.3, 1.0, 2.0])),
            top_p=float(rng.choice([0.01, 0.6, 0.95, 0.9999, 1.0])),
            top_k=int(rng.choice([0, 0, 1, 5, 128, 300, NUM_IDS, 10 * NUM_IDS])),
            min_p=float(rng.choice([0.0, 0.0, 0.001, 0.3, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            presence_penalty=float(rng.choice([0.0, 1.5, -0.5])),
            frequency_penalty=float(rng.choice([0.0, 0.25, -2.0])),
            logit_bias=tuple(
                (int(i), float(rng.uniform(-9, 9))) for i in set(rng.integers(0, NUM_IDS, 9))
            )
            if rng.random() < 0.3
            else (),
            min_tokens=int(rng.choice([0, 40])),
            stop_token_ids=tuple(int(i) for i in rng.integers(0, NUM_IDS, 200)),
            seed=int(rng.integers(-(2**62), 2**62)),
            choice=int(rng.choice([0, 0, 1, 7])),
            mask=mask_of(rng.choice(NUM_IDS, int(rng.choice([0, 1, 30, 500, NUM_IDS]))).tolist())
            if rng.random() < 0.4
            else None,
        )
        for index in range(num_rows)
    ]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
def test_a_mixed_batch_equals_the_sorted_reference(scale: float) -> None:
    """From a nucleus that is nearly all ids (scale 0.1) to one that is a single id (30)."""
    logits, rows = noise(400, scale=scale), mixed_rows(400)
    expected = [reference(logits[index], row) for index, row in enumerate(rows)]
    assert sample(torch.from_numpy(logits.copy()), rows) == expected


def test_neighbours_change_nothing() -> None:
    logits, rows = noise(40, scale=2.0), mixed_rows(40)
    alone = [
        sample(torch.from_numpy(logits[index : index + 1].copy()), [row])[0]
        for index, row in enumerate(rows)
    ]
    assert sample(torch.from_numpy(logits.copy()), rows) == alone


def test_threads_that_share_the_rows_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = torch.from_numpy(noise(100, scale=2.0)), mixed_rows(100)
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    before = torch.get_num_threads()
    drawn = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            drawn.append(sample(logits.clone(), rows))
    finally:
        torch.set_num_threads(before)
    assert drawn[0] == drawn[1] == drawn[2]


def test_logits_may_be_part_of_a_wider_table() -> None:
    logits, rows = torch.from_numpy(noise(40, scale=2.0)), mixed_rows(40)
    wide = torch.full((40, NUM_IDS + 24), 99.0)
    wide[:, :NUM_IDS] = logits
    assert sample(wide[:, :NUM_IDS], rows) == sample(logits, rows)


def test_the_first_of_the_likeliest_is_taken() -> None:
    logits = torch.zeros(3, NUM_IDS)
    logits[1, [77, 500]], logits[2, [998, 999]] = 1.0, 1.0
    assert sample(logits, [row(temperature=0.0)] * 3) == [0, 77, 998]


def test_the_draw_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(6000, 1)
    rows = [row(position=position) for position in range(6000)]
    counts = np.bincount(np.array(sample(logits, rows)), minlength=3) / 6000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


def test_the_draw_depends_on_seed_and_position() -> None:
    logits = torch.zeros(4, NUM_IDS)
    rows = [row(), row(), row(seed=2), row(position=8)]
    first, same, other_seed, other_position = sample(logits, rows)
    assert first == same
    assert len({first, other_seed, other_position}) == 3


def test_equal_scores_are_kept_together() -> None:
    """Three ids share the first place: top_k 1 and a tiny top_p both keep all three."""
    logits = torch.full((600, NUM_IDS), -5.0)
    logits[:, [7, 400, 999]] = 3.0
    rows = [row(top_k=1, position=position) for position in range(300)]
    rows += [row(top_p=0.01, position=position) for position in range(300)]
    ids = sample(logits, rows)
    assert set(ids[:300]) == set(ids[300:]) == {7, 400, 999}


def test_scores_that_are_all_equal_are_kept_together() -> None:
    logits = torch.zeros(2000, NUM_IDS)
    rows = [row(top_k=1, position=position) for position in range(2000)]
    assert len(set(sample(logits, rows))) > NUM_IDS / 2


def test_scores_equal_to_the_kth_count_in_the_nucleus() -> None:
    """Ten leaders hold far less than the share asked for, of all that top_k keeps."""
    logits = np.zeros((400, 500), np.float32)
    logits[:, :10] = 1.0
    rows = [row(top_k=100, top_p=0.15, position=position) for position in range(400)]
    expected = [reference(each, asked) for each, asked in zip(logits, rows, strict=True)]
    assert sample(torch.from_numpy(logits.copy()), rows) == expected
    assert any(token_id is not None and token_id >= 10 for token_id in expected)


FILTERS: tuple[dict[str, float], ...] = (
    {"top_p": 0.001},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 300},
    {"top_k": 700, "top_p": 0.6},
    {"top_k": 700, "min_p": 0.013, "top_p": 0.9},
    {"min_p": 0.02},
    {},
)
"""All that narrows a row, to be drawn for in one batch."""


def assert_equals_reference(logits: npt.NDArray[np.float32], rows: Sequence[Row]) -> None:
    expected = [reference(each, asked) for each, asked in zip(logits, rows, strict=True)]
    assert sample(torch.from_numpy(logits.copy()), rows) == expected


@pytest.mark.parametrize("num_ids", [32_000, 110_592])
@pytest.mark.parametrize("scale", [0.0, 0.65, 3.0])
def test_rows_as_wide_as_a_vocabulary_equal_the_sorted_reference(
    num_ids: int, scale: float
) -> None:
    """Equal scores, what random weights make, and what a trained model is like."""
    rng = np.random.default_rng(num_ids)
    rows = [
        row(temperature=0.5, position=position, **params)
        for position, params in enumerate(FILTERS, start=9)
    ]
    logits = (rng.standard_normal((len(rows), num_ids)) * scale).astype(np.float32)
    assert_equals_reference(logits, rows)


def test_scores_that_differ_in_their_last_bits_only_are_told_apart() -> None:
    """Behind one leader, within a thousandth of each other and in no order."""
    steps = np.random.default_rng(5).permutation(NUM_IDS)
    logits = np.tile(-(2.0 + steps * 2.0**-21), (40 * len(FILTERS), 1)).astype(np.float32)
    assert len(np.unique(logits[0])) == NUM_IDS
    logits[:, 123] = 0.0
    rows = [
        row(temperature=0.5, position=position, **params)
        for params in FILTERS
        for position in range(40)
    ]
    assert_equals_reference(logits, rows)


def test_equal_scores_across_a_threshold_equal_the_sorted_reference() -> None:
    """Five values, 200 ids each: nearly every threshold falls among equals."""
    values = np.random.default_rng(6).permutation(np.repeat(np.arange(5.0), NUM_IDS // 5))
    rows = [row(position=position, **params) for params in FILTERS for position in range(40)]
    assert_equals_reference(np.tile(values, (len(rows), 1)).astype(np.float32), rows)


@pytest.mark.parametrize("num_ids", [1, 2, 3, 4, 7, 8])
def test_a_small_vocabulary_equals_the_sorted_reference(num_ids: int) -> None:
    rows = [row(position=position, **params) for params in FILTERS for position in range(40)]
    assert_equals_reference(noise(len(rows), scale=1.0)[:, :num_ids], rows)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}])
def test_an_unusable_row_fails_alone(params: dict[str, float]) -> None:
    logits = torch.zeros(4, NUM_IDS)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    logits[2, 5] = math.inf
    logits[3, 42] = 100.0
    assert sample(logits, [row(**params)] * 4) == [None, None, None, 42]


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_masked_id_is_never_drawn(top_p: float) -> None:
    logits = torch.zeros(500, NUM_IDS)
    logits[:, 3:] = -math.inf
    rows = [row(top_p=top_p, position=position) for position in range(500)]
    assert set(sample(logits, rows)) <= {0, 1, 2}


def test_what_was_said_is_said_less_often_and_what_was_asked_is_not() -> None:
    """The prompt counts for repetition only."""
    logits = torch.zeros(2, NUM_IDS)
    logits[:, 5], logits[:, 6] = 1.0, 0.9
    asked = row(ids=[5, 5], num_generated=0, temperature=0.0, presence_penalty=1.0)
    said = row(ids=[5, 5], num_generated=2, temperature=0.0, frequency_penalty=0.1)
    assert sample(logits, [asked, said]) == [5, 6]


def test_an_end_waits_for_the_least_number_of_tokens() -> None:
    logits = torch.zeros(2, NUM_IDS)
    logits[:, 9], logits[:, 4] = 5.0, 1.0
    ends = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (9,)}
    assert sample(logits, [row(num_generated=2, **ends), row(num_generated=3, **ends)]) == [4, 9]


def test_what_a_mask_has_completed_ends_however_short_it_is() -> None:
    logits = torch.zeros(3, NUM_IDS)
    logits[:, 9] = 5.0
    ends = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (9, 10)}
    masks = (mask_of([9, 10]), mask_of([4, 9]), mask_of([4]))
    assert sample(logits, [row(mask=mask, **ends) for mask in masks]) == [9, 4, 4]


def test_a_bias_may_force_and_forbid() -> None:
    logits = noise(1, scale=1.0)
    best = int(logits[0].argmax())
    biases = (((17, 100.0),), ((best, -100.0),))
    rows = [row(temperature=0.0, logit_bias=bias) for bias in biases]
    forced, other = sample(torch.from_numpy(logits.repeat(2, axis=0)), rows)
    assert forced == 17 and other != best


@pytest.mark.parametrize("num_ids", [1, 31, 32, 33, 1000])
def test_every_bit_of_a_mask_is_its_id_s(num_ids: int) -> None:
    """Each id in turn is the only one that may come, though it is the least likely."""
    logits = torch.arange(num_ids, 0, -1).float().repeat(num_ids, 1)
    rows = [row(mask=mask_of([token_id], num_ids), temperature=0.0) for token_id in range(num_ids)]
    assert sample(logits, rows) == list(range(num_ids))


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_a_mask_that_allows_nothing_fails_its_row_alone(params: dict[str, float]) -> None:
    logits = noise(3, scale=1.0)
    logits[1, 5] = math.nan
    rows = [row(mask=mask, **params) for mask in (mask_of([]), mask_of([5, 6]), mask_of([7]))]
    assert sample(torch.from_numpy(logits), rows) == [None, None, 7]


def test_a_mask_of_another_width_is_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="a mask of shape"):
        sample(torch.zeros(1, NUM_IDS), [row(mask=mask_of([1], NUM_IDS + 32))])


def test_a_mask_comes_after_what_forces_an_id() -> None:
    """A bias cannot bring back what a grammar forbids."""
    logits = torch.zeros(1, NUM_IDS)
    forced = row(logit_bias=((3, 100.0),), mask=mask_of([4]), temperature=0.0)
    assert sample(logits, [forced]) == [4]


def test_choices_draw_for_themselves_and_the_first_as_if_alone() -> None:
    logits = torch.zeros(64, NUM_IDS)
    drawn = sample(
        logits, [row(seed=seed, choice=choice) for seed in range(8) for choice in range(8)]
    )
    assert len(set(drawn)) > 55
    assert drawn[::8] == sample(torch.zeros(8, NUM_IDS), [row(seed=seed) for seed in range(8)])
    assert seed_of_choice(-5, 0) == -5


def test_uniform_covers_its_interval() -> None:
    values = np.array(
        [uniform(seed, position) for seed in range(-20, 20) for position in range(99)]
    )
    assert values.min() >= 0.0 and values.max() < 1.0
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 300 and len(np.unique(values)) == len(values)
