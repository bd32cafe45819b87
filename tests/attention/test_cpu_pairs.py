"""The backend of pairs of bfloat16 against plain dense attention in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.attention.backend import AttentionInputs, LayerCache, choose_backend
from server.attention.cpu_pairs import PAGE_SIZE, PairBackend
from server.errors import ConfigError
from server.kernels import machine
from server.kernels.machine import ProductUnits, product_units, run
from tests.attention.scenes import LENGTHS, Scene, attend, build_scene, expected

pytestmark = pytest.mark.skipif(
    not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16"
)


@pytest.fixture(params=["pairs", "tiles"], autouse=True)
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test by both; tiles only where the CPU has them."""
    units: ProductUnits = request.param
    if units not in product_units(torch.bfloat16):
        pytest.skip("this CPU does not multiply tiles")
    monkeypatch.setattr("server.attention.backend.PairBackend", lambda: PairBackend(units))


EDGES = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 300), (5, 70), (33, 33), (70, 135), (130, 130)]
"""Answers and chunks; contexts that end on, before and after a page's end."""


def scene(
    lengths: list[tuple[int, int]], *, heads: tuple[int, int] = (6, 2), head_dim: int = 64
) -> Scene:
    return build_scene(
        "cpu-pairs",
        lengths,
        page_size=PAGE_SIZE,
        heads=heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )


HEAD_DIMS = [64, 40, 72, 80, 128]
"""Whole blocks, and what is more or less by whole vectors, by halves of one and by other parts."""


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), EDGES], ids=[*LENGTHS, "edges"])
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [
        *itertools.product([(6, 2), (4, 4), (8, 1), (7, 1)], [64, 40]),
        *itertools.product([(6, 2)], [2, 46, 72, 80, 128]),
    ],
    ids=str,
)
def test_matches_dense_attention(
    heads: tuple[int, int], lengths: list[tuple[int, int]], head_dim: int
) -> None:
    one = scene(lengths, heads=heads, head_dim=head_dim)
    # Weights and the result have eight bits.
    torch.testing.assert_close(attend(one).double(), expected(one), atol=1e-2, rtol=1e-2)


def portion(whole: Scene, index: int, first: int, stop: int) -> tuple[Tensor, AttentionInputs]:
    """The queries of positions [first, stop) of a sequence, and what attends them alone."""
    inputs = whole.inputs
    last = int(inputs.seqused_k[index])
    begin = int(inputs.cu_seq_q[index + 1]) - last
    alone = AttentionInputs(
        caches=inputs.caches,
        cu_seq_q=torch.tensor([0, stop - first], dtype=torch.int32),
        seqused_k=torch.tensor([stop], dtype=torch.int32),
        block_table=inputs.block_table[index : index + 1],
        slot_mapping=inputs.slot_mapping[begin + first : begin + stop],
        max_q=stop - first,
        max_k=stop,
    )
    return whole.queries[begin + first : begin + stop], alone


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 40, 64, 130])
def test_a_token_gets_the_same_in_portions_of_any_size_and_beside_others(
    chunk: int, head_dim: int
) -> None:
    """To the bit. Later keys and values lie in the pages already, and must not be seen."""
    whole = scene([(1, 30), (200, 200), (3, 70)], head_dim=head_dim)
    together = attend(whole)[1:201]
    cache, backend = whole.inputs.caches[1], whole.backend
    for start in range(0, 200, chunk):
        stop = min(start + chunk, 200)
        queries, alone = portion(whole, 1, start, stop)
        assert torch.equal(backend.attend(queries, cache, alone), together[start:stop])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127])
def test_what_others_left_in_a_page_does_not_matter(length: int, head_dim: int) -> None:
    """Behind the last position, and beside the last dimension."""
    clean, used = (scene([(1, length)], head_dim=head_dim) for _ in range(2))
    for number in (torch.nan, torch.inf):
        for each in (used.inputs.caches[1].keys, used.inputs.caches[1].values):
            each.fill_(number)
        old = length - 1
        if old:
            inputs = replace(used.inputs, slot_mapping=all_slots(used, old))
            backend = used.backend
            backend.write(used.keys[0][:old], used.values[0][:old], used.inputs.caches[1], inputs)
        assert torch.equal(attend(used), attend(clean))


def test_later_tokens_of_a_chunk_are_not_felt() -> None:
    """However large their values are."""
    one, other = scene([(70, 70)]), scene([(70, 70)])
    for token in (40, 69):
        other.new_values[token] = 3e38
        other.new_keys[token] = -other.new_keys[token]
    assert torch.equal(attend(one)[:40], attend(other)[:40])


