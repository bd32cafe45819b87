"""The engine alone: the runner in this process, fed with batches; no scheduler and no HTTP.

Each figure comes with the work it stands for, to be held against the machine's limits.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from benchmarks.operations import Work, decode_work, prefill_work, vision_work
from benchmarks.timing import Effort, one_run_s, seconds_of
from server.attention.backend import LayerCache, choose_backend
from server.core import (
    GenerationRequest,
    SamplingParams,
    Tiles,
    VisionInput,
    VisionLayout,
    VisionSpec,
)
from server.engine.encodings import Encoding
from server.engine.runner import Runner
from server.engine.sequence import Batch, Span, VisionSlice
from server.engine.sequence import Sequence as EngineSequence
from server.engine.worker_main import choose_dtype
from server.model.checkpoint import load_model, pack_for_cpu
from server.model.config import CheckpointInfo, read_checkpoint
from server.model.vlm import VisionLanguageModel

MAX_STEP_TOKENS = 1024
"""The most positions the server ever computes in one step: longer prompts take several."""

MAX_PREFILL_S = 60.0
"""A prompt that would take longer, at the speed of the one before it, is left out."""

SAMPLED = SamplingParams(max_tokens=1, temperature=0.5, top_p=0.6, seed=1)
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)

SHARPER = 8.0
"""Random weights make flat distributions. So much larger, their logits are a trained model's; a
power of two, so that multiplying and dividing 16-bit weights by it is exact."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is measured."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    tiles: tuple[int, ...]
    sampler_rows: tuple[int, ...]


