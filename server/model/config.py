"""What a checkpoint's metadata says, as frozen values.

Reads the JSON files and the headers of the weight files; imports no torch, so that the HTTP
process and `check` can use it. Where a key is missing the value is either assumed, and the
assumption recorded, or the checkpoint is refused with the key's name: nothing is guessed silently.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.core import SamplingDefaults, VisionSpec
from server.errors import CheckpointError
from server.model.files import Keys, read_json, read_json_if_there
from server.model.tensors import (
    DTYPE_BYTES,
    RevisionLayout,
    TensorEntry,
    read_tensor_entries,
    used_entries,
)

VISION_ARCHITECTURE = "HCXVisionForCausalLM"
TEXT_ARCHITECTURE = "LlamaForCausalLM"
PROJECTOR_KINDS = ("cabstractor", "linear", "mlp", "inverted_mlp")

IMAGE_TOKEN = "<|dummy3|>"
VIDEO_TOKEN = "<|_unuse_missing_100270|>"
TURN_END_TOKEN = "<|im_end|>"
STOP_TOKENS = ("<|endofturn|>", "<|stop|>", "<|endoftext|>")

CONTEXT_OF_MODEL_CARD = 16_384
MAX_RESAMPLE = 5  # PIL.Image.Resampling.HAMMING, the last one

EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Names that the first revision, or the remote code's GPT-2 heritage, used for Llama's keys.
TEXT_KEYS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
}


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder. `embedding_rows` and `logits_rows` may be padded beyond the vocabulary."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    embedding_rows: int
    logits_rows: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    attention_bias: bool
    mlp_bias: bool
    is_tied: bool


@dataclass(frozen=True, slots=True)
class VisionTowerConfig:
    """The SigLIP encoder. `num_layers_used` of its `num_layers` are run: the rest is not built."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    num_layers: int
    num_layers_used: int
    num_heads: int
    intermediate_size: int
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"]
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_parts(self) -> int:
        """Parts of a tile's way that take about as long: the layers, and the projector as one."""
        return self.num_layers_used + 1


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """`kind` is the checkpoint's `mm_projector_type`, a key of `PROJECTORS`."""

    kind: str
    channels: int
    hidden_size: int
    num_patches: int
    pos_emb: bool = True
    prenorm: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Everything the server knows of a checkpoint before its weights are loaded.

    `tower`, `projector` and `vision` are all None for a text checkpoint, else all set.
    `stop_token_ids` never contains `turn_end_token_id` (`<|im_end|>`): whether that ends an answer
    depends on the request, because a tool call goes on after it.
    """

    path: Path
    revision_layout: RevisionLayout
    text: TextConfig
    tower: VisionTowerConfig | None
    projector: ProjectorConfig | None
    vision: VisionSpec | None
    dtype: str
    context_length: int
    tokenizer_size: int
    missing_token_ids: tuple[int, ...]
    """Ids below `tokenizer_size` that no token has."""
    stop_token_ids: tuple[int, ...]
    turn_end_token_id: int | None
    sampling: SamplingDefaults
    num_parameters: int
    """Those that are loaded: unused tensors are not counted."""
    assumptions: tuple[str, ...]

    def parameter_bytes(self, dtype: str) -> int:
        """Memory the weights take at a serving dtype."""
        return self.num_parameters * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Memory the keys and values of one token take, over all layers."""
        per_layer = 2 * self.text.num_kv_heads * self.text.head_dim
        return self.text.num_layers * per_layer * DTYPE_BYTES[dtype]


