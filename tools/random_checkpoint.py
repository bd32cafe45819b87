"""Write a checkpoint of this architecture with random weights, complete and in the official layout.

    python tools/random_checkpoint.py OUT --size tiny|real [--layout main|v0.1.0|text]

For tests, for measurements at the real size (3.72 B parameters), and to try the server without the
official weights. The tensor names and shapes are listed here on their own, from the published
format and not from the server's modules, so that each checks the other. A tensor's values depend
on the seed and its name alone, and one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DTYPES = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
LAYOUTS = ("main", "v0.1.0", "text")
PROJECTORS = ("cabstractor", "linear", "mlp", "inverted_mlp")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|_unuse_missing_100270|>",
    "<|dummy3|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|stop|>",
    "<|endofturn|>",
)
OFFICIAL_IDS = (100257, 100270, 100271, 100272, 100273, 100274, 100275)
NUM_BYTE_TOKENS = 256

CHAT_TEMPLATE = """\
{%- macro block(role, text) -%}
{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>' -}}
{%- endmacro -%}
{%- macro part(role, item, end) -%}
{%- if item is string -%}
{{- block(role, item) + end + '\\n' -}}
{%- elif item.type == 'text' -%}
{{- block(role, item.text) + end + '\\n' -}}
{%- elif item.type == 'image' -%}
{{- block(role + ' (mime)',
    {'type': 'image/jpeg', 'filename': item.filename | default('', true)} | tojson) + '\\n' -}}
{{- block(role + ' (vector)', '<|dummy3|>') + '\\n' -}}
{{- block('image/aux', '다음 중 ocr은 사진에서 검출된 글자이고, lens_keyword는 사진에서 추출된 '
    + 'keyword와 bbox 위치입니다. bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 형태입니다. '
    + '참고하여 답변하세요. ' + {
        'ocr': item.ocr | default('', true),
        'lens_keywords': item.lens_keywords | default('', true),
        'lens_local_keywords': item.lens_local_keywords | default('', true),
    } | tojson) + '\\n' -}}
{%- elif item.type == 'video' -%}
{{- block(role + ' (mime)',
    {'type': 'video/mp4', 'filename': item.filename | default('', true)} | tojson) + '\\n' -}}
{{- block(role + ' (vector)', '<|_unuse_missing_100270|>') + '\\n' -}}
{{- block('image/aux', '다음 중 lens_keyword는 비디오에서 추출된 keyword와 bbox 위치입니다. '
    + 'bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 형태입니다. 참고하여 답변하세요. ' + {
        'lens_keywords': item.lens_keywords | default('', true),
        'lens_local_keywords': item.lens_local_keywords | default('', true),
        'speech_to_text': item.speech_to_text | default('', true),
    } | tojson) + '\\n' -}}
{%- else -%}
{{- raise_exception('unknown content part') -}}
{%- endif -%}
{%- endmacro -%}
{{- block('tool_list', '') + '\\n' -}}
{%- if messages[0].role != 'system' -%}
{{- block('system', '') + '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set end = '<|endofturn|>' if message.role == 'assistant' else '' -%}
{%- if message.content is string or message.content is mapping -%}
{{- part(message.role, message.content, end) -}}
{%- else -%}
{%- for item in message.content -%}
{{- part(message.role, item, end) -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a checkpoint. Byte tokens and special tokens always fit `tokenizer_size`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tokenizer_size: int
    max_position_embeddings: int
    rope_theta: float
    special_ids: tuple[int, ...]
    image_size: int
    patch_size: int
    vision_hidden_size: int
    vision_layers: int
    vision_heads: int
    vision_intermediate_size: int
    image_queries: int
    fast_queries: int
    max_num_grids: int

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


SIZES = {
    "tiny": Dimensions(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=272,
        tokenizer_size=264,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        special_ids=tuple(range(256, 263)),
        image_size=56,
        patch_size=7,
        vision_hidden_size=48,
        vision_layers=3,
        vision_heads=4,
        vision_intermediate_size=80,
        image_queries=16,
        fast_queries=4,
        max_num_grids=4,
    ),
    "real": Dimensions(
        hidden_size=3072,
        num_layers=32,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=7168,
        vocab_size=110_592,
        tokenizer_size=110_524,
        max_position_embeddings=16_384,
        rope_theta=100_000_000.0,
        special_ids=OFFICIAL_IDS,
        image_size=378,
        patch_size=14,
        vision_hidden_size=1152,
        vision_layers=27,
        vision_heads=16,
        vision_intermediate_size=4304,
        image_queries=81,
        fast_queries=9,
        max_num_grids=9,
    ),
}


def write_checkpoint(
    out: Path,
    *,
    size: Dimensions | None = None,
    layout: str = "main",
    shards: int = 1,
    dtype: str = "float32",
    projector: str = "cabstractor",
    is_tied: bool = True,
    has_prenorm: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> Path:
    """Write a whole checkpoint folder (`SIZES["tiny"]` by default) and return it."""
    size = size or SIZES["tiny"]
    out.mkdir(parents=True, exist_ok=True)
    config = model_config(
        size,
        layout=layout,
        dtype=dtype,
        projector=projector,
        is_tied=is_tied,
        has_prenorm=has_prenorm,
        has_bias=has_bias,
    )
    _write_json(out / "config.json", config)
    if layout != "text":
        _write_json(out / "preprocessor_config.json", preprocessor_config(size, layout=layout))
    _write_json(
        out / "generation_config.json",
        {"_from_model_config": True, "transformers_version": "4.48.2"},
    )
    write_tokenizer(out, size)
    shapes = tensor_shapes(config)
    _write_weights(out, shapes, shards=shards, dtype=dtype, seed=seed)
    return out


def model_config(
    size: Dimensions,
    *,
    layout: str,
    dtype: str,
    projector: str,
    is_tied: bool,
    has_prenorm: bool,
    has_bias: bool,
) -> dict[str, Any]:
    """`config.json` of one of the layouts."""
    end_of_text, video, image = size.special_ids[:3]
    text: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has_bias,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": size.max_position_embeddings,
        "mlp_bias": has_bias,
        "num_attention_heads": size.num_heads,
        "num_hidden_layers": size.num_layers,
        "num_key_value_heads": size.num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": size.rope_theta,
        "tie_word_embeddings": is_tied,
        "torch_dtype": dtype,
        "vocab_size": size.vocab_size,
    }
    if layout == "text":
        return text
    is_main = layout == "main"
    queries = "num_queries_vis_abstractor"
    return {
        "architectures": ["HCXVisionForCausalLM"],
        "model_type": "hyperclovax_vlm",
        "anyres": True,
        "first_last_frames_slow": False,
        "image_token_id" if is_main else "img_start_id": image,
        **({"video_token_id": video} if is_main else {}),
        "max_num_grids": size.max_num_grids,
        "mm_projector_type": projector,
        f"{queries}_image" if is_main else queries: size.image_queries,
        f"{queries}_video_fast": size.fast_queries,
        f"{queries}_video_slow": size.image_queries,
        "possible_resolutions": [],
        "proj_pos_emb": True,
        "proj_prenorm": has_prenorm,
        "text_config" if is_main else "language_config": text,
        "tie_word_embeddings": is_tied,
        "torch_dtype": dtype,
        "unpad": True,
        "use_1x1_grid": True,
        "use_nth_layer": -2,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": size.vision_hidden_size,
            "image_size": size.image_size,
            "intermediate_size": size.vision_intermediate_size,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": size.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": size.vision_layers,
            "patch_size": size.patch_size,
        },
    }


def preprocessor_config(size: Dimensions, *, layout: str) -> dict[str, Any]:
    """`preprocessor_config.json`, with the candidate list written out as in the official file."""
    side, grids = size.image_size, range(1, size.max_num_grids + 1)
    queries = "num_queries_vis_abstractor"
    return {
        "image_processor_type": "HCXVisionProcessor",
        "anyres": True,
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "first_last_frames_slow": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_cnt": 12,
        "max_num_grids": size.max_num_grids,
        f"{queries}_image" if layout == "main" else queries: size.image_queries,
        f"{queries}_video_fast": size.fast_queries,
        f"{queries}_video_slow": size.image_queries,
        "pad_to_square": True,
        "patch_size": size.patch_size,
        "possible_resolutions": [
            [side * rows, side * columns]
            for rows in grids
            for columns in grids
            if rows * columns <= size.max_num_grids
        ],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
        "unpad": True,
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official file of a configuration, by its official name."""
    text = config.get("text_config") or config.get("language_config")
    if text is None:
        return dict(_text_shapes(config, ""))
    vision = config["vision_config"]
    shapes = dict(_text_shapes(text, "language_model."))
    shapes |= _tower_shapes(vision, "vision_model.vision_model.")
    shapes |= _projector_shapes(config, vision, int(text["hidden_size"]))
    shapes["image_newline"] = (text["hidden_size"],)
    return shapes


def _text_shapes(text: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, rows = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    query_size = text["num_attention_heads"] * text["head_dim"]
    kv_size = text["num_key_value_heads"] * text["head_dim"]
    yield f"{prefix}model.embed_tokens.weight", (rows, hidden)
    for index in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{index}."
        for name, outputs, inputs, has_bias in (
            ("self_attn.q_proj", query_size, hidden, text["attention_bias"]),
            ("self_attn.k_proj", kv_size, hidden, text["attention_bias"]),
            ("self_attn.v_proj", kv_size, hidden, text["attention_bias"]),
            ("self_attn.o_proj", hidden, query_size, text["attention_bias"]),
            ("mlp.gate_proj", inner, hidden, text["mlp_bias"]),
            ("mlp.up_proj", inner, hidden, text["mlp_bias"]),
            ("mlp.down_proj", hidden, inner, text["mlp_bias"]),
        ):
            yield f"{layer}{name}.weight", (outputs, inputs)
            if has_bias:
                yield f"{layer}{name}.bias", (outputs,)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield f"{prefix}model.norm.weight", (hidden,)
    if not text["tie_word_embeddings"]:
        yield f"{prefix}lm_head.weight", (rows, hidden)


def _tower_shapes(vision: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (patches, width),
        **_norm("post_layernorm", width),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **_linear("head.attention.out_proj", width, width),
        **_norm("head.layernorm", width),
        **_linear("head.mlp.fc1", inner, width),
        **_linear("head.mlp.fc2", width, inner),
    }
    for index in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{index}."
        shapes |= _norm(f"{layer}layer_norm1", width) | _norm(f"{layer}layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", inner, width)
        shapes |= _linear(f"{layer}mlp.fc2", width, inner)
    return {prefix + name: shape for name, shape in shapes.items()}


def _projector_shapes(
    config: Mapping[str, Any], vision: Mapping[str, Any], hidden: int
) -> dict[str, tuple[int, ...]]:
    width, kind = vision["hidden_size"], config["mm_projector_type"]
    if kind == "linear":
        return _linear("mm_projector", hidden, width)
    if kind != "cabstractor":
        inner = width if kind == "mlp" else 2 * width
        return _linear("mm_projector.fc1", inner, width) | _linear(
            "mm_projector.fc2", hidden, inner
        )
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {"mm_projector.pos_emb": (1, patches, width)}
    if config["proj_prenorm"]:
        shapes |= _norm("mm_projector.prenorm", width)
    squeezed = width // 4
    for stage, block in ((stage, block) for stage in (0, 2) for block in (1, 2, 3)):
        prefix = f"mm_projector.net.{stage}.b{block}."
        for conv, shape in (
            ("conv1", (width, width, 1, 1)),
            ("conv2", (width, 1, 3, 3)),
            ("conv3", (width, width, 1, 1)),
        ):
            shapes[f"{prefix}{conv}.conv.weight"] = shape
            shapes |= _norm(f"{prefix}{conv}.bn", width)
        shapes[f"{prefix}se.fc1.weight"] = (squeezed, width, 1, 1)
        shapes[f"{prefix}se.fc1.bias"] = (squeezed,)
        shapes[f"{prefix}se.fc2.weight"] = (width, squeezed, 1, 1)
        shapes[f"{prefix}se.fc2.bias"] = (width,)
    return (
        shapes
        | _linear("mm_projector.readout.0", hidden, width)
        | _linear("mm_projector.readout.2", hidden, hidden)
    )


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Values that keep activations near one in size: scaled by fan-in; norms around one."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        is_scale = name.endswith(".weight")
        return values.mul_(0.1).add_(1.0 if is_scale else 0.0)
    if "embed_tokens" in name or "position_embedding" in name or "pos_emb" in name:
        return values.mul_(0.5)
    return values.mul_(1 / math.sqrt(math.prod(shape[1:])))


def _write_weights(
    out: Path, shapes: Mapping[str, tuple[int, ...]], *, shards: int, dtype: str, seed: int
) -> None:
    names = sorted(shapes)
    item_bytes = DTYPES[dtype][0].itemsize
    total = sum(math.prod(shape) for shape in shapes.values()) * item_bytes
    files: list[list[str]] = [[] for _ in range(shards)]
    written = 0
    for name in names:
        files[min(shards - 1, written * shards // total)].append(name)
        written += math.prod(shapes[name]) * item_bytes
    if shards == 1:
        _write_safetensors(out / "model.safetensors", names, shapes, dtype=dtype, seed=seed)
        return
    weight_map = {}
    for index, held in enumerate(files):
        file_name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        _write_safetensors(out / file_name, held, shapes, dtype=dtype, seed=seed)
        weight_map |= dict.fromkeys(held, file_name)
    index_values = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index_values)


def _write_safetensors(
    path: Path,
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    seed: int,
) -> None:
    """One file, tensor by tensor: safetensors' own writer wants them all in memory."""
    torch_dtype, label = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + math.prod(shapes[name]) * torch_dtype.itemsize
        header[name] = {
            "dtype": label,
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            values = random_tensor(name, shapes[name], seed=seed).to(torch_dtype)
            file.write(values.flatten().view(torch.uint8).numpy().data)


def write_tokenizer(out: Path, size: Dimensions) -> None:
    """`tokenizer.json` and `tokenizer_config.json`: one token a byte, and the family's own.

    Every other id below `tokenizer_size` is an entry that no text ever encodes to.
    """
    specials = dict(zip(size.special_ids, SPECIAL_TOKENS, strict=True))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {}
    for token_id in range(size.tokenizer_size):
        if token_id in specials:
            vocabulary[specials[token_id]] = token_id
        elif token_id < NUM_BYTE_TOKENS:
            vocabulary[alphabet[token_id]] = token_id
        else:
            vocabulary[f"<|unused_{token_id}|>"] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    end_of_text = SPECIAL_TOKENS[0]
    _write_json(
        out / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(token_id): {"content": token, "special": True}
                for token_id, token in specials.items()
            },
            "bos_token": end_of_text,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": end_of_text,
            "model_max_length": size.max_position_embeddings,
            "pad_token": end_of_text,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": end_of_text,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layout", choices=LAYOUTS, default="main")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--projector", choices=PROJECTORS, default="cabstractor")
    parser.add_argument("--untied", action="store_true", help="write an lm_head of its own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(
        arguments.out,
        size=SIZES[arguments.size],
        layout=arguments.layout,
        shards=arguments.shards,
        dtype=arguments.dtype,
        projector=arguments.projector,
        is_tied=not arguments.untied,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