FULL = Shapes(
    rows=(1, 2, 4, 8, 16, 32),
    contexts=(128, 512, 1024, 2048, 4096),
    prompts=(128, 512, 1024, 2048, 4096),
    tiles=(1, 4, 8, 16),
    sampler_rows=(1, 8, 32),
)
QUICK = Shapes(
    rows=(1, 8, 32), contexts=(128, 1024), prompts=(128, 1024), tiles=(1, 8), sampler_rows=(1, 8)
)


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model with a cache of its own, as the engine process builds them."""

    info: CheckpointInfo
    model: VisionLanguageModel
    runner: Runner
    caches: Sequence[LayerCache]
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    attention: str
    text_ids: Sequence[int]
    """All that stand for no picture or video."""

    @property
    def num_cached_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One step of `rows` sequences with `context` positions each."""

    rows: int
    context: int
    seconds: float
    work: Work


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt from nothing to its first token."""

    prompt_tokens: int
    seconds: float
    work: Work


@dataclass(frozen=True, slots=True)
class VisionRow:
    """`tiles` tiles of one picture, encoded in one step."""

    tiles: int
    seconds: float
    work: Work


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """A step that draws with temperature 0.5 and top_p 0.6 beside one that takes the likeliest.

    `logits` says whose: the model's own, or those made as sharp as a trained model's.
    """

    rows: int
    logits: str
    greedy_step_s: float
    sampled_step_s: float

    @property
    def share(self) -> float:
        """How much of the step the drawing takes."""
        return max(0.0, 1 - self.greedy_step_s / self.sampled_step_s)


# Building it --------------------------------------------------------------------------------------


def load_engine(
    folder: Path, *, device: str, dtype: str, attention: str, shapes: Shapes, max_bytes: int
) -> Engine:
    """As `server.engine.worker_main` does it, with a cache for these shapes and no larger."""
    info = read_checkpoint(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(dtype, info, device=device)
    backend = choose_backend(
        attention, device=device, dtype=getattr(torch, dtype), head_dim=info.text.head_dim
    )
    model = load_model(
        info, device=device, dtype=dtype, backend=backend, progress=lambda done, total: None
    )
    pack_for_cpu(model, info)
    block_size = backend.page_size
    num_blocks = _count_blocks(
        info, shapes, block_size, max_bytes // (block_size * info.kv_bytes_per_token(dtype))
    )
    caches = backend.allocate(
        info.text.num_layers,
        num_blocks,
        num_kv_heads=info.text.num_kv_heads,
        head_dim=info.text.head_dim,
        dtype=getattr(torch, dtype),
        device=device,
    )
    spec = info.vision
    media_ids = () if spec is None else (spec.image_token_id, spec.video_token_id)
    placeholder_ids = frozenset(each for each in media_ids if each is not None)
    engine = Engine(
        info=info,
        model=model,
        runner=Runner(
            model, caches, block_size=block_size, device=device, placeholder_ids=placeholder_ids
        ),
        caches=caches,
        num_blocks=num_blocks,
        block_size=block_size,
        device=device,
        dtype=dtype,
        attention=type(backend).__name__,
        text_ids=tuple(set(range(info.tokenizer_size)) - placeholder_ids),
    )
    _fill_cache(engine)
    return engine


def _count_blocks(info: CheckpointInfo, shapes: Shapes, block_size: int, most: int) -> int:
    """For the largest of the shapes that `most` blocks can hold."""
    needed = [-(-prompt // block_size) for prompt in shapes.prompts]
    needed += [
        num_rows * -(-context // block_size)
        for num_rows in shapes.rows
        for context in shapes.contexts
        if context <= info.context_length
    ]
    return max((count for count in needed if count <= most), default=1)


def _fill_cache(engine: Engine) -> None:
    """Real keys and values in every page. Never written, all pages would be one, and in a cache."""
    num_tokens = min(engine.block_size, engine.info.context_length)
    engine.runner.run(_batch(engine, num_rows=1, start=0, stop=num_tokens))
    for cache in engine.caches:
        for pages in (cache.keys, cache.values):
            if len(pages) != engine.num_blocks:
                raise ValueError("this backend's cache does not begin with its pages")
            pages[1:].copy_(pages[:1].expand_as(pages[1:]))


def _batch(
    engine: Engine, *, num_rows: int, start: int, stop: int, params: SamplingParams = GREEDY
) -> Batch:
    """Positions [start, stop) of `num_rows` sequences that end there, each with its own blocks."""
    blocks_each = -(-stop // engine.block_size)
    spans = []
    for row in range(num_rows):
        request = GenerationRequest(
            request_id=str(row),
            tenant="",
            prompt_ids=_prompt(engine, stop, seed=row),
            sampling=params,
        )
        sequence = EngineSequence.from_request(request, [])
        sequence.num_computed = start
        sequence.block_table = list(range(row * blocks_each, (row + 1) * blocks_each))
        spans.append(Span(sequence, start, stop))
    return Batch(spans, [], [])


def _prompt(engine: Engine, num_tokens: int, *, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(engine.text_ids, k=num_tokens))


# Measuring it -------------------------------------------------------------------------------------


def measure_decode(
    engine: Engine, shapes: Shapes, effort: Effort, skipped: list[str]
) -> Iterator[DecodeRow]:
    """One row for every number of rows and context that fits; the others are named in `skipped`."""
    for context in shapes.contexts:
        if context > engine.info.context_length:
            skipped.append(f"decode at context {context}: {_beyond_context(engine)}")
            continue
        for num_rows in shapes.rows:
            blocks = num_rows * -(-context // engine.block_size)
            if blocks > engine.num_blocks:
                skipped.append(
                    f"decode of {num_rows} rows at context {context}: {_beyond_cache(engine)}"
                )
                continue
            batch = _batch(engine, num_rows=num_rows, start=context - 1, stop=context)
            times_s = seconds_of(partial(engine.runner.run, batch), engine.device, effort)
            work = decode_work(engine.info, engine.dtype, num_rows=num_rows, context=context)
            yield DecodeRow(num_rows, context, statistics.median(times_s), work)


def measure_prefill(
    engine: Engine, shapes: Shapes, effort: Effort, skipped: list[str]
) -> Iterator[PrefillRow]:
    """Prompts of one sequence, the shortest first, as long as they take a bearable time."""
    operations_per_s = math.inf
    for num_tokens in shapes.prompts:
        work = prefill_work(engine.info, num_tokens=num_tokens)
        if num_tokens > engine.info.context_length:
            skipped.append(f"prefill of {num_tokens} tokens: {_beyond_context(engine)}")
        elif num_tokens > engine.num_cached_tokens:
            skipped.append(f"prefill of {num_tokens} tokens: {_beyond_cache(engine)}")
        elif work.operations / operations_per_s > MAX_PREFILL_S:
            skipped.append(f"prefill of {num_tokens} tokens: over {MAX_PREFILL_S:.0f} s")
        else:
            whole = _batch(engine, num_rows=1, start=0, stop=num_tokens).spans[0].sequence
            times_s = seconds_of(partial(_prefill, engine, whole), engine.device, effort)
            yield PrefillRow(num_tokens, statistics.median(times_s), work)
            operations_per_s = work.operations / statistics.median(times_s)


def _beyond_context(engine: Engine) -> str:
    return f"the model's context is {engine.info.context_length} tokens"


def _beyond_cache(engine: Engine) -> str:
    return f"the cache holds {engine.num_cached_tokens} tokens"


def _prefill(engine: Engine, sequence: EngineSequence) -> None:
    for start in range(0, len(sequence), MAX_STEP_TOKENS):
        stop = min(start + MAX_STEP_TOKENS, len(sequence))
        engine.runner.run(Batch([Span(sequence, start, stop)], [], []))


def measure_vision(
    engine: Engine, shapes: Shapes, effort: Effort, skipped: list[str]
) -> Iterator[VisionRow]:
    spec = engine.info.vision
    if spec is None:
        skipped.append("vision: this is a text checkpoint")
        return
    for num_tiles in shapes.tiles:
        shape = (num_tiles, spec.tile_size, spec.tile_size, 3)
        tiles = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        times_s = seconds_of(partial(_encode, engine, spec, tiles), engine.device, effort)
        work = vision_work(engine.info, num_tiles=num_tiles, num_queries=spec.image_queries)
        yield VisionRow(num_tiles, statistics.median(times_s), work)


def _encode(engine: Engine, spec: VisionSpec, tiles: Tiles) -> None:
    """All tiles of one medium as one slice, as a step of the scheduler would hold them."""
    vision = VisionInput("image", VisionLayout((spec.image_queries,) * len(tiles)), digest="")
    ids = (spec.image_token_id,) * vision.num_tokens
    request = GenerationRequest("tiles", "", ids, GREEDY, (vision,), (0,))
    sequence = EngineSequence.from_request(request, [tiles])
    encoding = Encoding(key=("", ""), num_tiles=len(tiles), num_bytes=0)
    medium = sequence.media[0]
    medium.encoding = encoding
    piece = VisionSlice(sequence, encoding, medium, 0, len(tiles))
    engine.runner.run(Batch([], [piece], []))


def measure_sampler(engine: Engine, shapes: Shapes, effort: Effort) -> Iterator[SamplerRow]:
    """Steps that draw and steps that do not, in turn, so that both see the same machine."""
    context = min(shapes.contexts[0], engine.info.context_length)
    blocks_each = -(-context // engine.block_size)
    for name, factor in (("own", 1.0), ("sharp", SHARPER)):
        for num_rows in shapes.sampler_rows:
            if num_rows * blocks_each > engine.num_blocks:
                continue
            greedy, sampled = (
                _batch(engine, num_rows=num_rows, start=context - 1, stop=context, params=params)
                for params in (GREEDY, SAMPLED)
            )
            with _logits_times(engine.model, factor):
                greedy_s, sampled_s = _in_turn(engine, greedy, sampled, effort)
            yield SamplerRow(num_rows, name, greedy_s, sampled_s)


def _in_turn(engine: Engine, first: Batch, second: Batch, effort: Effort) -> tuple[float, float]:
    """The median seconds of a step of each."""
    times_s: tuple[list[float], list[float]] = ([], [])
    while len(times_s[0]) < effort.least_runs or sum(chain(*times_s)) < 2 * effort.least_s:
        for batch, own_s in zip((first, second), times_s, strict=True):
            own_s.append(one_run_s(partial(engine.runner.run, batch), engine.device))
    return statistics.median(times_s[0]), statistics.median(times_s[1])


@contextlib.contextmanager
def _logits_times(model: VisionLanguageModel, factor: float) -> Iterator[None]:
    """Logits are a linear function of the last norm's output, and that of the norm's weight."""
    weight = model.language_model.norm.weight
    weight.mul_(factor)
    yield
    weight.div_(factor)