def read_checkpoint(path: Path) -> CheckpointInfo:
    """Read and judge a checkpoint folder's metadata."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: config.json is missing")
    config = read_json(path / "config.json")
    layout, text_values = _text_section(config, str(path / "config.json"))
    assumptions: list[str] = []
    top = Keys([("config.json", config)], assumptions)
    section = "config.json" if layout == "text" else f"config.json: {_section_name(layout)}"
    text_keys = Keys([(section, text_values)], assumptions)
    entries = read_tensor_entries(path, layout)
    tokens = _read_tokens(path)

    text = _read_text(text_keys, entries, top)
    too_large = max(tokens.values())
    if too_large >= text.embedding_rows:
        raise CheckpointError(
            f"{path}: the tokenizer has id {too_large}, the model only {text.embedding_rows} rows"
        )
    tower = projector = vision = None
    if layout != "text":
        tower = _read_tower(top)
        projector = _read_projector(top, tower, text, entries)
        processor = [
            (name, values)
            for name in ("preprocessor_config.json", "processor_config.json")
            if (values := read_json_if_there(path / name))
        ]
        both = Keys([*processor, ("config.json", config)], assumptions)
        vision = _read_vision(both, tower, projector, tokens)
    for part in (text, tower):
        if part is not None and part.num_layers > len(entries):
            raise CheckpointError(
                f"{path}: config.json has {part.num_layers} layers in one part, the weights have "
                f"{len(entries)} tensors in all"
            )
    used = used_entries(
        entries,
        first_unused_tower_layer=tower.num_layers_used if tower else 0,
        num_tower_layers=tower.num_layers if tower else 0,
    )
    generation = read_json_if_there(path / "generation_config.json")
    turn_end = tokens.get(TURN_END_TOKEN)
    if not any(token in tokens for token in STOP_TOKENS[:2]):
        top.note(
            f"tokenizer.json: neither {STOP_TOKENS[0]} nor {STOP_TOKENS[1]} is a token: "
            "answers end at the configs' eos ids"
        )
    return CheckpointInfo(
        path=path,
        revision_layout=layout,
        text=text,
        tower=tower,
        projector=projector,
        vision=vision,
        dtype=_stored_dtype(used),
        context_length=_context_length(text_keys, layout),
        tokenizer_size=too_large + 1,
        missing_token_ids=tuple(sorted(set(range(too_large + 1)) - set(tokens.values()))),
        stop_token_ids=_stop_ids(
            tokens, [config, text_values, generation], turn_end, logits_rows=text.logits_rows
        ),
        turn_end_token_id=turn_end,
        sampling=_read_sampling(Keys([("generation_config.json", generation)])),
        num_parameters=sum(entry.num_elements for entry in used.values()),
        assumptions=tuple(assumptions),
    )


def _section_name(layout: RevisionLayout) -> str:
    return "text_config" if layout == "main" else "language_config"


def _text_section(
    config: Mapping[str, Any], where: str
) -> tuple[RevisionLayout, Mapping[str, Any]]:
    """Which layout this is, and the object with the decoder's keys; refuses other models."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    is_vision = VISION_ARCHITECTURE in architectures or (
        not architectures and model_type == "hyperclovax_vlm"
    )
    if not is_vision:
        if TEXT_ARCHITECTURE in architectures or (not architectures and model_type == "llama"):
            return "text", config
        name = ", ".join(map(str, architectures)) or "no architecture named"
        raise CheckpointError(
            f"{where}: {name} (model type {model_type!r}) is not supported; supported are "
            f"{VISION_ARCHITECTURE} and {TEXT_ARCHITECTURE}"
        )
    layout: RevisionLayout = "v0.1.0"
    if config.get("text_config") is not None or config.get("language_config") is None:
        layout = "main"
    section = config.get(_section_name(layout))
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: the key '{_section_name(layout)}' is missing")
    text_type = section.get("model_type", "llama")
    if text_type != "llama":
        why = " (its MuP multipliers are not implemented)" if text_type == "hyperclovax" else ""
        raise CheckpointError(
            f"{where}: a language model of type {text_type!r} is not supported{why}; only 'llama'"
        )
    return layout, section


