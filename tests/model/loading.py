"""Loading a written checkpoint, changing its files, and running its decoder over a paged cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.attention.backend import AttentionInputs, choose_backend
from server.core import VisionLayout
from server.model.checkpoint import load_model
from server.model.compiled_decoder import CompiledDecoder
from server.model.config import read_checkpoint
from server.model.vlm import VisionLanguageModel

PAGE_SIZE = 4


def load(folder: Path, *, dtype: str = "float32") -> VisionLanguageModel:
    return load_model(
        read_checkpoint(folder),
        device="cpu",
        dtype=dtype,
        backend=choose_backend(device="cpu", page_size=PAGE_SIZE),
        progress=lambda done, total: None,
    )


def stored_tensors(folder: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of all files whose names begin with a prefix, without it."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the single weight file after `change` has worked on its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def encode_tiles(
    model: VisionLanguageModel, tiles: Tensor, queries: Sequence[int], *, num_stages: int = 1
) -> list[Tensor]:
    """All tiles at once through tower and projector, stage by stage."""
    states = model.start_tiles(tiles)
    for stage in range(num_stages):
        states = model.advance_tiles(states, range(stage, stage + 1), num_stages)
    return model.finish_tiles(states, queries)


def encode_vision(
    model: VisionLanguageModel, tiles: Tensor, layouts: Sequence[VisionLayout]
) -> list[Tensor]:
    """The tiles of all media, one after another -> what replaces each one's placeholders."""
    counts = [len(layout.tile_queries) for layout in layouts]
    features = encode_tiles(model, tiles, [n for layout in layouts for n in layout.tile_queries])
    media = iter(features)
    return [
        model.assemble([next(media) for _ in range(count)], layout)
        for count, layout in zip(counts, layouts, strict=True)
    ]


def all_logits(
    model: VisionLanguageModel, sequences: Sequence[Sequence[int]], *, chunk: int | None = None
) -> list[Tensor]:
    """Logits after every token of each sequence, computed `chunk` tokens a step (all by default).

    Sequences are batched together; a sequence that has ended drops out of the batch.
    """
    chunk = chunk or max(map(len, sequences))
    decoder = model.language_model
    layers = (decoder.decoder if isinstance(decoder, CompiledDecoder) else decoder).layers
    config = layers[0].self_attn
    page_size = config.backend.page_size
    pages_each = -(-max(map(len, sequences)) // page_size)
    caches = config.backend.allocate(
        len(layers),
        pages_each * len(sequences),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.language_model.norm.weight.dtype,
        device="cpu",
    )
    # interleaved, so that no sequence's pages are neighbours
    table = torch.arange(pages_each * len(sequences), dtype=torch.int32).view(pages_each, -1).T
    parts: list[list[Tensor]] = [[] for _ in sequences]
    with torch.inference_mode():
        for start in range(0, max(map(len, sequences)), chunk):
            rows = [index for index, ids in enumerate(sequences) if len(ids) > start]
            spans = [sequences[row][start : start + chunk] for row in rows]
            positions = [torch.arange(start, start + len(span)) for span in spans]
            slots = [
                table[row][where // page_size].long() * page_size + where % page_size
                for row, where in zip(rows, positions, strict=True)
            ]
            counts = torch.tensor([len(span) for span in spans], dtype=torch.int32)
            inputs = AttentionInputs(
                caches=caches,
                cu_seq_q=torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]),
                seqused_k=counts + start,
                block_table=table[rows],
                slot_mapping=torch.cat(slots),
                max_q=int(counts.max()),
                max_k=int(counts.max()) + start,
            )
            embeds = model.embed(torch.tensor([token for span in spans for token in span]))
            logits = model.logits(model(embeds, torch.cat(positions), inputs))
            for row, part in zip(rows, logits.split(counts.tolist()), strict=True):
                parts[row].append(part)
    return [torch.cat(part) for part in parts]


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over largest value."""
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).abs().max() / reference.abs().max())
