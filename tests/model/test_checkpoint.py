"""Loading: every layout gives the same model, and nothing that does not fit is let through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.attention.backend import choose_backend
from server.errors import CheckpointError
from server.kernels.machine import product_units
from server.model.checkpoint import check_tensors, load_model, pack_for_cpu
from server.model.compiled_decoder import CompiledDecoder
from server.model.config import read_checkpoint
from server.model.tensors import MAX_NAMES_LISTED
from server.model.vlm import VisionLanguageModel
from tests.model.loading import all_logits, change_json, change_tensors, load
from tools.random_checkpoint import SIZES, write_checkpoint

Tensors = dict[str, Tensor]
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def refusal(folder: Path) -> str:
    """The one line that `load_model` and `check_tensors` both refuse a checkpoint with."""
    with pytest.raises(CheckpointError) as loading:
        load(folder)
    with pytest.raises(CheckpointError) as checking:
        check_tensors(read_checkpoint(folder), backend=choose_backend(device="cpu"))
    assert str(loading.value) == str(checking.value)
    assert "\n" not in str(loading.value)
    return str(loading.value)


def assert_same(left: VisionLanguageModel, right: VisionLanguageModel) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def test_both_revisions_load_the_same_model(folder: Path, tmp_path: Path) -> None:
    assert_same(load(folder), load(write_checkpoint(tmp_path / "first", layout="v0.1.0")))


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_load_like_one_file(folder: Path, tmp_path: Path, shards: int) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", shards=shards)
    assert len(list(sharded.glob("*.safetensors"))) == shards
    assert_same(load(folder), load(sharded))


def single_vision_prefix(name: str) -> str:
    return name.replace("vision_model.vision_model.", "vision_model.")


def outer_model_prefix(name: str) -> str:
    return f"model.{name}"


def as_transformers_5_writes(name: str) -> str:
    name = single_vision_prefix(name).replace("language_model.model.", "language_model.")
    return "lm_head.weight" if "lm_head" in name else f"model.{name}"


@pytest.mark.parametrize(
    "rename", [single_vision_prefix, outer_model_prefix, as_transformers_5_writes]
)
def test_other_prefixes_are_understood(tmp_path: Path, rename: Callable[[str], str]) -> None:
    folder = write_checkpoint(tmp_path, is_tied=False)
    expected = load(folder)

    def rename_all(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    change_tensors(folder, rename_all)
    assert_same(load(folder), expected)


def test_weights_are_those_of_the_file_and_not_a_view_of_it(folder: Path) -> None:
    model = load(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\xff" * 4096)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
def test_any_stored_dtype_is_served_as_any(tmp_path: Path, stored: str, served: str) -> None:
    folder = write_checkpoint(tmp_path, dtype=stored)
    assert read_checkpoint(folder).dtype == stored
    model = load(folder, dtype=served)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, served)}
    assert model.language_model.rotary.inverse_frequencies.dtype == torch.float32


def test_nothing_is_left_without_storage(folder: Path) -> None:
    model = load(folder)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    info = read_checkpoint(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == info.num_parameters


def test_a_head_in_the_file_is_used_and_a_missing_one_is_tied(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, is_tied=False, layout="text")
    change_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    own_head = all_logits(load(folder), [[1, 2, 3]])[0]
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = load(folder)
    decoder = model.language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    assert not torch.equal(all_logits(model, [[1, 2, 3]])[0], own_head)


def test_a_missing_head_that_is_not_tied_is_missing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, is_tied=False)
    change_tensors(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    assert "missing: language_model.lm_head.weight" in refusal(folder)


def test_known_unused_tensors_are_skipped(folder: Path) -> None:
    expected = load(folder)

    def add_leftovers(tensors: Tensors) -> None:
        assert any("vision_model.head." in name for name in tensors)
        assert any("post_layernorm" in name for name in tensors)
        assert any("encoder.layers.2." in name for name in tensors)
        inverse = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[inverse] = torch.ones(8)
        positions = "vision_model.vision_model.embeddings.position_ids"
        tensors[positions] = torch.arange(64)[None]

    change_tensors(folder, add_leftovers)
    assert_same(load(folder), expected)


def test_unused_tensors_may_be_absent(folder: Path) -> None:
    expected = load(folder)

    def drop_unused(tensors: Tensors) -> None:
        for name in list(tensors):
            if "head." in name or "post_layernorm" in name or "encoder.layers.2." in name:
                del tensors[name]

    change_tensors(folder, drop_unused)
    assert_same(load(folder), expected)


def test_missing_unexpected_and_misshapen_are_one_error(folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors["image_newline"]
        del tensors["vision_model.vision_model.encoder.layers.0.mlp.fc1.bias"]
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
        tensors["vision_model.vision_model.encoder.layers.3.mlp.fc1.bias"] = torch.ones(2)
        tensors["audio_model.weight"] = torch.ones(2)
        tensors[QUERY] = tensors[QUERY][:-1].clone()

    change_tensors(folder, spoil)
    message = refusal(folder)
    assert (
        "missing: image_newline, vision_model.vision_model.encoder.layers.0.mlp.fc1.bias; "
        in message
    )
    assert (
        "unexpected: audio_model.weight, language_model.model.layers.7.mlp.up_proj.weight, "
        "vision_model.vision_model.encoder.layers.3.mlp.fc1.bias; " in message
    )
    assert f"wrong shape: {QUERY} [63, 64] instead of [64, 64]" in message


def test_a_transposed_matrix_is_a_wrong_shape(folder: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert f"wrong shape: {name} [64, 96] instead of [96, 64]" in refusal(folder)


def test_a_bias_that_no_key_announces_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, has_bias=True)
    change_json(folder / "config.json", lambda config: config["text_config"].update(mlp_bias=False))
    assert "unexpected: language_model.model.layers.0.mlp.down_proj.bias" in refusal(folder)


def test_a_long_list_of_names_is_cut(folder: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if "language_model" in name]:
            tensors[name.replace("language_model", "text")] = tensors.pop(name)

    change_tensors(folder, rename)
    message = refusal(folder)
    assert message.count("text.model.") == MAX_NAMES_LISTED
    assert f"and {20 - MAX_NAMES_LISTED} more" in message


def metadata_refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000])
def test_a_truncated_file_is_one_line(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file}: not a complete safetensors file" in metadata_refusal(folder)


def test_a_file_of_another_kind_is_one_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!doctype html>\n" * 1000)
    assert "not a complete safetensors file" in metadata_refusal(folder)


def test_a_file_cut_after_the_metadata_was_read_is_one_line(folder: Path) -> None:
    info = read_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_model(
            info,
            device="cpu",
            dtype="float32",
            backend=choose_backend(device="cpu"),
            progress=lambda done, total: None,
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_a_stored_dtype_that_cannot_be_loaded_is_named(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    assert f"'{QUERY}' is stored as " in metadata_refusal(folder)


def test_two_names_for_one_place_are_refused(folder: Path) -> None:
    name = "vision_model.vision_model.encoder.layers.0.mlp.fc1.bias"
    change_tensors(
        folder,
        lambda tensors: tensors.update({single_vision_prefix(name): tensors[name].clone()}),
    )
    assert "two tensors for one place" in metadata_refusal(folder)


# sharded checkpoints


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", shards=3)


def change_map(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    change_json(folder / "model.safetensors.index.json", lambda index: change(index["weight_map"]))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "weight files are missing: model-00002-of-00003" in metadata_refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded: Path) -> None:
    change_map(sharded, lambda names: names.update({"a.b": "model-00001-of-00003.safetensors"}))
    assert "tensors are not in the files it names: a.b" in metadata_refusal(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_the_index_cannot_point_out_of_the_folder(sharded: Path, name: object) -> None:
    change_map(sharded, lambda names: names.update({"a.b": name}))
    assert "is not the name of a file beside it" in metadata_refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"image_newline": torch.ones(64)}, sharded / "extra.safetensors")
    change_map(sharded, lambda names: names.update({"image_newline": "extra.safetensors"}))
    assert "two tensors for one place" in metadata_refusal(sharded)


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "'weight_map' is missing" in metadata_refusal(sharded)


# progress and memory


@pytest.mark.parametrize("shards", [1, 3])
def test_progress_counts_the_bytes_that_are_loaded(tmp_path: Path, shards: int) -> None:
    folder = write_checkpoint(tmp_path, shards=shards, dtype="bfloat16")
    info = read_checkpoint(folder)
    calls: list[tuple[int, int]] = []
    load_model(
        info,
        device="cpu",
        dtype="float32",
        backend=choose_backend(device="cpu"),
        progress=lambda done, total: calls.append((done, total)),
    )
    total = info.parameter_bytes("bfloat16")
    assert {total_told for _, total_told in calls} == {total}
    done = [done for done, _ in calls]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(set(done))


MEASURE_LOADING = """
import json, sys
from pathlib import Path
import torch
from server.attention.backend import choose_backend
from server.model.checkpoint import load_model
from server.model.config import read_checkpoint