def _read_text(keys: Keys, entries: Mapping[str, TensorEntry], top: Keys) -> TextConfig:
    hidden_size = keys.integer(*TEXT_KEYS["hidden_size"])
    num_heads = keys.integer(*TEXT_KEYS["num_attention_heads"])
    num_kv_heads = keys.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key/value heads"
        )
    if not keys.has("head_dim") and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: 'head_dim' is missing and {num_heads} heads do not divide {hidden_size}"
        )
    head_dim = keys.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: 'head_dim' must be even, not {head_dim}")
    activation = keys.text("hidden_act", default="silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: 'hidden_act' {activation!r} is not supported: silu is")
    rope_theta, rope_scaling = _read_rope(keys)
    vocab_size = keys.integer("vocab_size")
    rows = (
        keys.integer("padded_vocab_size", minimum=vocab_size)
        if keys.has("padded_vocab_size")
        else vocab_size
    )
    return TextConfig(
        hidden_size=hidden_size,
        num_layers=keys.integer(*TEXT_KEYS["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        embedding_rows=_rows(keys, entries, EMBEDDING, vocab_size, rows),
        logits_rows=_rows(keys, entries, HEAD if HEAD in entries else EMBEDDING, vocab_size, rows),
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias=keys.flag("attention_bias", default=False),
        mlp_bias=keys.flag("mlp_bias", default=False),
        is_tied=_is_tied(keys, entries, top),
    )


def _rows(
    keys: Keys, entries: Mapping[str, TensorEntry], name: str, vocab_size: int, padded: int
) -> int:
    """Rows of a vocabulary matrix: as many as the file has, where that is no fewer than ids."""
    entry = entries.get(name)
    if entry is None or not entry.shape or entry.shape[0] < vocab_size:
        return padded
    rows = entry.shape[0]
    if rows not in (vocab_size, padded):
        keys.note(
            f"{entry.stored_name} has {rows} rows for a vocabulary of {vocab_size}: "
            "the rest are taken for padding"
        )
    return rows


def _is_tied(keys: Keys, entries: Mapping[str, TensorEntry], top: Keys) -> bool:
    """A head in the file is used whatever the config says; its absence means tied weights.

    Unless the config only says that they are not: then strict loading reports the head as missing.
    """
    if HEAD in entries:
        return False
    own = keys.flag("tie_word_embeddings", default=True)
    if not own and top.has("tie_word_embeddings") and top.flag("tie_word_embeddings"):
        keys.note(
            f"{keys.sources[0][0]}: 'tie_word_embeddings' is false, but config.json's own is true "
            "and there is no head among the weights: tied"
        )
        return True
    return own


def _read_rope(keys: Keys) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the two older keys."""
    found = keys.find("rope_parameters") or keys.find("rope_scaling")
    where, values = found or ("", {})
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must be an object, not {values!r}")
    rope = Keys([(where, values), *keys.sources], keys.assumptions)
    rope_theta = (rope if "rope_theta" in values else keys).number("rope_theta")
    partial = rope.find("partial_rotary_factor")
    if partial is not None and partial[1] != 1:
        raise CheckpointError(f"{partial[0]} {partial[1]!r} is not supported: only 1 is")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return rope_theta, None
    if kind != "llama3":
        raise CheckpointError(f"{where}: type {kind!r} is not supported: default and llama3 are")
    own = Keys([(where, values)], keys.assumptions)
    scaling = Llama3Scaling(
        factor=own.number("factor"),
        low_freq_factor=own.number("low_freq_factor"),
        high_freq_factor=own.number("high_freq_factor"),
        original_context=own.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"{where}: 'high_freq_factor' must be above 'low_freq_factor'")
    return rope_theta, scaling


def _context_length(keys: Keys, layout: RevisionLayout) -> int:
    default = None if layout == "text" else CONTEXT_OF_MODEL_CARD
    return keys.integer(*TEXT_KEYS["max_position_embeddings"], default=default)


def _read_tower(top: Keys) -> VisionTowerConfig:
    found = top.find("vision_config")
    if found is None or not isinstance(found[1], dict):
        raise CheckpointError("config.json: the key 'vision_config' is missing")
    keys = Keys([("config.json: vision_config", found[1])], top.assumptions)
    model_type = keys.text("model_type", default="siglip_vision_model")
    if "siglip" not in model_type:
        raise CheckpointError(
            f"config.json: a vision tower of type {model_type!r} is not supported: SigLIP is"
        )
    activation = keys.text("hidden_act", default="gelu_pytorch_tanh")
    if activation not in ("gelu_pytorch_tanh", "gelu"):
        raise CheckpointError(
            f"config.json: vision_config: 'hidden_act' {activation!r} is "
            "not supported: gelu_pytorch_tanh and gelu are"
        )
    hidden_size = keys.integer("hidden_size")
    num_heads = keys.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: vision_config: {num_heads} heads do not divide {hidden_size}"
        )
    num_layers = keys.integer("num_hidden_layers")
    tower = VisionTowerConfig(
        image_size=keys.integer("image_size"),
        patch_size=keys.integer("patch_size"),
        num_channels=keys.integer("num_channels", default=3),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_layers_used=_layers_used(top, num_layers),
        num_heads=num_heads,
        intermediate_size=keys.integer("intermediate_size"),
        hidden_act="gelu" if activation == "gelu" else "gelu_pytorch_tanh",
        layer_norm_eps=keys.number("layer_norm_eps", default=1e-6),
    )
    if tower.num_channels != 3 or tower.num_patches == 0:
        raise CheckpointError(
            "config.json: vision_config: three channels and at least one patch are needed"
        )
    return tower


def _layers_used(top: Keys, num_layers: int) -> int:
    """Layers to run for `use_nth_layer`, an index into Hugging Face's `hidden_states`.

    That list has the embeddings at index 0 and the state after n layers at index n.
    """
    nth = top.integer("use_nth_layer", default=-2, minimum=-(num_layers + 1))
    used = nth if nth >= 0 else num_layers + 1 + nth
    if used > num_layers:
        raise CheckpointError(
            f"config.json: 'use_nth_layer' is {nth}, but the tower has {num_layers} layers"
        )
    return used


def _read_projector(
    top: Keys,
    tower: VisionTowerConfig,
    text: TextConfig,
    entries: Mapping[str, TensorEntry],
) -> ProjectorConfig:
    kind = top.text("mm_projector_type", default="cabstractor")
    if kind not in PROJECTOR_KINDS:
        raise CheckpointError(
            f"config.json: 'mm_projector_type' {kind!r} is not supported: "
            f"{', '.join(PROJECTOR_KINDS)} are"
        )
    is_abstractor = kind == "cabstractor"
    if is_abstractor and math.isqrt(tower.num_patches) ** 2 != tower.num_patches:
        raise CheckpointError(f"config.json: {tower.num_patches} patches are not a square")
    return ProjectorConfig(
        kind=kind,
        channels=tower.hidden_size,
        hidden_size=text.hidden_size,
        num_patches=tower.num_patches,
        pos_emb=is_abstractor and _in_file(top, "proj_pos_emb", "mm_projector.pos_emb", entries),
        prenorm=is_abstractor
        and _in_file(top, "proj_prenorm", "mm_projector.prenorm.weight", entries),
    )


def _in_file(top: Keys, key: str, tensor: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether an optional part is there. The file is trusted; a config that disagrees is noted."""
    is_there = tensor in entries
    if top.has(key) and top.flag(key) != is_there:
        verb = "is" if is_there else "is not"
        top.note(
            f"config.json: '{key}' is {str(not is_there).lower()}, but {tensor} {verb} among the "
            "weights: the weights are trusted"
        )
    return is_there


def _read_vision(
    keys: Keys,
    tower: VisionTowerConfig,
    projector: ProjectorConfig,
    tokens: Mapping[str, int],
) -> VisionSpec:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if keys.has(step) and not keys.flag(step):
            raise CheckpointError(f"preprocessor_config.json: '{step}' false is not supported")
    tile_size = _tile_size(keys, tower)
    return VisionSpec(
        tile_size=tile_size,
        candidate_resolutions=_candidates(keys, tile_size),
        image_queries=_queries(
            keys,
            projector,
            "num_queries_vis_abstractor_image",
            "num_queries_vis_abstractor",
            default=81,
        ),
        video_slow_queries=_queries(
            keys, projector, "num_queries_vis_abstractor_video_slow", default=81
        ),
        video_fast_queries=_queries(
            keys, projector, "num_queries_vis_abstractor_video_fast", default=9
        ),
        first_last_frames_slow=keys.flag("first_last_frames_slow", default=False),
        max_canvases=keys.integer("max_image_cnt", default=12),
        image_token_id=_image_token_id(keys, tokens),
        video_token_id=_video_token_id(keys, tokens),
        pad_to_square=keys.flag("pad_to_square", default=True),
        unpad=keys.flag("unpad", default=True),
        image_mean=_colour(keys, "image_mean"),
        image_std=_colour(keys, "image_std"),
        rescale_factor=keys.number("rescale_factor", default=1 / 255),
        resample=_resample(keys),
    )


def _tile_size(keys: Keys, tower: VisionTowerConfig) -> int:
    """The side of a tile: the crop's, or the resizing's, or the tower's own.

    It may differ from the tower's as long as it gives the same patches (384 and 378 both give 27).
    """
    size = tower.image_size
    for name in ("crop_size", "size"):
        found = keys.find(name)
        if found is None:
            continue
        where, value = found
        sides = list(value.values()) if isinstance(value, dict) else [value]
        if len(set(map(str, sides))) != 1 or type(sides[0]) is not int:
            raise CheckpointError(f"{where} must be one whole number a side, not {value!r}")
        size = sides[0]
        break
    if size // tower.patch_size != tower.image_size // tower.patch_size:
        raise CheckpointError(
            f"preprocessor_config.json: tiles of {size} pixels do not give the patches that the "
            f"tower's position embedding has (image_size {tower.image_size})"
        )
    return size


def _queries(keys: Keys, projector: ProjectorConfig, *names: str, default: int) -> int:
    """Features a tile is pooled to. Only the C-Abstractor pools: others keep every patch."""
    if projector.kind != "cabstractor":
        return projector.num_patches
    queries = keys.integer(*names, default=default)
    if math.isqrt(queries) ** 2 != queries or queries > projector.num_patches:
        raise CheckpointError(
            f"'{names[0]}' is {queries}: a square number of at most {projector.num_patches} "
            "is needed"
        )
    return queries


def _candidates(keys: Keys, tile_size: int) -> tuple[tuple[int, int], ...]:
    """The canvases, as (height, width), that a picture may be cut from. None without anyres."""
    if not keys.flag("anyres", default=True):
        return ()
    found = keys.find("possible_resolutions")
    if found is None:
        max_grids = keys.integer("max_num_grids", default=9)
        allow_single = keys.flag("use_1x1_grid", default=True)
        return tuple(
            (tile_size * rows, tile_size * columns)
            for rows in range(1, max_grids + 1)
            for columns in range(1, max_grids + 1)
            if rows * columns <= max_grids and (allow_single or rows * columns > 1)
        )
    where, pairs = found
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(side) is int and side > 0 and side % tile_size == 0 for side in pair)
        ):
            raise CheckpointError(
                f"{where} must hold pairs of multiples of {tile_size}, not {pair!r}"
            )
    return tuple((height, width) for height, width in pairs)


