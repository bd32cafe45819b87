"""The decoder as one program against the decoder it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from server.attention.backend import BACKENDS, AskedTokens, AttentionBackend, AttentionInputs
from server.kernels import machine
from server.kernels.machine import product_units
from server.model.compiled_decoder import CompiledDecoder, compile_decoder
from server.model.config import TextConfig
from server.model.decoder import Decoder
from server.model.layers import pack_linear_layers

pytestmark = pytest.mark.skipif(
    not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16"
)

NUM_PAGES = 12
PAGE_SIZE = 64
Span = tuple[int, int, int]
"""A sequence, and the positions from and to which it is computed in a step."""


def config(
    *, head_dim: int = 64, intermediate_size: int = 192, has_bias: bool = False
) -> TextConfig:
    return TextConfig(
        hidden_size=96,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        embedding_rows=50,
        logits_rows=48,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        attention_bias=has_bias,
        mlp_bias=has_bias,
        is_tied=False,
    )


def build(text: TextConfig, *, backend: str = "cpu-pairs", packed: bool = True) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(text, BACKENDS[backend].build(PAGE_SIZE), tokenless_ids=[3])
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    decoder = decoder.to(torch.bfloat16).requires_grad_(False)
    if packed:
        pack_linear_layers(decoder)
    return decoder


def compiled(decoder: Decoder) -> CompiledDecoder:
    result = compile_decoder(decoder)
    assert result is not None
    return result


class Steps:
    """A decoder with a cache, and sequences of ids in pages of their own."""

    def __init__(self, decoder: Decoder | CompiledDecoder, text: TextConfig) -> None:
        self.decoder = decoder
        inner = decoder.decoder if isinstance(decoder, CompiledDecoder) else decoder
        backend: AttentionBackend = inner.layers[0].self_attn.backend
        self.caches = backend.allocate(
            text.num_layers,
            NUM_PAGES,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=torch.bfloat16,
            device="cpu",
        )
        self.ids = torch.randint(50, (3, 4 * PAGE_SIZE), generator=torch.Generator().manual_seed(1))
        pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2))
        self.table = pages.view(3, 4).int()

    def inputs(self, spans: Sequence[Span]) -> AttentionInputs:
        lengths = torch.tensor([stop - start for _, start, stop in spans], dtype=torch.int32)
        slots = [torch.empty(0, dtype=torch.int64)]
        for sequence, start, stop in spans:
            positions = torch.arange(start, stop)
            pages = self.table[sequence, positions // PAGE_SIZE].long()
            slots.append(pages * PAGE_SIZE + positions % PAGE_SIZE)
        return AttentionInputs(
            caches=self.caches,
            cu_seq_q=torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)]),
            seqused_k=torch.tensor([stop for *_, stop in spans], dtype=torch.int32),
            block_table=self.table[[sequence for sequence, *_ in spans]].contiguous(),
            slot_mapping=torch.cat(slots),
            max_q=max(lengths.tolist(), default=0),
            max_k=max((stop for *_, stop in spans), default=0),
        )

    def run(self, *spans: Span, asked: Sequence[Span] | None = None) -> Tensor:
        """States of the spans' tokens, or of those asked for, which are the last of some spans."""
        inputs = self.inputs(spans)
        if asked is not None:
            bounds, rows = inputs.cu_seq_q.tolist(), []
            for sequence, start, stop in asked:
                index = [each for each, *_ in spans].index(sequence)
                first = bounds[index] + start - spans[index][1]
                rows += range(first, first + stop - start)
            inputs = replace(
                inputs,
                asked=AskedTokens(torch.tensor(rows, dtype=torch.int64), self.inputs(list(asked))),
            )
        ids = torch.cat([self.ids[sequence, start:stop] for sequence, start, stop in spans])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in spans])
        with torch.inference_mode():
            states: Tensor = self.decoder(self.decoder.embed(ids), positions, inputs)
        return states


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("head_dim", "intermediate_size"), [(64, 192), (128, 192), (40, 208)])
def test_it_computes_what_the_decoder_does(
    head_dim: int, intermediate_size: int, has_bias: bool
) -> None:
    text = config(head_dim=head_dim, intermediate_size=intermediate_size, has_bias=has_bias)
    plain = Steps(build(text, backend="sdpa", packed=False), text)
    program = Steps(compiled(build(text)), text)
    for spans in ([(0, 0, 70), (1, 0, 5)], [(0, 70, 71), (1, 5, 6), (2, 0, 130)], [(2, 130, 131)]):
        expected, result = plain.run(*spans), program.run(*spans)
        # Both are rounded to 16 bits after every operation, though not the same ones.
        torch.testing.assert_close(result, expected, atol=0.1, rtol=0.05)
        assert (result.float() - expected.float()).abs().mean() < 0.01


def test_only_what_is_asked_for_is_returned() -> None:
    text = config()
    whole = Steps(compiled(build(text)), text)
    part = Steps(compiled(build(text)), text)
    spans = [(0, 0, 70), (1, 0, 9), (2, 0, 65)]
    states = whole.run(*spans)
    asked = part.run(*spans, asked=[(0, 69, 70), (2, 60, 65)])
    assert torch.equal(asked, torch.cat([states[69:70], states[139:144]]))
    assert part.run((1, 9, 12), asked=[]).shape == (0, 96)
    for one, other in zip(whole.caches, part.caches, strict=True):
        for pages in (whole.table[0].long(), whole.table[2].long()):
            assert torch.equal(one.keys[pages], other.keys[pages])
            assert torch.equal(one.values[pages], other.values[pages])


@pytest.mark.parametrize("chunk", [1, 3, 8, 64, 100])
@pytest.mark.parametrize(
    "text", [config(), config(head_dim=40, intermediate_size=208)], ids=["blocks", "less"]
)
def test_a_token_gets_the_same_in_portions_of_any_size_and_beside_others(
    text: TextConfig, chunk: int
) -> None:
    """To the bit, though every number is rounded to 16 of them."""
    alone = Steps(compiled(build(text)), text).run((0, 0, 200))
    portions = Steps(compiled(build(text)), text)
    states = []
    for start in range(0, 200, chunk):
        stop = min(start + chunk, 200)
        beside = [(1, start, stop), (2, start // 2, start // 2 + 1)]
        states.append(portions.run((0, start, stop), *beside)[: stop - start])
    assert torch.equal(torch.cat(states), alone)


def test_threads_that_share_the_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = config()
    spans = [(0, 0, 100), (1, 0, 1), (2, 0, 30)]
    alone = Steps(compiled(build(text)), text).run(*spans)
    monkeypatch.setattr(machine, "MIN_BYTES_TO_SHARE", 0)
    torch.set_num_threads(2)
    try:
        together = Steps(compiled(build(text)), text).run(*spans)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, alone)


def test_embedding_and_logits_are_the_decoders_own() -> None:
    decoder = build(config())
    program = compiled(decoder)
    ids, hidden = torch.tensor([1, 7]), torch.ones(2, 96, dtype=torch.bfloat16)
    assert torch.equal(program.embed(ids), decoder.embed(ids))
    assert torch.equal(program.logits(hidden), decoder.logits(hidden))


@pytest.mark.parametrize(
    ("text", "backend", "packed"),
    [
        (config(), "sdpa", True),
        (config(), "cpu", True),
        (config(), "cpu-pairs", False),
        (config(intermediate_size=164), "cpu-pairs", True),
    ],
)
def test_it_is_not_made_where_a_part_has_no_loop(
    text: TextConfig, backend: str, packed: bool
) -> None:
    assert compile_decoder(build(text, backend=backend, packed=packed)) is None