def private_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

torch.set_num_threads(1)
info = read_checkpoint(Path(sys.argv[1]))
seen = []
progress = lambda done, total: seen.append(private_bytes())
before = private_bytes()
model = load_model(info, device="cpu", dtype="bfloat16", backend=choose_backend(device="cpu"),
                   progress=progress)
print(json.dumps([max(*seen, private_bytes()) - before, info.parameter_bytes("bfloat16")]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_private_memory_while_loading_stays_near_the_weights(tmp_path: Path) -> None:
    size = replace(SIZES["tiny"], hidden_size=1024, intermediate_size=4096, num_layers=8)
    write_checkpoint(tmp_path, size=size, layout="text", dtype="float32", shards=2)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, str(tmp_path)],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    peak, weights = json.loads(result.stdout)
    assert weights > 200e6
    # one float32 copy of everything would be twice the weights more; building the model imports
    # some tens of megabytes of torch
    assert peak < weights + 128e6


@pytest.mark.skipif(not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize(
    ("head_dim", "intermediate_size", "is_program"),
    [(64, 128, True), (64, 96, True), (16, 128, True), (16, 100, False)],
)
def test_a_decoder_of_whole_vectors_becomes_one_program(
    tmp_path: Path, head_dim: int, intermediate_size: int, is_program: bool
) -> None:
    """And computes what it did before."""
    size = replace(SIZES["tiny"], head_dim=head_dim, intermediate_size=intermediate_size)
    info = read_checkpoint(write_checkpoint(tmp_path, size=size, dtype="bfloat16"))

    def loaded() -> VisionLanguageModel:
        backend = choose_backend(device="cpu", dtype=torch.bfloat16, head_dim=head_dim)
        return load_model(
            info, device="cpu", dtype="bfloat16", backend=backend, progress=lambda done, all_: None
        )

    plain, packed = loaded(), loaded()
    pack_for_cpu(packed, info)
    assert isinstance(packed.language_model, CompiledDecoder) == is_program
    ids = list(range(5, 75))
    ours, theirs = all_logits(packed, [ids]), all_logits(plain, [ids])
    difference = (ours[0] - theirs[0]).nan_to_num(0.0).abs()  # ids without a token are -inf in both
    assert difference.max() < 0.4
    assert difference.mean() < 0.05