def _resample(keys: Keys) -> int:
    filter_number = keys.integer("resample", default=3, minimum=0)
    if filter_number > MAX_RESAMPLE:
        raise CheckpointError(
            f"'resample' is {filter_number}: Pillow's filters are 0 to {MAX_RESAMPLE}"
        )
    return filter_number


def _colour(keys: Keys, name: str) -> tuple[float, float, float]:
    found = keys.find(name)
    if found is None:
        keys.note(f"preprocessor_config.json: the key '{name}' is missing: assumed 0.5 a channel")
        return (0.5, 0.5, 0.5)
    where, value = found
    is_list = isinstance(value, list) and len(value) == 3
    if not is_list or not all(type(part) in (int, float) for part in value):
        raise CheckpointError(f"{where} must be three numbers, not {value!r}")
    if name == "image_std" and not all(part > 0 for part in value):
        raise CheckpointError(f"{where} must be three positive numbers, not {value!r}")
    if name == "image_mean" and not all(0 <= part <= 1 for part in value):
        raise CheckpointError(f"{where} must be three numbers from 0 to 1, not {value!r}")
    red, green, blue = map(float, value)
    return red, green, blue


def _image_token_id(keys: Keys, tokens: Mapping[str, int]) -> int:
    """The placeholder of pictures: the config's id, or by its name in the tokenizer.

    The first revision's `img_start_id` defaulted to an id of an older vocabulary, so there the
    tokenizer's word counts for more.
    """
    by_name = tokens.get(IMAGE_TOKEN)
    if keys.has("image_token_id"):
        return _known_id(keys, "image_token_id", tokens)
    if by_name is not None:
        if keys.has("img_start_id") and keys.integer("img_start_id") != by_name:
            keys.note(
                f"config.json: 'img_start_id' is {keys.integer('img_start_id')}, but {IMAGE_TOKEN} "
                f"is token {by_name}: the tokenizer is trusted"
            )
        elif not keys.has("img_start_id"):
            keys.note(
                f"config.json: the key 'image_token_id' is missing: {IMAGE_TOKEN} is {by_name}"
            )
        return by_name
    if keys.has("img_start_id"):
        return _known_id(keys, "img_start_id", tokens)
    raise CheckpointError(
        f"config.json: the key 'image_token_id' is missing and {IMAGE_TOKEN} is no token"
    )


