"""Writes the trained model as a checkpoint in the official layout: settings, tokenizer, weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.demo_model.labels import CODE_LENGTH, SPEC, code_book
from tools.demo_model.network import Dimensions
from tools.demo_model.template import CHAT_TEMPLATE
from tools.demo_model.tokenizer import SPECIAL_TOKENS, TextCodec

CONTEXT = 2048
TOWER_NAMES = {
    "tower.patch_weight": "embeddings.patch_embedding.weight",
    "tower.patch_bias": "embeddings.patch_embedding.bias",
    "tower.position": "embeddings.position_embedding.weight",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def config(size: Dimensions, codec: TextCodec) -> dict[str, Any]:
    end = codec.ids["<|endoftext|>"]
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["HCXVisionForCausalLM"],
        "model_type": "hyperclovax_vlm",
        "torch_dtype": "bfloat16",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": codec.size,
            "hidden_size": size.hidden_size,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": size.norm_eps,
            "rope_theta": size.rope_theta,
            "max_position_embeddings": CONTEXT,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **ends,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": size.tower_width,
            "intermediate_size": size.tower_inner,
            "num_hidden_layers": size.tower_layers + 1,
            "num_attention_heads": size.tower_heads,
            "num_channels": 3,
            "image_size": size.image_size,
            "patch_size": size.patch_size,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        },
        "mm_projector_type": "cabstractor",
        "proj_pos_emb": True,
        "proj_prenorm": False,
        "use_nth_layer": -2,
        "tie_word_embeddings": True,
        "image_token_id": codec.ids["<|dummy3|>"],
        "video_token_id": codec.ids["<|_unuse_missing_100270|>"],
        "ignore_index": -100,
        "decoder_max_length": CONTEXT,
        **vision_settings(),
        **ends,
    }


def vision_settings() -> dict[str, Any]:
    """What both config.json and preprocessor_config.json say about tiles and tokens."""
    return {
        "anyres": True,
        "unpad": SPEC.unpad,
        "max_num_grids": max(
            (height * width) // SPEC.tile_size**2 for height, width in SPEC.candidate_resolutions
        ),
        "use_1x1_grid": True,
        "possible_resolutions": [list(pair) for pair in SPEC.candidate_resolutions],
        "num_queries_vis_abstractor_image": SPEC.image_queries,
        "num_queries_vis_abstractor_video_slow": SPEC.video_slow_queries,
        "num_queries_vis_abstractor_video_fast": SPEC.video_fast_queries,
        "first_last_frames_slow": SPEC.first_last_frames_slow,
    }


def preprocessor_config(size: Dimensions) -> dict[str, Any]:
    side = SPEC.tile_size
    return {
        "processor_class": "HCXVisionProcessor",
        "image_processor_type": "HCXVisionProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(SPEC.image_mean),
        "image_std": list(SPEC.image_std),
        "rescale_factor": SPEC.rescale_factor,
        "resample": SPEC.resample,
        "pad_to_square": SPEC.pad_to_square,
        "patch_size": size.patch_size,
        "max_image_cnt": SPEC.max_canvases,
        "num_queries_vis_abstractor": SPEC.image_queries,
        **vision_settings(),
    }


def tokenizer_config(codec: TextCodec) -> dict[str, Any]:
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endofturn|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "added_tokens_decoder": {
            str(codec.ids[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "chat_template": CHAT_TEMPLATE,
    }


def official_tensors(weights: Mapping[str, Tensor], size: Dimensions) -> dict[str, Tensor]:
    """The trained weights under the checkpoint's names; the tower's last layer is zeros."""
    tensors: dict[str, Tensor] = {}
    tower = "vision_model.vision_model."
    for name, value in weights.items():
        if "probe" in name:
            continue
        if name == "newline":
            tensors["image_newline"] = value
        elif name in TOWER_NAMES:
            if name == "tower.patch_weight":
                value = value.view(-1, 3, size.patch_size, size.patch_size)
            tensors[tower + TOWER_NAMES[name]] = value
        elif name.startswith("tower."):
            tensors[tower + "encoder." + name.removeprefix("tower.")] = value
        elif name.startswith("projector."):
            tensors["mm_projector." + name.removeprefix("projector.")] = value
        elif name.startswith("decoder."):
            parts = name.removeprefix("decoder.").split(".")
            if len(parts) > 3 and parts[2] in ATTENTION:
                parts.insert(2, "self_attn")
            elif len(parts) > 3 and parts[2] in ("gate_proj", "up_proj", "down_proj"):
                parts.insert(2, "mlp")
            tensors["language_model.model." + ".".join(parts)] = value
        else:
            raise ValueError(f"no place for {name}")
    unused = f"{tower}encoder.layers.{size.tower_layers}."
    first = f"{tower}encoder.layers.0."
    for name in [name for name in tensors if name.startswith(first)]:
        tensors[unused + name.removeprefix(first)] = torch.zeros_like(tensors[name])
    for name in ("weight", "bias"):
        tensors[f"{tower}post_layernorm.{name}"] = torch.zeros(size.tower_width)
    return {
        name: value.detach().to(torch.bfloat16).contiguous().clone()
        for name, value in tensors.items()
    }


def clean_readout(weights: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """Removes from the projector's last layer what lies outside the labels' directions.

    The first phase does not look there, and the decoder learnt from features that have nothing
    there.
    """
    book = torch.from_numpy(code_book(hidden_size))
    keep = book.T @ book / CODE_LENGTH**2
    result = dict(weights)
    for part in ("weight", "bias"):
        name = f"projector.readout.2.{part}"
        result[name] = keep @ weights[name]
    return result


def write_settings(folder: Path, codec: TextCodec, size: Dimensions) -> None:
    """Everything but tokenizer.json and the weights."""
    files = {
        "config.json": config(size, codec),
        "preprocessor_config.json": preprocessor_config(size),
        "tokenizer_config.json": tokenizer_config(codec),
        "generation_config.json": {"_from_model_config": True, "do_sample": False},
    }
    for name, values in files.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write(folder: Path, tokenizer_json: Path, weights: Mapping[str, Tensor]) -> None:
    """The whole checkpoint; the weights appear last and at once."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = TextCodec(tokenizer_json)
    size = Dimensions(vocab_size=codec.size)
    if tokenizer_json.parent != folder:
        shutil.copyfile(tokenizer_json, folder / "tokenizer.json")
    write_settings(folder, codec, size)
    part = folder / "model.safetensors.part"
    save_file(official_tensors(weights, size), part, metadata={"format": "pt"})
    part.chmod(0o644)  # as the other files: whoever may read those may load the model
    part.replace(folder / "model.safetensors")


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """The best there is in a training folder: the joint run, else tower and decoder joined."""
    joint = folder / "joint.pt"
    if joint.exists():
        state = torch.load(joint, weights_only=True)["optimizer"]
        return dict(state["average"] or state["master"])
    codec = TextCodec(folder / "tokenizer.json")
    return merged_weights(folder, codec.size)


def merged_weights(folder: Path, vocab_size: int) -> dict[str, Tensor]:
    """The tower of the first phase, cleaned, and the decoder that learnt beside it."""
    size = Dimensions(vocab_size=vocab_size)
    decoder = torch.load(folder / "decoder.pt", weights_only=True)["optimizer"]
    tower = torch.load(folder / "tower.pt", weights_only=True)["optimizer"]
    weights = dict(decoder["average"] or decoder["master"])
    for name, value in (tower["average"] or tower["master"]).items():
        if not name.startswith(("decoder.", "newline")):
            weights[name] = value
    return clean_readout(weights, size.hidden_size)
