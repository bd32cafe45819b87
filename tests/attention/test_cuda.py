"""The CUDA backend: how it calls torch, on the CPU, and the real thing where there is a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from server.attention.backend import choose_backend
from server.attention.cuda import CudaBackend
from server.attention.sdpa import SdpaBackend
from server.errors import ConfigError
from tests.attention.scenes import LENGTHS, attend, build_scene, dense_attention, expected

PAGE_SIZE = 256


def varlen_attn_twin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """What its documentation says of a paged cache, and nothing beyond it."""
    assert query.is_contiguous() and cu_seq_k is None and num_splits == 1
    assert window_size == (-1, 0), "causal"
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert key.shape == value.shape and key.shape[1] % PAGE_SIZE == 0
    assert {each.dtype for each in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    bounds = cu_seq_q.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    assert (max_q, max_k) == (max(lengths), int(seqused_k.max()))
    output = torch.empty_like(query)
    for index, num_keys in enumerate(seqused_k.tolist()):
        pages = block_table[index, : -(-num_keys // key.shape[1])].long()
        start, stop = bounds[index], bounds[index + 1]
        keys, values = (each[pages].flatten(0, 1)[:num_keys] for each in (key, value))
        output[start:stop] = dense_attention(query[start:stop], keys, values)
    return output


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_twin)
    yield


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=str)
def test_it_calls_torch_as_documented(
    lengths: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    scene = build_scene("cuda", lengths, page_size=PAGE_SIZE, heads=heads)
    torch.testing.assert_close(attend(scene).double(), expected(scene), atol=1e-5, rtol=1e-5)


def test_pages_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", capable_of((9, 0)))
    with pytest.raises(ConfigError, match=r"engine\.block_size to be a multiple of 256, not 64"):
        choose_backend("cuda", device="cuda", dtype=torch.bfloat16, page_size=64)
    auto = choose_backend("auto", device="cuda", dtype=torch.bfloat16, page_size=64)
    assert (type(auto), auto.page_size) == (SdpaBackend, 64)


def capable_of(capability: tuple[int, int]) -> Any:
    return lambda device: capability


@pytest.mark.parametrize(
    ("dtype", "capability", "problem"),
    [
        (torch.float32, (9, 0), "needs model.dtype float16 or bfloat16"),
        (torch.bfloat16, (7, 5), "needs a GPU of compute capability 8.0 or more"),
    ],
)
def test_where_it_cannot_run_the_reference_is_taken(
    dtype: torch.dtype,
    capability: tuple[int, int],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", capable_of(capability))
    assert type(choose_backend("auto", device="cuda", dtype=dtype)) is SdpaBackend
    with pytest.raises(ConfigError, match=problem):
        choose_backend("cuda", device="cuda", dtype=dtype)


def test_it_is_for_gpus_and_taken_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", capable_of((8, 0)))
    backend = choose_backend("auto", device="cuda", dtype=torch.bfloat16)
    assert (type(backend), backend.page_size) == (CudaBackend, PAGE_SIZE)
    with pytest.raises(ConfigError, match="'cuda' does not run on the device 'cpu'"):
        choose_backend("cuda", device="cpu", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=str)
def test_matches_dense_attention_on_a_gpu(
    lengths: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    scene = build_scene(
        "cuda", lengths, page_size=PAGE_SIZE, heads=heads, dtype=torch.bfloat16, device="cuda"
    )
    result = attend(scene)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double().cpu(), expected(scene).cpu(), atol=2e-2, rtol=2e-2)