def _video_token_id(keys: Keys, tokens: Mapping[str, int]) -> int | None:
    if keys.has("video_token_id"):
        return _known_id(keys, "video_token_id", tokens)
    by_name = tokens.get(VIDEO_TOKEN)
    keys.note(
        "config.json: the key 'video_token_id' is missing: "
        + (f"{VIDEO_TOKEN} is {by_name}" if by_name is not None else "videos have no token")
    )
    return by_name


def _known_id(keys: Keys, name: str, tokens: Mapping[str, int]) -> int:
    token_id = keys.integer(name, minimum=0)
    if token_id not in tokens.values():
        raise CheckpointError(f"config.json: '{name}' is {token_id}, which is no token's id")
    return token_id


def _read_tokens(path: Path) -> dict[str, int]:
    """Every token of the tokenizer and its id."""
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: tokenizer.json is missing")
    tokenizer = read_json(path / "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(f"{path / 'tokenizer.json'}: the key 'model.vocab' is missing")
    config = read_json_if_there(path / "tokenizer_config.json")
    try:
        tokens = {str(token): int(token_id) for token, token_id in vocabulary.items()}
        for added in tokenizer.get("added_tokens") or []:
            tokens[added["content"]] = int(added["id"])
        for token_id, added in (config.get("added_tokens_decoder") or {}).items():
            tokens.setdefault(added["content"], int(token_id))
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CheckpointError(f"{path}: the tokenizer's files list a malformed token") from cause
    return tokens


def _stop_ids(
    tokens: Mapping[str, int],
    configs: Sequence[Mapping[str, Any]],
    turn_end: int | None,
    *,
    logits_rows: int,
) -> tuple[int, ...]:
    """The family's ends by name, and every eos id that any config names and the model can give."""
    ids = {tokens[token] for token in STOP_TOKENS if token in tokens}
    for config in configs:
        eos = config.get("eos_token_id")
        for token_id in eos if isinstance(eos, list) else [eos]:
            if type(token_id) is int:
                ids.add(token_id)
    possible = {token_id for token_id in ids if 0 <= token_id < logits_rows}
    return tuple(sorted(possible - {turn_end}))


def _read_sampling(keys: Keys) -> SamplingDefaults:
    """Sampling of a file that may say nothing; `do_sample` false asks for greedy answers."""
    is_greedy = keys.has("do_sample") and not keys.flag("do_sample")
    temperature = 0.0 if is_greedy else _optional_number(keys, "temperature")
    top_p = _optional_number(keys, "top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise CheckpointError(f"generation_config.json: 'top_p' must be in (0, 1], not {top_p}")
    return SamplingDefaults(
        temperature=temperature,
        top_p=top_p,
        # -1 is how some tools write "off"
        top_k=max(0, keys.integer("top_k", minimum=-1)) if keys.has("top_k") else None,
        repetition_penalty=keys.number("repetition_penalty")
        if keys.has("repetition_penalty")
        else None,
    )


def _optional_number(keys: Keys, name: str) -> float | None:
    found = keys.find(name)
    if found is None:
        return None
    return 0.0 if found[1] == 0 else keys.number(name)


def _stored_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """The dtype that most of the weights are stored in."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_elements
    if not sizes:
        raise CheckpointError("the weight files hold no tensor of the model")
    return max(sizes, key=sizes.__getitem__)
