"""Which tensors a checkpoint's safetensors files hold, and what the modules here call them.

Reads headers only and imports no torch, so that a checkpoint can be judged without loading it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from server.errors import CheckpointError
from server.model.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_NAMES_LISTED = 8

RevisionLayout = Literal["main", "v0.1.0", "text"]

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Order matters: the first prefix that fits decides. Vision checkpoints may have one more leading
# "model.", and one "vision_model." less, than the official files: transformers 5 renames so.
VISION_PREFIXES = (
    ("vision_model.vision_model.", "vision_model."),
    ("vision_model.", "vision_model."),
    ("mm_projector.", "mm_projector."),
    ("image_newline", "image_newline"),
    ("language_model.model.", "language_model."),
    ("language_model.", "language_model."),
    ("lm_head.", "language_model.lm_head."),
)
TEXT_PREFIXES = (("model.", "language_model."), ("lm_head.", "language_model.lm_head."))

UNUSED = re.compile(
    r"vision_model\.(post_layernorm|head|embeddings\.position_ids)(\.|$)"
    r"|language_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$"
)
TOWER_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `dtype` is one of our names, or safetensors' own where we have none."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


def read_tensor_entries(folder: Path, layout: RevisionLayout) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint by the names of our modules.

    A stored name that fits no known prefix keeps its own name, for strict loading to report.
    """
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for entry in _entries_of(file):
            name = module_name(entry.stored_name, layout)
            if name in entries:
                raise CheckpointError(
                    f"{folder}: two tensors for one place: '{entries[name].stored_name}' in "
                    f"{entries[name].file.name} and '{entry.stored_name}' in {file.name}"
                )
            entries[name] = entry
    _check_index(folder, entries)
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The one safetensors file of a checkpoint, or the shards its index names."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there "
            "(other formats are not read)"
        )
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: weight files are missing: {listed(missing)}")
    return [folder / name for name in names]


def module_name(stored_name: str, layout: RevisionLayout) -> str:
    """What the modules here call the tensor that a file calls `stored_name`."""
    is_text = layout == "text"
    name = stored_name if is_text else stored_name.removeprefix("model.")
    for prefix, ours in TEXT_PREFIXES if is_text else VISION_PREFIXES:
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return stored_name


def official_name(name: str, layout: RevisionLayout) -> str:
    """The stored name an operator would look for: the inverse of `module_name`."""
    if name.startswith("vision_model."):
        return f"vision_model.{name}"
    if not name.startswith("language_model."):
        return name
    outer = "" if layout == "text" else "language_model."
    rest = name.removeprefix("language_model.")
    return outer + (rest if rest.startswith("lm_head.") else f"model.{rest}")


def is_unused(name: str, *, first_unused_tower_layer: int, num_tower_layers: int) -> bool:
    """Whether a tensor is known and not needed: official files hold parts that never run here.

    Those are SigLIP's pooling head and last norm, the tower's layers after the one whose state is
    used, and buffers that older versions of transformers saved.
    """
    if UNUSED.match(name):
        return True
    layer = TOWER_LAYER.match(name)
    return layer is not None and first_unused_tower_layer <= int(layer[1]) < num_tower_layers


def used_entries(
    entries: Mapping[str, TensorEntry], *, first_unused_tower_layer: int, num_tower_layers: int
) -> dict[str, TensorEntry]:
    """The entries without the known unused ones; all of a dtype that can be loaded."""
    used = {
        name: entry
        for name, entry in entries.items()
        if not is_unused(
            name,
            first_unused_tower_layer=first_unused_tower_layer,
            num_tower_layers=num_tower_layers,
        )
    }
    for entry in used.values():
        if entry.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{entry.file}: '{entry.stored_name}' is stored as {entry.dtype}; "
                f"only {', '.join(DTYPES)} can be loaded"
            )
    return used


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    shown = ", ".join(names[:MAX_NAMES_LISTED])
    more = len(names) - MAX_NAMES_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def open_error(file: Path, cause: Exception) -> CheckpointError:
    """What to raise for a file that safetensors cannot read."""
    reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return CheckpointError(f"{file}: not a complete safetensors file: {reason}")


def _entries_of(file: Path) -> list[TensorEntry]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = []
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                view = tensors.get_slice(name)
                found.append((name, tuple(view.get_shape()), view.get_dtype()))
    except (SafetensorError, OSError) as cause:
        raise open_error(file, cause) from cause
    return [
        TensorEntry(file, name, shape, DTYPES.get(dtype, dtype)) for name, shape, dtype in found
    ]


def _weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE}: the key 'weight_map' is missing or empty")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: {file_name!r} is not the name of a file beside it"
            )
    return weight_map


def _check_index(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Every tensor the index promises must be in the file it names."""
    if (folder / SINGLE_FILE).is_file():
        return
    found = {(entry.stored_name, entry.file.name) for entry in entries.values()}
    absent = [name for name, file in _weight_map(folder).items() if (name, file) not in found]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: tensors are not in the files it names: {listed(absent)}"
        )
