"""Weights from safetensors files into a model, strictly and with little memory.

The model is built without storage; each tensor is read through a memory map and converted once,
straight into its final place. What is missing, unexpected or of another shape is one error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from server.attention.backend import AttentionBackend
from server.errors import CheckpointError
from server.model.compiled_decoder import compile_decoder
from server.model.config import EMBEDDING, CheckpointInfo
from server.model.decoder import Decoder
from server.model.layers import EmbeddingInFile, FusedLinear, pack_linear_layers
from server.model.packed import PackedLinear
from server.model.tensors import (
    TensorEntry,
    listed,
    official_name,
    open_error,
    read_tensor_entries,
    used_entries,
)
from server.model.vlm import VisionLanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    info: CheckpointInfo,
    *,
    device: str,
    dtype: str,
    backend: AttentionBackend,
    progress: Callable[[int, int], None],
) -> VisionLanguageModel:
    """Build the model of a checkpoint and load its weights as `dtype` (a key of DTYPES).

    `progress` is told (bytes read, bytes to read) after every tensor.
    """
    model = _without_storage(info, backend)
    entries = _entries_to_load(info)
    _check(info, _parameter_shapes(model), entries)

    places = _allocate(model, device=device, dtype=DTYPES[dtype])
    _fill(places, entries, progress)
    # parameters are in place: this moves the few buffers that no checkpoint holds
    return model.to(device).requires_grad_(False).eval()


def pack_for_cpu(model: VisionLanguageModel, info: CheckpointInfo) -> None:
    """Puts the weights of linear layers where they can be packed; each is still held once.

    A head tied to the embedding is packed like any other; the embedding, of which a step reads a
    few rows, is then read from the checkpoint's file.
    """
    pack_linear_layers(model)
    decoder = model.language_model
    assert isinstance(decoder, Decoder)  # until the end of this function
    if info.text.is_tied and isinstance(decoder.lm_head, PackedLinear):
        entry = _entries_to_load(info)[EMBEDDING]
        try:
            with safe_open(entry.file, framework="pt", device="cpu") as tensors:
                table = tensors.get_tensor(entry.stored_name)
        except (SafetensorError, OSError) as cause:
            raise open_error(entry.file, cause) from cause
        if table.shape != decoder.embed_tokens.weight.shape:
            raise CheckpointError(f"{entry.file}: the file has changed while it was read")
        decoder.embed_tokens = EmbeddingInFile(table, dtype=decoder.norm.weight.dtype)
    model.language_model = compile_decoder(decoder) or decoder


def check_tensors(info: CheckpointInfo, *, backend: AttentionBackend) -> None:
    """Raise what `load_model` would raise for wrong names or shapes, without reading weights."""
    model = _without_storage(info, backend)
    _check(info, _parameter_shapes(model), _entries_to_load(info))


def _without_storage(info: CheckpointInfo, backend: AttentionBackend) -> VisionLanguageModel:
    with torch.device("meta"), _WithoutInitialisation():
        return VisionLanguageModel(info, backend)


class _WithoutInitialisation(TorchFunctionMode):
    """Skips initial values: on meta tensors they only cost the import of the compiler (3 s)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _entries_to_load(info: CheckpointInfo) -> dict[str, TensorEntry]:
    return used_entries(
        read_tensor_entries(info.path, info.revision_layout),
        first_unused_tower_layer=info.tower.num_layers_used if info.tower else 0,
        num_tower_layers=info.tower.num_layers if info.tower else 0,
    )


def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for full_name, parameter in model.named_parameters()  # a shared one once
        for name, tensor in _places(model, full_name, parameter)
    }


def _places(model: nn.Module, full_name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's names for one parameter, each with its part of `tensor`."""
    prefix, _, parameter_name = full_name.rpartition(".")
    module = model.get_submodule(prefix)
    if not isinstance(module, FusedLinear):
        yield full_name, tensor
        return
    beside = prefix.rpartition(".")[0]
    parts = tensor.split_with_sizes(list(module.parts.values()))
    for part, rows in zip(module.parts, parts, strict=True):
        yield f"{beside}.{part}.{parameter_name}", rows


def _check(
    info: CheckpointInfo,
    expected: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, TensorEntry],
) -> None:
    layout = info.revision_layout
    missing = [official_name(name, layout) for name in expected.keys() - entries.keys()]
    unexpected = [entries[name].stored_name for name in entries.keys() - expected.keys()]
    wrong = [
        f"{entries[name].stored_name} {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    problems = [f"{kind}: {listed(names)}" for kind, names in found.items() if names]
    if problems:
        raise CheckpointError(f"{info.path}: the weights do not fit: {'; '.join(problems)}")


def _allocate(model: nn.Module, *, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Storage for every parameter; the place, by name, that a checkpoint's tensor is copied to."""
    places: dict[str, Tensor] = {}
    stored: dict[nn.Parameter, nn.Parameter] = {}
    for full_name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in stored:
            storage = torch.empty(parameter.shape, dtype=dtype, device=device)
            stored[parameter] = nn.Parameter(storage, requires_grad=False)
            places.update(_places(model, full_name, storage))
        prefix, _, name = full_name.rpartition(".")
        setattr(model.get_submodule(prefix), name, stored[parameter])
    return places


def _fill(
    places: Mapping[str, Tensor],
    entries: Mapping[str, TensorEntry],
    progress: Callable[[int, int], None],
) -> None:
    total, done = sum(entry.num_bytes for entry in entries.values()), 0
    names = {entry.stored_name: name for name, entry in entries.items()}
    by_file = sorted(entries.values(), key=lambda entry: entry.file)
    progress(0, total)
    for file, group in groupby(by_file, key=lambda entry: entry.file):
        wanted = {entry.stored_name: entry for entry in group}
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for stored_name in tensors.offset_keys():  # in the order they lie on disk
                    if stored_name not in wanted:
                        continue
                    places[names[stored_name]].copy_(tensors.get_tensor(stored_name))
                    done += wanted[stored_name].num_bytes
                    progress(done, total)
        except (SafetensorError, OSError) as cause:
            raise open_error(file, cause) from cause
