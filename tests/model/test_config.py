"""What is read from a checkpoint's metadata, what is assumed aloud, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.core import SamplingDefaults
from server.errors import CheckpointError
from server.model.config import (
    CheckpointInfo,
    Llama3Scaling,
    read_checkpoint,
)
from tests.model.loading import change_json, change_tensors
from tools.random_checkpoint import PROJECTORS, SIZES, model_config, tensor_shapes, write_checkpoint


def without(folder: Path, file: str, *path: str) -> None:
    """Remove one key, given by the path to it, from a JSON file."""

    def remove(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    change_json(folder / file, remove)


def with_value(folder: Path, file: str, *path: str, value: object) -> None:
    def put(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    change_json(folder / file, put)


def without_both(folder: Path, *names: str) -> None:
    """Remove keys from the preprocessor's file and the model's."""
    for file in ("preprocessor_config.json", "config.json"):
        change_json(folder / file, lambda values: [values.pop(name, None) for name in names])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder)
    message = str(raised.value)
    assert "\n" not in message
    return message


def assumptions(folder: Path) -> str:
    return "\n".join(read_checkpoint(folder).assumptions)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def test_a_complete_checkpoint_needs_no_assumption(folder: Path) -> None:
    info = read_checkpoint(folder)
    assert info.assumptions == ()
    assert info.revision_layout == "main"
    assert info.tower is not None and info.vision is not None and info.projector is not None
    assert (info.tower.num_layers, info.tower.num_layers_used) == (3, 2)
    assert info.text.head_dim == 16
    assert info.projector.pos_emb and not info.projector.prenorm
    vision = info.vision
    assert (vision.image_token_id, vision.video_token_id) == (258, 257)
    assert (vision.image_queries, vision.video_slow_queries, vision.video_fast_queries) == (
        16,
        16,
        4,
    )
    assert (vision.tile_size, vision.max_frames, vision.pad_colour) == (56, 108, (127, 127, 127))
    assert (info.stop_token_ids, info.turn_end_token_id) == ((256, 261, 262), 260)
    assert (info.tokenizer_size, info.missing_token_ids) == (264, ())
    assert (info.dtype, info.context_length) == ("float32", 4096)
    assert info.sampling == SamplingDefaults()


def comparable(info: CheckpointInfo) -> dict[str, Any]:
    names = ("text", "tower", "projector", "vision", "stop_token_ids", "context_length", "dtype")
    return {name: getattr(info, name) for name in names}


def test_both_revisions_say_the_same(tmp_path: Path) -> None:
    main = read_checkpoint(write_checkpoint(tmp_path / "main"))
    first = read_checkpoint(write_checkpoint(tmp_path / "first", layout="v0.1.0"))
    assert first.revision_layout == "v0.1.0"
    assert comparable(first) == comparable(main)
    # that revision had no key for videos: the one thing that had to be found by name
    assert len(first.assumptions) == 1
    assert "'video_token_id' is missing" in first.assumptions[0]


def test_names_from_gpt2_are_understood(tmp_path: Path) -> None:
    expected = read_checkpoint(write_checkpoint(tmp_path, layout="v0.1.0")).text

    def rename(config: dict[str, Any]) -> None:
        text = config["language_config"]
        for old, new in (
            ("n_embd", "hidden_size"),
            ("n_positions", "max_position_embeddings"),
            ("n_head", "num_attention_heads"),
            ("n_layer", "num_hidden_layers"),
        ):
            text[old] = text.pop(new)

    change_json(tmp_path / "config.json", rename)
    info = read_checkpoint(tmp_path)
    assert (info.text, info.context_length) == (expected, 4096)


def test_a_text_checkpoint_has_no_vision(tmp_path: Path) -> None:
    info = read_checkpoint(write_checkpoint(tmp_path, layout="text"))
    assert (info.revision_layout, info.tower, info.projector, info.vision) == (
        "text",
        None,
        None,
        None,
    )


def test_the_real_dimensions_are_the_published_ones() -> None:
    config = model_config(
        SIZES["real"],
        layout="main",
        dtype="bfloat16",
        projector="cabstractor",
        is_tied=True,
        has_prenorm=False,
        has_bias=False,
    )
    shapes = tensor_shapes(config)
    counts = {
        prefix: sum(name.startswith(prefix) for name in shapes)
        for prefix in ("language_model.", "vision_model.", "mm_projector.", "image_newline")
    }
    assert list(counts.values()) == [290, 448, 83, 1]
    elements = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        elements += size
    assert elements == 3_721_243_520


# use_nth_layer


@pytest.mark.parametrize(
    ("nth", "used"), [(-1, 3), (-2, 2), (-3, 1), (-4, 0), (0, 0), (1, 1), (3, 3)]
)
def test_use_nth_layer_indexes_hidden_states(folder: Path, nth: int, used: int) -> None:
    with_value(folder, "config.json", "use_nth_layer", value=nth)
    tower = read_checkpoint(folder).tower
    assert tower is not None
    assert tower.num_layers_used == used


@pytest.mark.parametrize("nth", [-5, 4, 1.5, True, "-2"])
def test_use_nth_layer_out_of_range_is_refused(folder: Path, nth: object) -> None:
    with_value(folder, "config.json", "use_nth_layer", value=nth)
    assert "'use_nth_layer'" in refusal(folder)


def test_a_missing_use_nth_layer_is_assumed_aloud(folder: Path) -> None:
    without(folder, "config.json", "use_nth_layer")
    info = read_checkpoint(folder)
    assert info.tower is not None
    assert info.tower.num_layers_used == 2
    assert info.assumptions == ("config.json: the key 'use_nth_layer' is missing: assumed -2",)


# missing keys


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
    ],
)
def test_a_text_key_that_cannot_be_assumed_is_named(folder: Path, key: str) -> None:
    without(folder, "config.json", "text_config", key)
    assert f"text_config: the key '{key}' is missing" in refusal(folder)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    ],
)
def test_a_vision_key_that_cannot_be_assumed_is_named(folder: Path, key: str) -> None:
    without(folder, "config.json", "vision_config", key)
    assert f"vision_config: the key '{key}' is missing" in refusal(folder)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_missing_section_is_named(folder: Path, section: str) -> None:
    without(folder, "config.json", section)
    assert f"the key '{section}' is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("path", "note"),
    [
        (("mm_projector_type",), "assumed 'cabstractor'"),
        (("text_config", "num_key_value_heads"), "assumed 4"),
        (("text_config", "head_dim"), "assumed 16"),
        (("text_config", "hidden_act"), "assumed 'silu'"),
        (("text_config", "attention_bias"), "assumed False"),
        (("text_config", "mlp_bias"), "assumed False"),
        (("text_config", "tie_word_embeddings"), "assumed True"),
        (("text_config", "max_position_embeddings"), "assumed 16384"),
        (("vision_config", "hidden_act"), "assumed 'gelu_pytorch_tanh'"),
        (("vision_config", "layer_norm_eps"), "assumed 1e-06"),
        (("vision_config", "num_channels"), "assumed 3"),
    ],
)
def test_what_is_assumed_is_said(folder: Path, path: tuple[str, ...], note: str) -> None:
    without(folder, "config.json", *path)
    assert f"the key '{path[-1]}' is missing: {note}" in assumptions(folder)


@pytest.mark.parametrize(
    ("key", "field", "default"),
    [
        ("unpad", "unpad", True),
        ("pad_to_square", "pad_to_square", True),
        ("first_last_frames_slow", "first_last_frames_slow", False),
        ("max_image_cnt", "max_canvases", 12),
        ("resample", "resample", 3),
        ("rescale_factor", "rescale_factor", 1 / 255),
        ("image_mean", "image_mean", (0.5, 0.5, 0.5)),
        ("image_std", "image_std", (0.5, 0.5, 0.5)),
        ("num_queries_vis_abstractor_video_fast", "video_fast_queries", 9),
    ],
)
def test_vision_defaults_are_used_last_and_said(
    folder: Path, key: str, field: str, default: object
) -> None:
    without_both(folder, key)
    info = read_checkpoint(folder)
    assert getattr(info.vision, field) == default
    assert len(info.assumptions) == 1
    assert f"'{key}' is missing" in info.assumptions[0]


def test_the_preprocessor_counts_more_than_the_model(folder: Path) -> None:
    with_value(folder, "config.json", "unpad", value=False)
    with_value(folder, "preprocessor_config.json", "num_queries_vis_abstractor_image", value=9)
    info = read_checkpoint(folder)
    assert info.vision is not None
    assert (info.vision.unpad, info.vision.image_queries) == (True, 9)
    notes = "\n".join(info.assumptions)
    assert "'unpad' is True, config.json: 'unpad' is False: the first is used" in notes
    without(folder, "preprocessor_config.json", "unpad")
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert vision.unpad is False


def test_without_a_preprocessor_file_the_models_config_serves(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    info = read_checkpoint(folder)
    assert info.vision is not None
    assert info.vision.tile_size == 56
    assert info.vision.image_queries == 16
    assert (56, 224) in info.vision.candidate_resolutions
    assert "the key 'image_mean' is missing" in "\n".join(info.assumptions)


# grids


def test_candidates_are_built_where_none_are_listed(folder: Path) -> None:
    listed = read_checkpoint(folder).vision
    without_both(folder, "possible_resolutions")
    built = read_checkpoint(folder).vision
    assert listed is not None and built is not None
    assert built.candidate_resolutions == listed.candidate_resolutions
    for file in ("preprocessor_config.json", "config.json"):
        with_value(folder, file, "max_num_grids", value=9)
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert len(vision.candidate_resolutions) == 23
    assert vision.candidate_resolutions[:3] == ((56, 56), (56, 112), (56, 168))
    assert vision.candidate_resolutions[-1] == (504, 56)
    with_value(folder, "config.json", "use_1x1_grid", value=False)
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert len(vision.candidate_resolutions) == 22
    assert vision.candidate_resolutions[0] == (56, 112)


def test_without_anyres_there_are_no_candidates(folder: Path) -> None:
    with_value(folder, "preprocessor_config.json", "anyres", value=False)
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert vision.candidate_resolutions == ()


@pytest.mark.parametrize("pair", [[56], [56, 57], [0, 56], ["56", 56], 56, [56, True]])
def test_a_strange_resolution_is_refused(folder: Path, pair: object) -> None:
    with_value(folder, "preprocessor_config.json", "possible_resolutions", value=[[56, 56], pair])
    assert "'possible_resolutions' must hold pairs of multiples of 56" in refusal(folder)


def test_tiles_may_differ_from_the_towers_size_when_the_patches_agree(folder: Path) -> None:
    # 56 // 7 == 60 // 7, as 378 // 14 == 384 // 14
    with_value(folder, "config.json", "vision_config", "image_size", value=60)
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert vision.tile_size == 56
    with_value(folder, "config.json", "vision_config", "image_size", value=63)
    assert "tiles of 56 pixels do not give the patches" in refusal(folder)


@pytest.mark.parametrize("queries", [15, 81, 0])
def test_queries_must_be_a_square_within_the_patches(folder: Path, queries: int) -> None:
    name = "num_queries_vis_abstractor_image"
    with_value(folder, "preprocessor_config.json", name, value=queries)
    assert f"'{name}'" in refusal(folder)


@pytest.mark.parametrize("kind", [kind for kind in PROJECTORS if kind != "cabstractor"])
def test_projectors_that_do_not_pool_keep_every_patch(tmp_path: Path, kind: str) -> None:
    vision = read_checkpoint(write_checkpoint(tmp_path, projector=kind)).vision
    assert vision is not None
    assert (vision.image_queries, vision.video_slow_queries, vision.video_fast_queries) == (
        64,
        64,
        64,
    )


# the file is trusted about its own parts


def test_projector_parts_are_what_the_weights_have(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, has_prenorm=True)
    with_value(folder, "config.json", "proj_prenorm", value=False)
    change_tensors(folder, lambda tensors: tensors.pop("mm_projector.pos_emb"))
    info = read_checkpoint(folder)
    assert info.projector is not None
    assert (info.projector.prenorm, info.projector.pos_emb) == (True, False)
    notes = "\n".join(info.assumptions)
    assert "'proj_prenorm' is false, but mm_projector.prenorm.weight is among the weights" in notes
    assert "'proj_pos_emb' is true, but mm_projector.pos_emb is not among the weights" in notes


def test_padded_vocabularies(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, is_tied=False)
    with_value(folder, "config.json", "text_config", "vocab_size", value=264)
    with_value(folder, "config.json", "text_config", "padded_vocab_size", value=272)
    text = read_checkpoint(folder).text
    assert (text.embedding_rows, text.logits_rows) == (272, 272)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                "language_model.model.embed_tokens.weight": tensors[
                    "language_model.model.embed_tokens.weight"
                ][:264].clone()
            }
        ),
    )
    text = read_checkpoint(folder).text
    assert (text.embedding_rows, text.logits_rows) == (264, 272)


def test_padding_that_only_the_weights_have(tmp_path: Path) -> None:
    """The numbers of the config are second-hand knowledge; the matrix is there to be seen."""
    folder = write_checkpoint(tmp_path)
    with_value(folder, "config.json", "text_config", "vocab_size", value=264)
    info = read_checkpoint(folder)
    assert (info.text.embedding_rows, info.text.logits_rows) == (272, 272)
    assert "has 272 rows for a vocabulary of 264" in "\n".join(info.assumptions)


def test_a_head_is_tied_where_either_level_of_the_config_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with_value(folder, "config.json", "text_config", "tie_word_embeddings", value=False)
    with_value(folder, "config.json", "tie_word_embeddings", value=True)
    info = read_checkpoint(folder)
    assert info.text.is_tied
    assert "config.json's own is true" in "\n".join(info.assumptions)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("resample", 9, "Pillow's filters are 0 to 5"),
        ("image_mean", [-1.0, 0.5, 0.5], "three numbers from 0 to 1"),
        ("image_mean", [127.0, 127.0, 127.0], "three numbers from 0 to 1"),
    ],
)
def test_a_preprocessor_that_could_cut_no_picture(
    folder: Path, key: str, value: object, complaint: str
) -> None:
    with_value(folder, "preprocessor_config.json", key, value=value)
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(folder)


# token ids


def test_ids_are_found_by_name_where_the_config_has_none(folder: Path) -> None:
    without(folder, "config.json", "image_token_id")
    without(folder, "config.json", "video_token_id")
    info = read_checkpoint(folder)
    assert info.vision is not None
    assert (info.vision.image_token_id, info.vision.video_token_id) == (258, 257)
    assert "<|dummy3|> is 258" in "\n".join(info.assumptions)


def test_the_config_decides_over_the_name(folder: Path) -> None:
    with_value(folder, "config.json", "image_token_id", value=65)
    vision = read_checkpoint(folder).vision
    assert vision is not None
    assert vision.image_token_id == 65


def test_the_first_revisions_outdated_image_id_is_not_believed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, layout="v0.1.0")
    with_value(folder, "config.json", "img_start_id", value=100009)
    info = read_checkpoint(folder)
    assert info.vision is not None
    assert info.vision.image_token_id == 258
    assert "'img_start_id' is 100009, but <|dummy3|> is token 258" in "\n".join(info.assumptions)


def test_an_id_that_is_no_token_is_refused(folder: Path) -> None:
    with_value(folder, "config.json", "image_token_id", value=271)
    assert "'image_token_id' is 271, which is no token's id" in refusal(folder)


def rename_token(folder: Path, old: str, new: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(json.dumps(old), json.dumps(new)))


def test_without_any_image_token_the_key_is_named(folder: Path) -> None:
    without(folder, "config.json", "image_token_id")
    rename_token(folder, "<|dummy3|>", "<|other|>")
    assert "the key 'image_token_id' is missing and <|dummy3|> is no token" in refusal(folder)


def test_without_any_video_token_there_is_none(folder: Path) -> None:
    without(folder, "config.json", "video_token_id")
    rename_token(folder, "<|_unuse_missing_100270|>", "<|other|>")
    info = read_checkpoint(folder)
    assert info.vision is not None
    assert info.vision.video_token_id is None
    assert "videos have no token" in "\n".join(info.assumptions)


def test_eos_ids_of_every_config_end_an_answer(folder: Path) -> None:
    with_value(folder, "config.json", "eos_token_id", value=[1, 260])
    with_value(folder, "config.json", "text_config", "eos_token_id", value=2)
    with_value(folder, "generation_config.json", "eos_token_id", value=[3, 4])
    info = read_checkpoint(folder)
    # 260 is <|im_end|>, which ends an answer or not depending on the request
    assert info.stop_token_ids == (1, 2, 3, 4, 256, 261, 262)
    assert info.turn_end_token_id == 260


def test_a_vocabulary_without_the_familys_ends_is_said(folder: Path) -> None:
    rename_token(folder, "<|stop|>", "<|a|>")
    assert assumptions(folder) == ""
    rename_token(folder, "<|endofturn|>", "<|b|>")
    info = read_checkpoint(folder)
    assert info.stop_token_ids == (256,)
    assert "neither <|endofturn|> nor <|stop|> is a token" in "\n".join(info.assumptions)


def test_holes_in_the_vocabulary_are_listed(folder: Path) -> None:
    def forget(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {t: i for t, i in vocabulary.items() if i != 40}

    change_json(folder / "tokenizer.json", forget)
    info = read_checkpoint(folder)
    assert (info.tokenizer_size, info.missing_token_ids) == (264, (40,))


def test_a_token_beyond_the_models_rows_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][-1], "id": 272, "content": "<|far|>"}
    )
    path.write_text(json.dumps(tokenizer))
    assert "the tokenizer has id 272, the model only 272 rows" in refusal(folder)


# rope


def test_llama3_scaling_is_read(folder: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    with_value(folder, "config.json", "text_config", "rope_scaling", value=scaling)
    assert read_checkpoint(folder).text.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    without(folder, "config.json", "text_config", "rope_scaling", "factor")
    assert "'rope_scaling': the key 'factor' is missing" in refusal(folder)


def test_rope_parameters_of_newer_files(folder: Path) -> None:
    without(folder, "config.json", "text_config", "rope_theta")
    parameters = {"rope_type": "default", "rope_theta": 5000.0}
    with_value(folder, "config.json", "text_config", "rope_parameters", value=parameters)
    text = read_checkpoint(folder).text
    assert (text.rope_theta, text.rope_scaling) == (5000.0, None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"rope_type": "yarn", "factor": 2}, "type 'yarn' is not supported"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("linear", "must be an object"),
    ],
)
def test_other_rope_kinds_are_refused(folder: Path, value: object, reason: str) -> None:
    with_value(folder, "config.json", "text_config", "rope_scaling", value=value)
    assert reason in refusal(folder)


# sampling


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.6, "repetition_penalty": 1.0},
            SamplingDefaults(temperature=0.5, top_p=0.6, repetition_penalty=1.0),
        ),
        ({"top_k": 50, "temperature": 0}, SamplingDefaults(temperature=0.0, top_k=50)),
        ({"top_k": -1}, SamplingDefaults(top_k=0)),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0.0)),
    ],
)
def test_sampling_defaults(
    folder: Path, values: dict[str, Any], expected: SamplingDefaults
) -> None:
    change_json(folder / "generation_config.json", lambda config: config.update(values))
    assert read_checkpoint(folder).sampling == expected


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}], ids=str)
def test_impossible_sampling_is_refused(folder: Path, values: dict[str, Any]) -> None:
    change_json(folder / "generation_config.json", lambda config: config.update(values))
    assert "generation_config.json: " in refusal(folder)


# what is not served


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": ["HCXVisionV2ForCausalLM"], "model_type": "vlm"}, "'vlm'"),
        ({"architectures": [], "model_type": "hyperclovax"}, "'hyperclovax'"),
        ({"mm_projector_type": "honeybee"}, "'honeybee' is not supported"),
    ],
)
def test_other_models_are_refused_by_name(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    change_json(folder / "config.json", lambda config: config.update(changes))
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("text_config", "model_type"), "hyperclovax", "MuP multipliers"),
        (("text_config", "model_type"), "gpt2", "'gpt2'"),
        (("text_config", "hidden_act"), "gelu", "'hidden_act' 'gelu'"),
        (("text_config", "num_key_value_heads"), 3, "cannot share 3"),
        (("text_config", "head_dim"), 15, "'head_dim' must be even"),
        (("text_config", "hidden_size"), "64", "must be a whole number"),
        (("text_config", "rms_norm_eps"), 0, "must be a positive number"),
        (("vision_config", "model_type"), "clip_vision_model", "SigLIP is"),
        (("vision_config", "hidden_act"), "quick_gelu", "'quick_gelu'"),
        (("vision_config", "num_attention_heads"), 5, "5 heads do not divide 48"),
    ],
)
def test_values_that_are_not_implemented_are_refused(
    folder: Path, path: tuple[str, ...], value: object, reason: str
) -> None:
    with_value(folder, "config.json", *path, value=value)
    assert reason in refusal(folder)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_steps_left_out_of_preprocessing_are_refused(folder: Path, step: str) -> None:
    with_value(folder, "preprocessor_config.json", step, value=False)
    assert f"'{step}' false is not supported" in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert file in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1', "\udcff"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_broken_json_is_one_line(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert file in refusal(folder)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_memory_figures(folder: Path) -> None:
    info = read_checkpoint(folder)
    assert info.parameter_bytes("bfloat16") * 2 == info.parameter_bytes("float32")
    # 2 layers x (keys, values) x 2 heads of 16 x 4 bytes
    assert info.kv_bytes_per_token("float32") == 512


def test_reading_a_checkpoint_imports_no_torch(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from server.model.config import read_checkpoint; "
        f"read_checkpoint(Path({str(folder)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
