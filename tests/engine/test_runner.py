"""The runner over a random model: whatever the batches, the same tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from server.attention.backend import AttentionInputs, choose_backend
from server.core import (
    GenerationRequest,
    TokenEvent,
    TokenLogprobs,
    VisionInput,
    VisionLayout,
)
from server.engine import runner as runner_module
from server.engine.blocks import BlockPool
from server.engine.encodings import EncoderCache, Encoding
from server.engine.runner import Runner, choose_cache_bytes
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Sequence, Span, StepBudget, VisionSlice
from server.model.checkpoint import load_model
from server.model.config import CheckpointInfo
from server.model.vlm import VisionLanguageModel
from tests.engine.samples import make_request, make_tiles
from tests.model.loading import encode_vision

BLOCK_SIZE = 4
NUM_BLOCKS = 512
SIDE = 56

PICTURE = VisionInput(
    "image",
    VisionLayout((16, 16, 16), local_grid=(1, 2), kept=(1, 0, 2, 8), newline=True),
    "a" * 64,
)
OTHER_PICTURE = replace(PICTURE, digest="c" * 64)
VIDEO = VisionInput("video", VisionLayout((16, *[4] * 8, 16, 4, 4)), "b" * 64)

Events = Callable[..., list[TokenEvent]]
Answer = Callable[..., dict[str, list[int]]]
Encode = Callable[..., list[Tensor]]
FullLogprobs = Callable[[GenerationRequest, list[int]], Tensor]


def make_scheduler(
    *,
    chunk: int = 10_000,
    stage_price: int = 1,
    max_running: int = 1,
    num_blocks: int = NUM_BLOCKS,
    stages_per_tile: int = 1,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
        EncoderCache(max_bytes=1 << 20, bytes_per_token=1, stages_per_tile=stages_per_tile),
        budget=StepBudget(chunk, stage_price, chunk),
        max_running=max_running,
    )


@pytest.fixture(scope="module")
def model(tiny_info: CheckpointInfo) -> VisionLanguageModel:
    backend = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE)
    loaded = load_model(
        tiny_info,
        device="cpu",
        dtype="float32",
        backend=backend,
        progress=lambda num_bytes, total_bytes: None,
    )
    # Random weights answer nearly anything with the same few tokens: spread the logits.
    for name, parameter in loaded.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            parameter.data.mul_(8.0)
    return loaded


@pytest.fixture
def make_runner(model: VisionLanguageModel, tiny_info: CheckpointInfo) -> Callable[[], Runner]:
    def make() -> Runner:
        text, vision = tiny_info.text, tiny_info.vision
        assert vision is not None and vision.video_token_id is not None
        backend = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE)
        caches = backend.allocate(
            text.num_layers,
            NUM_BLOCKS,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        return Runner(
            model,
            caches,
            block_size=BLOCK_SIZE,
            device="cpu",
            placeholder_ids=frozenset({vision.image_token_id, vision.video_token_id}),
        )

    return make


@pytest.fixture
def events(make_runner: Callable[[], Runner]) -> Events:
    def run(
        *requests: GenerationRequest, batch_sizes: set[int] | None = None, **options: int
    ) -> list[TokenEvent]:
        """What was told; `options` are those of `make_scheduler`."""
        scheduler = make_scheduler(**options)
        runner = make_runner()
        for request in requests:
            tiles = make_tiles(request, side=SIDE)
            for choice in range(request.num_choices):
                scheduler.add(Sequence.from_request(request, tiles, choice=choice))
        events: list[TokenEvent] = []
        while batch := scheduler.schedule():
            events += scheduler.commit(batch, runner.run(batch))
            if batch_sizes is not None:
                batch_sizes.add(len(batch.spans))
        scheduler.check()
        return events

    return run


@pytest.fixture
def answer(events: Events) -> Answer:
    def run(*requests: GenerationRequest, **options: Any) -> dict[str, list[int]]:
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for event in events(*requests, **options):
            assert event.token_id is not None
            answers[event.request_id].append(event.token_id)
        return answers

    return run


@pytest.fixture
def full_logprobs(model: VisionLanguageModel, tiny_info: CheckpointInfo) -> FullLogprobs:
    """Prompt and answer in one forward -> log-probabilities [positions, ids] of what follows.

    Without the machinery: no scheduler, no chunks, one block after another.
    """

    def run(request: GenerationRequest, answer: list[int]) -> Tensor:
        ids = torch.tensor([*request.prompt_ids, *answer])
        num_blocks = -(-len(ids) // BLOCK_SIZE)
        text = tiny_info.text
        caches = choose_backend("sdpa", device="cpu", page_size=BLOCK_SIZE).allocate(
            text.num_layers,
            num_blocks,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            dtype=torch.float32,
            device="cpu",
        )
        inputs = AttentionInputs(
            caches=caches,
            cu_seq_q=torch.tensor([0, len(ids)], dtype=torch.int32),
            seqused_k=torch.tensor([len(ids)], dtype=torch.int32),
            block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
            slot_mapping=torch.arange(len(ids)),
            max_q=len(ids),
            max_k=len(ids),
        )
        with torch.inference_mode():
            embeds = model.embed(ids)
            pixels = make_tiles(request, side=SIDE)
            for medium, start, tiles in zip(
                request.vision, request.vision_starts, pixels, strict=True
            ):
                features = encode_vision(model, torch.from_numpy(tiles), [medium.layout])[0]
                embeds[start : start + len(features)] = features
            hidden = model.forward(embeds, torch.arange(len(ids)), inputs)
            return model.logits(hidden).log_softmax(dim=-1)

    return run


@pytest.fixture
def requests(tiny_info: CheckpointInfo) -> list[GenerationRequest]:
    """Text, a picture, a video, both; greedy and sampled."""
    spec = tiny_info.vision
    assert spec is not None
    prompts: list[tuple[int | VisionInput, ...]] = [
        tuple(range(60, 81)),
        (7, 8, PICTURE, 9),
        (7, VIDEO, 9, 10),
        (7, OTHER_PICTURE, 8, VIDEO, 9),
    ]
    return [
        make_request(
            f"{index}-{temperature}",
            prompt=prompt,
            max_tokens=8,
            temperature=temperature,
            seed=index,
            spec=spec,
        )
        for index, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
    ]


@pytest.fixture
def crowd(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    """Those and as many short ones as make 32, no two of which begin alike."""
    more = [
        make_request(
            f"short {number}",
            prompt=tuple(range(100 + number, 101 + 2 * number)),
            max_tokens=8 + number % 5,
            temperature=float(number % 2),
            seed=number,
        )
        for number in range(32 - len(requests))
    ]
    return [*requests, *more]


@pytest.mark.parametrize(
    ("chunk", "stage_price", "stages_per_tile"),
    [(1, 1, 1), (3, 2, 1), (8, 2, 1), (10_000, 2000, 1), (3, 1, 2), (7, 2, 3), (10_000, 1, 5)],
    ids=str,
)
def test_chunking_never_changes_tokens(
    answer: Answer,
    requests: list[GenerationRequest],
    chunk: int,
    stage_price: int,
    stages_per_tile: int,
) -> None:
    whole = answer(*requests)
    assert len({tuple(ids) for ids in whole.values()}) > len(requests) // 2  # worth comparing
    in_parts = answer(
        *requests, chunk=chunk, stage_price=stage_price, stages_per_tile=stages_per_tile
    )
    assert in_parts == whole


@pytest.mark.parametrize(
    ("chunk", "stages_per_tile"), [(10_000, 1), (10, 1), (8, 1), (5, 2), (3, 1), (1, 1)]
)
@pytest.mark.parametrize("max_running", [2, 7, 32])
def test_neighbours_never_change_tokens(
    answer: Answer,
    crowd: list[GenerationRequest],
    chunk: int,
    max_running: int,
    stages_per_tile: int,
) -> None:
    batch_sizes: set[int] = set()
    together = answer(
        *crowd,
        chunk=chunk,
        max_running=max_running,
        stages_per_tile=stages_per_tile,
        batch_sizes=batch_sizes,
    )
    # In small portions the first have their answers before the last have begun.
    assert max(batch_sizes) == max_running or (max(batch_sizes) > 1 and chunk < 10_000)
    assert together == answer(*crowd)


@pytest.mark.parametrize(("chunk", "stages_per_tile"), [(10_000, 1), (5, 3)])
def test_preemption_never_changes_tokens(
    answer: Answer, requests: list[GenerationRequest], chunk: int, stages_per_tile: int
) -> None:
    """Room for the longest alone, so that all of them together often have to go back."""
    longest = max(len(request.prompt_ids) + 8 for request in requests)
    together = answer(
        *requests,
        chunk=chunk,
        stages_per_tile=stages_per_tile,
        max_running=8,
        num_blocks=-(-longest // BLOCK_SIZE) + 2,
    )
    assert together == answer(*requests)


def test_a_warm_cache_never_changes_tokens(
    answer: Answer, requests: list[GenerationRequest]
) -> None:
    again = [replace(request, request_id=f"{request.request_id} again") for request in requests]
    answers = answer(*requests, *again)
    for request in requests:
        assert answers[request.request_id] == answers[f"{request.request_id} again"]


TOLERANCE = 1e-3
"""Chunks of other lengths are summed in another order; a wrong position is off by whole units."""


def assert_told(told: TokenLogprobs | None, expected: Tensor, token_id: int, num_top: int) -> None:
    """`expected` are the log-probabilities [ids] at the place of the token."""
    assert told is not None and told.token_id == token_id
    assert told.logprob == pytest.approx(float(expected[token_id]), abs=TOLERANCE)
    best = expected.topk(num_top).values.tolist()
    assert [logprob for _, logprob in told.top] == pytest.approx(best, abs=TOLERANCE)
    for top_id, logprob in told.top:
        assert logprob == pytest.approx(float(expected[top_id]), abs=TOLERANCE)


def test_each_token_tells_its_logprob_and_the_likeliest(
    events: Events, requests: list[GenerationRequest], full_logprobs: FullLogprobs
) -> None:
    """The model's own, whatever is done to them before a token is drawn; each row what it asks."""
    forced = {"repetition_penalty": 3.0, "logit_bias": ((7, 40.0),), "top_k": 2}
    counts = [0, 5, 20, 1, None, None, None, None]
    asked = [
        replace(
            request,
            sampling=replace(request.sampling, num_logprobs=count, **forced),  # type: ignore[arg-type]
        )
        for request, count in zip(requests, counts, strict=True)
    ]
    told = events(*asked, max_running=8)
    for request, count in zip(asked, counts, strict=True):
        own = [event for event in told if event.request_id == request.request_id]
        if count is None:
            assert [event.logprobs for event in own] == [None] * len(own)
            continue
        ids = [event.token_id or 0 for event in own]
        expected = full_logprobs(request, ids)[len(request.prompt_ids) - 1 : -1]
        for event, row in zip(own, expected, strict=True):
            assert_told(event.logprobs, row, event.token_id or 0, count)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 1},
        {"chunk": 3, "stage_price": 2},
        {"chunk": 10_000},
        {"chunk": 10, "max_running": 8, "num_blocks": 35},
    ],
    ids=str,
)
def test_a_prompt_tells_what_one_forward_over_all_of_it_says(
    events: Events,
    requests: list[GenerationRequest],
    full_logprobs: FullLogprobs,
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With media, behind others that left the same blocks, some computed again in the middle."""
    monkeypatch.setattr(runner_module, "MAX_PROMPT_LOGITS_ROWS", 5)
    asked = [
        replace(
            request,
            request_id=f"{request.request_id} told",
            sampling=replace(request.sampling, num_prompt_logprobs=3),
            num_choices=2,
        )
        for request in requests
    ]
    told = events(*requests, *asked, **options)
    for request in asked:
        own = [e for e in told if e.request_id == request.request_id and e.prompt_logprobs]
        assert [(event.choice, event.num_cached_tokens) for event in own] == [(0, 0)]
        first, *rest = own[0].prompt_logprobs or ()
        assert first is None and len(rest) == len(request.prompt_ids) - 1
        expected = full_logprobs(request, [])
        media = [
            range(start, start + medium.num_tokens)
            for start, medium in zip(request.vision_starts, request.vision, strict=True)
        ]
        for position, entry in enumerate(rest, start=1):
            if any(position in medium for medium in media):
                assert entry is None
            else:
                assert_told(entry, expected[position - 1], request.prompt_ids[position], 3)


@pytest.mark.parametrize("options", [{"max_running": 8}, {"chunk": 3, "max_running": 3}], ids=str)
def test_choices_answer_as_if_each_were_asked_alone(
    answer: Answer, events: Events, requests: list[GenerationRequest], options: dict[str, int]
) -> None:
    """The first is what one alone would be; greedy ones are all the same, others differ."""
    alone = answer(*requests)
    told = events(*(replace(request, num_choices=4) for request in requests), **options)
    for request in requests:
        choices = [
            [e.token_id for e in told if (e.request_id, e.choice) == (request.request_id, choice)]
            for choice in range(4)
        ]
        assert choices[0] == alone[request.request_id]
        num_different = len({tuple(choice) for choice in choices})
        is_greedy = request.sampling.temperature == 0
        assert num_different == 1 if is_greedy else num_different > 1


class OnlyThese:
    """A mask of a few ids, as a grammar would fill it; None where it allows all."""

    def __init__(self, ids: list[int] | None, *, num_ids: int) -> None:
        self._bits: npt.NDArray[np.int32] | None = None
        if ids is not None:
            words = [0] * -(-num_ids // 32)
            for token_id in ids:
                words[token_id // 32] |= 1 << token_id % 32
            self._bits = np.array(words, np.uint32).view(np.int32)

    def allowed(self) -> npt.NDArray[np.int32] | None:
        return self._bits

    def accept(self, token_id: int) -> None: ...


def test_a_mask_binds_its_own_sequence_alone(
    answer: Answer,
    make_runner: Callable[[], Runner],
    requests: list[GenerationRequest],
    tiny_info: CheckpointInfo,
) -> None:
    """One may say two ids, one nothing, one anything, and one has no mask; told are raw values."""
    free = answer(*requests)
    masks: list[list[int] | None] = [[9, 100], [], None]
    runner, scheduler = make_runner(), make_scheduler(max_running=8)
    width = tiny_info.text.logits_rows
    for request, ids in zip(requests, masks, strict=False):
        sampling = replace(request.sampling, num_logprobs=1)
        constraint = OnlyThese(ids, num_ids=width)
        tiles = make_tiles(request, side=SIDE)
        scheduler.add(
            Sequence.from_request(replace(request, sampling=sampling), tiles, constraint=constraint)
        )
    scheduler.add(Sequence.from_request(requests[3], make_tiles(requests[3], side=SIDE)))
    events: list[TokenEvent] = []
    while batch := scheduler.schedule():
        events += scheduler.commit(batch, runner.run(batch))
    said = {r.request_id: [e for e in events if e.request_id == r.request_id] for r in requests[:4]}
    bound, nothing, anything, unmasked = said.values()
    assert {event.token_id for event in bound} <= {9, 100} and len(bound) == 8
    best = [event.logprobs.top[0][0] for event in bound if event.logprobs is not None]
    assert best[0] == free[requests[0].request_id][0] not in (9, 100)
    assert [(e.token_id, e.error_code) for e in nothing] == [(None, "invalid_json_schema")]
    assert [event.token_id for event in anything] == free[requests[2].request_id]
    assert [event.token_id for event in unmasked] == free[requests[3].request_id]


def test_another_picture_gives_another_answer(
    answer: Answer, requests: list[GenerationRequest]
) -> None:
    other = replace(requests[2], vision=(OTHER_PICTURE,))
    assert answer(requests[2]) != answer(other)


def test_a_missing_medium_is_noticed_before_the_forward(
    make_runner: Callable[[], Runner], requests: list[GenerationRequest]
) -> None:
    sequence = Sequence.from_request(requests[2], make_tiles(requests[2], side=SIDE))
    sequence.media = []
    sequence.block_table = list(range(20))
    with pytest.raises(RuntimeError, match="placeholders and features differ"):
        make_runner().run(Batch([Span(sequence, 0, len(sequence))], [], []))


@pytest.mark.parametrize("stages_per_tile", [1, 3])
def test_running_a_step_again_gives_the_same(
    make_runner: Callable[[], Runner], requests: list[GenerationRequest], stages_per_tile: int
) -> None:
    runner = make_runner()
    scheduler = make_scheduler(chunk=20, stage_price=4, stages_per_tile=stages_per_tile)
    request = requests[-1]
    scheduler.add(Sequence.from_request(request, make_tiles(request, side=SIDE)))
    while batch := scheduler.schedule():
        outputs = runner.run(batch)
        assert runner.run(batch) == outputs
        scheduler.commit(batch, outputs)


def test_one_who_fails_in_the_middle_of_a_tile_leaves_it_to_the_other(
    answer: Answer,
    make_runner: Callable[[], Runner],
    model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[GenerationRequest],
) -> None:
    """Both show the same picture. A step encodes one of its tiles, and the next one fails."""
    bad = requests[2]
    good = replace(bad, request_id="good", prompt_ids=(11, *bad.prompt_ids[1:]))
    runner = make_runner()
    scheduler = make_scheduler(chunk=4, stage_price=1, max_running=2, stages_per_tile=3)
    for request in (bad, good):
        scheduler.add(Sequence.from_request(request, make_tiles(request, side=SIDE)))
    advance, num_calls = model.advance_tiles, 0

    def advance_but_once(states: Tensor, stages: range, num_stages: int) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise ValueError("a fault")
        return advance(states, stages, num_stages)

    monkeypatch.setattr(model, "advance_tiles", advance_but_once)
    batch = scheduler.schedule()
    assert batch is not None
    (piece,) = batch.vision
    with pytest.raises(ValueError, match="a fault"):
        runner.run(batch)
    assert piece.encoding.features and not piece.encoding.is_complete
    scheduler.fail(piece.sequence, error_code="internal_error")
    said = []
    while batch := scheduler.schedule():
        said += scheduler.commit(batch, runner.run(batch))
    scheduler.check()
    assert [event.token_id for event in said] == answer(good)["good"]


@pytest.fixture
def encode(make_runner: Callable[[], Runner]) -> Encode:
    def run(
        *media: VisionInput, slices: AbstractSequence[int], stages_per_tile: int
    ) -> list[Tensor]:
        """What replaces each medium; all go on together, slice by slice."""
        parts = []
        for medium in media:
            request = make_request(prompt=(medium,), max_tokens=1)
            sequence = Sequence.from_request(request, make_tiles(request, side=SIDE))
            encoding = Encoding(
                ("", medium.digest), len(medium.layout.tile_queries), 0, stages_per_tile
            )
            parts.append((sequence, encoding))
        runner, start = make_runner(), 0
        for length in slices:
            pieces = [
                VisionSlice(sequence, encoding, sequence.media[0], start, stop)
                for sequence, encoding in parts
                if (stop := min(start + length, encoding.num_stages)) > start
            ]
            runner.run(Batch([], pieces, []))
            start += length
        embeds = [encoding.embeds for _, encoding in parts]
        assert not any(encoding.partial or encoding.features for _, encoding in parts)
        return [one for one in embeds if one is not None]

    return run


@pytest.mark.parametrize("stages_per_tile", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 100])
def test_features_are_the_same_in_any_slices(
    encode: Encode, stages_per_tile: int, length: int
) -> None:
    media = (PICTURE, VIDEO)
    whole = [encode(medium, slices=[100], stages_per_tile=1)[0] for medium in media]
    slices = [length] * (12 * stages_per_tile)
    alone = [encode(medium, slices=slices, stages_per_tile=stages_per_tile)[0] for medium in media]
    together = encode(*media, slices=slices, stages_per_tile=stages_per_tile)
    for results in (alone, together):
        for ours, expected in zip(results, whole, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_stage_is_not_computed_again_when_its_step_is(
    make_runner: Callable[[], Runner],
    model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two tiles in one slice the second fails once; the first has passed its stages."""
    request = make_request(prompt=(PICTURE,), max_tokens=1)
    sequence = Sequence.from_request(request, make_tiles(request, side=SIDE))
    encoding = Encoding(("", ""), 3, 0, stages_per_tile=2)
    runner, passed = make_runner(), []

    def advance(states: Tensor, stages: range, num_stages: int) -> Tensor:
        passed.append((len(states), stages))
        if len(passed) == 3:
            raise ValueError("a fault that passes")
        return VisionLanguageModel.advance_tiles(model, states, stages, num_stages)

    monkeypatch.setattr(model, "advance_tiles", advance)
    for start, stop in ((0, 1), (1, 4)):
        batch = Batch([], [VisionSlice(sequence, encoding, sequence.media[0], start, stop)], [])
        with contextlib.suppress(ValueError):
            runner.run(batch)
    runner.run(batch)  # again, alone
    runner.run(batch)  # and once more, for nothing
    assert passed == [(1, range(1)), (1, range(1, 2)), (1, range(2)), (1, range(2))]
    assert set(encoding.features) == {0, 1} and not encoding.partial


@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_tiles_of_several_media_go_through_the_tower_together_but_not_too_many(
    encode: Encode,
    model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
) -> None:
    sizes: list[int] = []

    def start(tiles: Tensor) -> Tensor:
        sizes.append(len(tiles))
        return VisionLanguageModel.start_tiles(model, tiles)

    monkeypatch.setattr(model, "start_tiles", start)
    monkeypatch.setattr(runner_module, "MAX_TILES_AT_ONCE", at_once)
    encode(PICTURE, VIDEO, slices=[100], stages_per_tile=1)
    num_tiles = 3 + len(VIDEO.layout.tile_queries)
    assert sum(sizes) == num_tiles
    assert len(sizes) == -(-num_tiles // at_once)


def test_nan_logits_end_their_request_alone(
    make_runner: Callable[[], Runner],
    model: VisionLanguageModel,
    requests: list[GenerationRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def logits_with_a_nan(hidden: Tensor) -> Tensor:
        logits = VisionLanguageModel.logits(model, hidden)
        logits[0, 5] = math.nan
        return logits

    monkeypatch.setattr(model, "logits", logits_with_a_nan)
    sequences = [Sequence.from_request(request, []) for request in requests[:2]]
    for index, sequence in enumerate(sequences):
        sequence.block_table = list(range(10 * index, 10 * index + 10))
    spans = [Span(sequence, 0, len(sequence)) for sequence in sequences]
    bad, good = make_runner().run(Batch(spans, [], []))
    assert (bad.token_id, bad.error_code) == (None, "internal_error")
    assert good.token_id is not None and good.error_code is None


def test_the_cache_on_a_cpu_holds_a_few_contexts() -> None:
    size = choose_cache_bytes("cpu", configured=None, bytes_per_token=100, context_length=64)
    assert size == 16 * 6400
    more_than_there_is = choose_cache_bytes(
        "cpu", configured=None, bytes_per_token=1 << 30, context_length=1 << 20
    )
    assert more_than_there_is == 1 << 50  # one context, whatever it takes
    assert choose_cache_bytes("cpu", configured=7, bytes_per_token=1, context_length=1) == 7