def all_slots(one: Scene, count: int) -> Tensor:
    positions = torch.arange(count)
    pages = one.inputs.block_table[0, positions // PAGE_SIZE].long()
    return pages * PAGE_SIZE + positions % PAGE_SIZE


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_writing_touches_only_its_own_slots(head_dim: int) -> None:
    one = scene(LENGTHS["mixed"], head_dim=head_dim)
    other: LayerCache = one.inputs.caches[0]
    attend(one)
    assert not other.keys.any()
    assert not other.values.any()
    for stored, written in (
        (one.inputs.caches[1].keys, one.keys),
        (one.inputs.caches[1].values, one.values),
    ):
        torch.testing.assert_close(
            stored.double().abs().sum(), torch.cat(written).double().abs().sum()
        )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_nothing_is_written_beyond_a_head(head_dim: int) -> None:
    """One key/value head's are attended and written where those around them stay as they are."""
    one = scene([(1, 30), (3, 70)], heads=(1, 1), head_dim=head_dim)
    expected_output, backend = attend(one), one.backend
    assert isinstance(backend, PairBackend)
    room = torch.full((6, 1, head_dim), 7.0, dtype=torch.bfloat16)
    cache = one.inputs.caches[1]
    run([backend.attend_call(one.queries, room[1:5], cache, one.inputs)])
    assert torch.equal(room[1:5], expected_output)
    assert (room[[0, 5]] == 7).all()
    for stored in (cache.keys, cache.values):
        stored.fill_(7)
    backend.write(one.new_keys, one.new_values, cache, one.inputs)
    num_written = one.new_keys.numel()
    assert (cache.keys != 7).sum() == (cache.values != 7).sum() == num_written


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_queries_keys_and_values_may_lie_among_others(head_dim: int) -> None:
    """As they come out of one product."""
    one, other = scene(EDGES, head_dim=head_dim), scene(EDGES, head_dim=head_dim)
    both = torch.cat([other.queries, other.new_keys, other.new_values], dim=1)
    queries, keys, values = both.split_with_sizes([6, 2, 2], dim=1)
    cache = other.inputs.caches[1]
    other.backend.write(keys, values, cache, other.inputs)
    assert torch.equal(other.backend.attend(queries, cache, other.inputs), attend(one))
    with pytest.raises(ValueError, match="do not lie side by side"):
        other.backend.attend(queries.transpose(1, 2), cache, other.inputs)


@pytest.mark.parametrize("spoiled", ["keys", "values"])
def test_what_is_not_a_number_stays_so_and_in_its_sequence(spoiled: str) -> None:
    one = scene([(1, 5), (1, 9)])
    new = one.new_keys if spoiled == "keys" else one.new_values
    new[0, :, 3] = torch.nan
    result = attend(one)
    assert result[0].isnan().any()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("factor", [5, 30, 300, 1e9, 1e30])
def test_large_scores_neither_overflow_nor_vanish(factor: float) -> None:
    one = scene([(1, 1), (1, 40), (1, 7), (70, 70)])
    one.queries.mul_(factor)
    torch.testing.assert_close(attend(one).double(), expected(one), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("number", [torch.inf, -torch.inf])
def test_infinite_keys_stay_in_their_sequence(number: float) -> None:
    """Where a query sees nothing else, there is nothing to be attended, and no number."""
    one, clean = scene([(1, 1), (1, 70), (5, 9)]), scene([(1, 1), (1, 70), (5, 9)])
    one.queries[0].abs_()
    one.new_keys[0] = number
    result, untouched = attend(one), attend(clean)
    assert result[0].isnan().all()
    assert torch.equal(result[1:], untouched[1:])


def test_a_token_gets_the_same_where_the_order_of_sums_shows() -> None:
    """Values that cancel out, so that what is left is what was rounded away on the way."""
    generator = torch.Generator().manual_seed(0)
    for last in range(2, 130):
        whole = scene([(130, 130)])
        whole.queries.zero_()  # all weigh the same
        values = whole.new_values[: last // 2 * 2]
        values.mul_(10 ** (8 * torch.rand(values.shape, generator=generator))).abs_()
        order = torch.randperm(last // 2, generator=generator)
        values[last // 2 :] = -values[: last // 2][order]
        together = attend(whole)[last - 1]
        queries, alone = portion(whole, 0, last - 1, last)
        result = whole.backend.attend(queries, whole.inputs.caches[1], alone)
        assert torch.equal(result[0], together), last


@pytest.mark.skipif(len(product_units(torch.bfloat16)) < 2, reason="this CPU has no tiles")
def test_each_kind_of_units_has_a_loop_of_its_own() -> None:
    one = scene([(1, 5)])
    output = one.queries.clone()
    calls = [
        PairBackend(units).attend_call(one.queries, output, one.inputs.caches[1], one.inputs)
        for units in product_units(torch.bfloat16)
    ]
    assert calls[0].function.address != calls[1].function.address


def test_threads_that_share_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = attend(scene(EDGES))
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    torch.set_num_threads(2)
    try:
        together = attend(scene(EDGES))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, alone)


def test_it_is_chosen_where_it_can_be_had_and_says_why_it_cannot() -> None:
    bfloat16 = torch.bfloat16
    for head_dim in HEAD_DIMS:
        backend = choose_backend("auto", device="cpu", dtype=bfloat16, head_dim=head_dim)
        assert type(backend) is PairBackend
    others = [(bfloat16, 57, None), (bfloat16, None, None), (torch.float32, 64, None)]
    for dtype, size, page_size in [*others, (bfloat16, 64, 32)]:
        backend = choose_backend(
            "auto", device="cpu", dtype=dtype, head_dim=size, page_size=page_size
        )
        assert type(backend) is not PairBackend
    refused = {
        "an even number of dimensions": (bfloat16, 57, None, "cpu"),
        "needs bfloat16": (torch.float32, 64, None, "cpu"),
        "pages of 64 tokens only": (bfloat16, 64, 32, "cpu"),
        "does not run on the device 'cuda'": (bfloat16, 64, None, "cuda"),
    }
    for message, (dtype, size, page_size, device) in refused.items():
        with pytest.raises(ConfigError, match=message):
            choose_backend(
                "cpu-pairs", device=device, dtype=dtype, head_dim=size, page_size=page_size
            )
