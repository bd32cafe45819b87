"""The decoder against Hugging Face's LlamaForCausalLM, and against itself cut differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from server.model.layers import RMSNorm
from tests.model.loading import (
    all_logits,
    change_json,
    load,
    relative_difference,
    stored_tensors,
)
from tools.random_checkpoint import SIZES, write_checkpoint

PROMPT = [72, 101, 108, 108, 111, 33, 260, 10, 261, 7, 7, 200, 31, 0, 5]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def reference_logits(folder: Path, ids: list[int]) -> Tensor:
    """What transformers computes from a text checkpoint's own files."""
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = stored_tensors(folder)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.inference_mode():
        logits: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


def assert_parity(folder: Path, ids: list[int]) -> None:
    ours = all_logits(load(folder), [ids])[0]
    has_token = torch.isfinite(ours[0])
    assert has_token.sum() == 264
    reference = reference_logits(folder, ids)
    assert relative_difference(ours[:, has_token], reference[:, has_token]) < 1e-4


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_parity_tiny(tmp_path: Path, is_tied: bool, has_bias: bool) -> None:
    write_checkpoint(tmp_path, layout="text", is_tied=is_tied, has_bias=has_bias)
    assert_parity(tmp_path, PROMPT)


def test_parity_with_a_large_epsilon(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout="text")
    change_json(tmp_path / "config.json", lambda config: config.update(rms_norm_eps=0.3))
    assert_parity(tmp_path, PROMPT)


def test_parity_at_real_width(tmp_path: Path) -> None:
    tiny = SIZES["tiny"]
    size = replace(
        SIZES["real"],
        num_layers=2,
        vocab_size=tiny.vocab_size,
        tokenizer_size=tiny.tokenizer_size,
        special_ids=tiny.special_ids,
    )
    write_checkpoint(tmp_path, size=size, layout="text")
    assert_parity(tmp_path, PROMPT * 3)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_parity_with_llama3_frequencies(tmp_path: Path, key: str) -> None:
    write_checkpoint(tmp_path, layout="text")
    unscaled = all_logits(load(tmp_path), [PROMPT * 8])[0]

    def stretch(config: dict[str, object]) -> None:
        config["rope_scaling"] = None
        config[key] = dict(LLAMA3, rope_theta=config["rope_theta"])
        if key == "rope_parameters":
            del config["rope_theta"], config["rope_scaling"]

    change_json(tmp_path / "config.json", stretch)
    assert_parity(tmp_path, PROMPT * 8)
    scaled = all_logits(load(tmp_path), [PROMPT * 8])[0]
    assert relative_difference(scaled[:, :264], unscaled[:, :264]) > 1e-2


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_and_batches_do_not_change_the_logits(tmp_path: Path, chunk: int) -> None:
    write_checkpoint(tmp_path, layout="text")
    model = load(tmp_path)
    sequences = [PROMPT, PROMPT[::-1][:5], PROMPT[3:] * 2]
    batched = all_logits(model, sequences, chunk=chunk)
    for ids, logits in zip(sequences, batched, strict=True):
        torch.testing.assert_close(logits, all_logits(model, [ids])[0], atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout="text")
    exact = all_logits(load(tmp_path), [PROMPT])[0][:, :264]
    rounded = all_logits(load(tmp_path, dtype="bfloat16"), [PROMPT])[0][:, :264]
    assert rounded.dtype == torch.float32
    assert 0 < relative_difference(rounded, exact) < 5e-2


def test_ids_without_a_token_are_masked_and_not_cut_off(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout="text")

    def forget_tokens(tokenizer: dict[str, dict[str, dict[str, int]]]) -> None:
        tokenizer["model"]["vocab"] = {
            token: token_id
            for token, token_id in tokenizer["model"]["vocab"].items()
            if token_id not in (17, 100)
        }

    change_json(tmp_path / "tokenizer.json", forget_tokens)
    logits = all_logits(load(tmp_path), [PROMPT])[0]
    assert logits.shape == (len(PROMPT), 272)
    masked = torch.isneginf(logits)
    assert masked.any(0).nonzero().flatten().tolist() == [17, 100, *range(264, 272)]
    assert masked.all(0).equal(masked.any(0))


def test_norms_of_bfloat16_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(512, eps=1e-5).bfloat16()
    norm.weight.data.normal_()
    hidden = (torch.randn(64, 512) * 3 + 5).bfloat16()
    exact = hidden.double() * (hidden.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(norm(hidden), (exact * norm.weight.double()).bfloat16())
    # one rounding, at the end: as near as bfloat16 can be
    error = (norm(hidden).double() - exact * norm.weight.double()).abs()
    assert (error <= (exact * norm.weight.double()).abs() * 2**-8).all()
