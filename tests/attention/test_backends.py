"""The backends for CPUs against plain dense attention in float64, over scattered pages."""

import sys

import pytest
import torch

from server.attention.backend import AttentionInputs, choose_backend
from server.attention.cpu import MAX_KERNEL_QUERIES, CpuBackend
from server.attention.sdpa import SdpaBackend
from server.errors import ConfigError
from server.kernels import machine
from server.kernels.machine import has_compiler
from tests.attention.scenes import LENGTHS, attend, build_scene, expected

CPU_BACKENDS = ("cpu", "sdpa")


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=str)
def test_matches_dense_attention(
    name: str, lengths: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    scene = build_scene(name, lengths, heads=heads)
    torch.testing.assert_close(attend(scene).double(), expected(scene), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("page_size", [1, 3, 20, 24, 48])
def test_pages_may_have_any_size(name: str, page_size: int) -> None:
    scene = build_scene(name, LENGTHS["mixed"], page_size=page_size)
    scene.queries.mul_(100)  # so that it matters which score is the greatest
    torch.testing.assert_close(attend(scene).double(), expected(scene), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", ["mixed", "long"])
def test_half_precision_stays_close(name: str, dtype: torch.dtype, lengths: str) -> None:
    scene = build_scene(name, LENGTHS[lengths], page_size=16, dtype=dtype)
    result = attend(scene)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected(scene), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_sequence_does_not_depend_on_its_neighbours(name: str) -> None:
    together = attend(build_scene(name, LENGTHS["mixed"]))
    scene = build_scene(name, LENGTHS["mixed"])
    cache = scene.inputs.caches[1]
    scene.backend.write(scene.new_keys, scene.new_values, cache, scene.inputs)
    start, stop = scene.inputs.cu_seq_q.tolist()[2:4]
    alone = AttentionInputs(
        caches=scene.inputs.caches,
        cu_seq_q=torch.tensor([0, stop - start], dtype=torch.int32),
        seqused_k=scene.inputs.seqused_k[2:3],
        block_table=scene.inputs.block_table[2:3],
        slot_mapping=scene.inputs.slot_mapping[start:stop],
        max_q=stop - start,
        max_k=int(scene.inputs.seqused_k[2]),
    )
    assert torch.equal(
        scene.backend.attend(scene.queries[start:stop], cache, alone), together[start:stop]
    )


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_writing_touches_only_its_own_slots(name: str) -> None:
    scene = build_scene(name, LENGTHS["mixed"])
    other = scene.inputs.caches[0]
    attend(scene)
    assert not other.keys.any()
    assert not other.values.any()
    # every token's key is stored once, and nothing else is
    stored = scene.inputs.caches[1].keys.abs().sum().double()
    torch.testing.assert_close(
        stored, torch.cat(scene.keys).abs().sum().double(), rtol=1e-5, atol=0
    )


def test_an_unknown_backend_is_refused_by_name() -> None:
    known = "auto, cuda, cpu-pairs, cpu, sdpa"
    with pytest.raises(ConfigError, match=f"'flash'; it can be one of: {known}"):
        choose_backend("flash", device="cpu")


def test_auto_is_a_backend_with_the_page_size_asked_for() -> None:
    assert choose_backend("auto", device="cpu", page_size=32).page_size == 32


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
def test_pages_of_64_as_they_are_served(name: str, heads: tuple[int, int]) -> None:
    """Answers and short and long chunks, contexts that end on, before and after a page's end."""
    short, long = MAX_KERNEL_QUERIES, MAX_KERNEL_QUERIES + 1
    lengths = [(1, 64), (1, 65), (1, 300), (short, 128), (long, 129), (short, short), (70, 200)]
    scene = build_scene(name, lengths, page_size=64, heads=heads)
    torch.testing.assert_close(attend(scene).double(), expected(scene), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("spoiled", ["keys", "values"])
def test_what_is_not_a_number_stays_so(name: str, spoiled: str) -> None:
    """Or the sampler could not tell that a row is lost."""
    scene = build_scene(name, [(1, 5), (1, 9)])
    new = scene.new_keys if spoiled == "keys" else scene.new_values
    new[0, :, 3] = torch.nan
    result = attend(scene)
    assert result[0].isnan().any()
    assert result[1].isfinite().all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    scene = build_scene("cpu", [(1, 40), (1, 7)])
    scene.queries.mul_(300)
    reference = build_scene("sdpa", [(1, 40), (1, 7)])
    reference.queries.mul_(300)
    torch.testing.assert_close(attend(scene), attend(reference), atol=1e-4, rtol=1e-4)


def test_without_numba_the_reference_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    has_compiler.cache_clear()
    try:
        assert type(choose_backend("auto", device="cpu")) is SdpaBackend
        assert "without compiled loops" in caplog.text
        with pytest.raises(ConfigError, match="needs numba"):
            choose_backend("cpu", device="cpu")
    finally:
        has_compiler.cache_clear()


def test_the_kernel_is_for_cpus() -> None:
    with pytest.raises(ConfigError, match="does not run on the device 'cuda'"):
        choose_backend("cpu", device="cuda")
    assert type(choose_backend("auto", device="cpu")) is CpuBackend


def test_threads_that_share_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(1, 64), (1, 300), (3, 128), (70, 200)]
    alone = attend(build_scene("cpu", lengths, page_size=64))
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    torch.set_num_threads(2)
    try:
        together = attend(build_scene("cpu", lengths, page_size=64))
    finally:
        torch.set_num_threads(1)
    # Not equal: torch divides the products of the long chunk differently.
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    assert torch.equal(together[:5], alone[:5])
