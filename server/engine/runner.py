"""Computes a batch: its tensors, the model's forward, the sampler. Owns the key/value cache.

The only file of the engine between nouns and tensors. It decides nothing: what is computed was
decided by the scheduler, and running the same batch again gives the same again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from server.attention.backend import AskedTokens, AttentionInputs, LayerCache
from server.core import TokenLogprobs, VisionLayout
from server.engine.encodings import Encoding
from server.engine.logprobs import token_logprobs
from server.engine.sampler import SamplingRow, sample
from server.engine.sequence import (
    Batch,
    DeviceError,
    Medium,
    Sequence,
    Span,
    SpanOutput,
    VisionSlice,
)

MACHINE_CACHE_SHARE = 0.25
"""Of a machine's memory, where the model runs on its CPU."""

MAX_CONTEXTS_CACHED = 16
"""More contexts than this the cache on a CPU does not hold by itself."""

DEVICE_CACHE_SHARE = 0.8
"""Of what an accelerator has free after the weights: the rest is for activations."""

MAX_TILES_AT_ONCE = 8
"""Tiles that go through the tower together: more are no faster, and each takes memory."""

MAX_PROMPT_LOGITS_ROWS = 64
"""Positions of a prompt whose logits are in memory together: each is as wide as the vocabulary."""


class Model(Protocol):
    """What the runner needs of a model; see `server.model.vlm`."""

    def start_tiles(self, tiles: Tensor) -> Tensor:
        """uint8 [tiles, size, size, 3] -> states [tiles, patches, channels]"""

    def advance_tiles(self, states: Tensor, stages: range, num_stages: int) -> Tensor:
        """States after these of `num_stages` stages, in which all of the tower's work is done"""

    def finish_tiles(self, states: Tensor, queries: AbstractSequence[int]) -> list[Tensor]:
        """States after the last stage -> features [queries[i], hidden] of tile i"""

    def assemble(self, features: list[Tensor], layout: VisionLayout) -> Tensor:
        """Features of all tiles of a medium -> [its tokens, hidden]"""

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden]"""

    def forward(self, embeds: Tensor, positions: Tensor, attention: AttentionInputs) -> Tensor:
        """[tokens, hidden], int64 [tokens] -> [asked, hidden], of the tokens asked for in order"""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, ids], -inf for ids that have no token"""


@dataclass(frozen=True, slots=True)
class _Tile:
    encoding: Encoding
    medium: Medium
    index: int


class Runner:
    """One model with its cache of `num_blocks` blocks."""

    def __init__(
        self,
        model: Model,
        caches: AbstractSequence[LayerCache],
        *,
        block_size: int,
        device: str,
        placeholder_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._model = model
        self._caches = caches
        self._block_size = block_size
        self._device = device
        self._placeholder_ids = placeholder_ids

    def run(self, batch: Batch) -> list[SpanOutput]:
        """One output for each span of the batch. DeviceError where nothing can follow."""
        try:
            with torch.inference_mode():
                self._encode_vision(batch)
                return self._compute(batch.spans) if batch.spans else []
        except torch.AcceleratorError as error:
            raise DeviceError("the accelerator reported an error") from error

    def _encode_vision(self, batch: Batch) -> None:
        """Tiles go through equal stages together, whosever they are.

        What is there already was made when this step was run before, and is not made again.
        """
        parts = [part for part in batch.vision if part.encoding.embeds is None]
        groups: dict[tuple[range, int], list[_Tile]] = {}
        for part in parts:
            encoding = part.encoding
            for index, stop in part.tiles:
                start, _ = encoding.partial.get(index, (0, None))
                if index not in encoding.features and start < stop:
                    work = range(start, stop), encoding.stages_per_tile
                    groups.setdefault(work, []).append(_Tile(encoding, part.medium, index))
        for (stages, num_stages), tiles in groups.items():
            for first in range(0, len(tiles), MAX_TILES_AT_ONCE):
                self._advance_tiles(tiles[first : first + MAX_TILES_AT_ONCE], stages, num_stages)
        for part in parts:
            if part.stop == part.encoding.num_stages:
                self._assemble(part)

    def _advance_tiles(self, tiles: list[_Tile], stages: range, num_stages: int) -> None:
        started_s = time.perf_counter()
        self._compute_stages(tiles, stages, num_stages)
        seconds_each = (time.perf_counter() - started_s) / len(tiles)
        for tile in tiles:
            tile.encoding.encode_s += seconds_each

    def _compute_stages(self, tiles: list[_Tile], stages: range, num_stages: int) -> None:
        if stages.start == 0:
            # Copied: what came over the socket is read-only, and torch knows no such thing.
            pixels = np.stack([tile.medium.tiles[tile.index] for tile in tiles])
            states = self._model.start_tiles(torch.from_numpy(pixels).to(self._device))
        else:
            states = torch.stack([tile.encoding.partial[tile.index][1] for tile in tiles])
        states = self._model.advance_tiles(states, stages, num_stages)
        if stages.stop < num_stages:
            for tile, state in zip(tiles, states, strict=True):
                # A copy: a view would keep the states of all tiles of the group.
                tile.encoding.partial[tile.index] = stages.stop, state.clone()
            return
        queries = [tile.medium.vision.layout.tile_queries[tile.index] for tile in tiles]
        encoded = self._model.finish_tiles(states, queries)
        for tile, features in zip(tiles, encoded, strict=True):
            tile.encoding.partial.pop(tile.index, None)
            tile.encoding.features[tile.index] = features

    def _assemble(self, part: VisionSlice) -> None:
        encoding, vision = part.encoding, part.medium.vision
        features = [encoding.features[tile] for tile in range(encoding.num_tiles)]
        embeds = self._model.assemble(features, vision.layout)
        if len(embeds) != vision.num_tokens:
            raise RuntimeError("the model made another number of features than promised")
        encoding.embeds = embeds
        encoding.features.clear()

    def _compute(self, spans: list[Span]) -> list[SpanOutput]:
        embeds = self._embeds(spans)
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        inputs = self._attention_inputs(spans)
        hidden = self._model.forward(embeds, positions.to(self._device), inputs)
        outputs = [SpanOutput() for _ in spans]
        ends = list(accumulate(_num_asked(span) for span in spans))  # in `hidden`
        sampled = [index for index, span in enumerate(spans) if span.is_sampled]
        if sampled:
            last_states = hidden[[ends[index] - 1 for index in sampled]]
            sequences = [spans[index].sequence for index in sampled]
            for index, output in zip(
                sampled, self._next_tokens(last_states, sequences), strict=True
            ):
                outputs[index] = output
        for index, span in enumerate(spans):
            if span.told_positions:
                states = hidden[ends[index] - len(span) : ends[index]]
                outputs[index] = self._tell_prompt(outputs[index], span, states)
        return outputs

    def _next_tokens(self, hidden: Tensor, sequences: list[Sequence]) -> list[SpanOutput]:
        """hidden [rows, hidden], the last states of the sequences -> what each goes on with."""
        logits = self._model.logits(hidden)
        counts = [sequence.request.sampling.num_logprobs for sequence in sequences]
        asked = [row for row, count in enumerate(counts) if count is not None]
        raw = logits[asked] if asked else None  # a copy of theirs: sampling overwrites all
        sampling_rows = [_sampling_row(sequence) for sequence in sequences]
        ids = sample(logits, sampling_rows)
        outputs = [
            SpanOutput(token_id, _why_none(row) if token_id is None else None)
            for token_id, row in zip(ids, sampling_rows, strict=True)
        ]
        if raw is not None:
            chosen = [ids[row] or 0 for row in asked]
            told = token_logprobs(raw, chosen, [counts[row] or 0 for row in asked])
            for row, logprobs in zip(asked, told, strict=True):
                if ids[row] is not None:
                    outputs[row] = replace(outputs[row], logprobs=logprobs)
        return outputs

    def _tell_prompt(self, output: SpanOutput, span: Span, hidden: Tensor) -> SpanOutput:
        """hidden [tokens, hidden] of the span -> its output with what it tells of the prompt."""
        sequence = span.sequence
        num_top = sequence.request.sampling.num_prompt_logprobs or 0
        positions = [p for p in span.told_positions if not sequence.is_placeholder(p)]
        told: dict[int, TokenLogprobs] = {}
        for first in range(0, len(positions), MAX_PROMPT_LOGITS_ROWS):
            some = positions[first : first + MAX_PROMPT_LOGITS_ROWS]
            logits = self._model.logits(hidden[[p - 1 - span.start for p in some]])
            ids = [sequence.token_ids[p] for p in some]
            told |= zip(some, token_logprobs(logits, ids, [num_top] * len(some)), strict=True)
        if any(math.isnan(logprobs.logprob) for logprobs in told.values()):
            return SpanOutput(error_code="internal_error")  # as where a token is drawn
        return replace(output, prompt_logprobs=tuple(told.get(p) for p in span.told_positions))

    def _embeds(self, spans: list[Span]) -> Tensor:
        ids = [token_id for span in spans for token_id in _span_ids(span)]
        embeds = self._model.embed(torch.tensor(ids, device=self._device))
        offset = 0  # of the span's first position in `embeds`
        for span in spans:
            num_features = 0
            for medium in span.sequence.media:
                start, stop = max(span.start, medium.start), min(span.stop, medium.stop)
                if start < stop:
                    encoded = medium.encoding.embeds if medium.encoding is not None else None
                    if encoded is None:
                        raise RuntimeError("a medium is not encoded where its positions are due")
                    first = offset - span.start  # what is added to a position to find its row
                    embeds[first + start : first + stop] = encoded[
                        start - medium.start : stop - medium.start
                    ]
                    num_features += stop - start
            if num_features != self._count_placeholders(span):
                raise RuntimeError("placeholders and features differ in number")
            offset += len(span)
        return embeds

    def _count_placeholders(self, span: Span) -> int:
        # Only in the prompt: a model may well generate such an id, and then it is just an id.
        prompt = span.sequence.request.prompt_ids[span.start : span.stop]
        return sum(token_id in self._placeholder_ids for token_id in prompt)

    def _attention_inputs(self, spans: list[Span]) -> AttentionInputs:
        inputs = self._inputs_of(spans)
        counts = [_num_asked(span) for span in spans]
        if counts == [len(span) for span in spans]:
            return inputs
        rows = [
            row
            for end, count in zip(inputs.cu_seq_q.tolist()[1:], counts, strict=True)
            for row in range(end - count, end)
        ]
        lasts = [
            replace(span, start=span.stop - count)
            for span, count in zip(spans, counts, strict=True)
            if count
        ]
        places = torch.tensor(rows, dtype=torch.int64, device=self._device)
        return replace(inputs, asked=AskedTokens(places, self._inputs_of(lasts)))

    def _inputs_of(self, spans: list[Span]) -> AttentionInputs:
        size = self._block_size
        lengths = [len(span) for span in spans]
        max_k = max((span.stop for span in spans), default=0)
        block_table = np.zeros((len(spans), -(-max_k // size)), np.int32)
        slots = [np.empty(0, np.int64)]
        for row, span in enumerate(spans):
            blocks = np.asarray(span.sequence.block_table[: -(-span.stop // size)], np.int64)
            block_table[row, : len(blocks)] = blocks
            positions = np.arange(span.start, span.stop)
            slots.append(blocks[positions // size] * size + positions % size)
        return AttentionInputs(
            caches=self._caches,
            cu_seq_q=self._int32(np.cumsum([0, *lengths])),
            seqused_k=self._int32([span.stop for span in spans]),
            block_table=self._int32(block_table),
            slot_mapping=torch.from_numpy(np.concatenate(slots)).to(self._device),
            max_q=max(lengths, default=0),
            max_k=max_k,
        )

    def _int32(self, values: AbstractSequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int32)).to(self._device)


def choose_cache_bytes(
    device: str, *, configured: int | None, bytes_per_token: int, context_length: int
) -> int:
    """How much memory the cache may take: as configured, or by the kind of device.

    On a CPU, where memory is everybody's, a few contexts: it is only taken as it is used.
    """
    if configured is not None:
        return configured
    if torch.device(device).type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * DEVICE_CACHE_SHARE)
    one_context = bytes_per_token * context_length
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_contexts = int(memory_bytes * MACHINE_CACHE_SHARE) // one_context
    return one_context * max(1, min(MAX_CONTEXTS_CACHED, num_contexts))


def _num_asked(span: Span) -> int:
    """Of how many of its last positions the final state is asked for."""
    return len(span) if span.told_positions else int(span.is_sampled)


def _span_ids(span: Span) -> list[int]:
    return span.sequence.token_ids[span.start : span.stop]


def _why_none(row: SamplingRow) -> str:
    """The code of a row that nothing could be drawn from: its form's, or of something unforeseen.

    A form may turn out too complex in the middle of an answer. No second try would help.
    """
    is_closed = row.mask is not None and not row.mask.any()
    return "invalid_json_schema" if is_closed else "internal_error"


def _sampling_row(sequence: Sequence) -> SamplingRow:
    request = sequence.request
    return SamplingRow(
        request.sampling,
        sequence.token_ids,
        len(request.prompt_ids),
        choice=sequence.choice,
        mask=None if sequence.constraint is None else sequence.constraint.allowed(),
    )
