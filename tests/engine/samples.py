"""Requests and media as small as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from server.core import (
    GenerationRequest,
    SamplingParams,
    Tiles,
    VisionInput,
    VisionLayout,
    VisionSpec,
)
from tests.fakes import FAKE_FACTS

IMAGE_ID = 500
VIDEO_ID = 501
TILE_SIZE = 4

SPEC = VisionSpec(
    tile_size=TILE_SIZE,
    candidate_resolutions=((4, 4), (8, 8)),
    image_queries=4,
    video_slow_queries=4,
    video_fast_queries=1,
    first_last_frames_slow=False,
    max_canvases=12,
    image_token_id=IMAGE_ID,
    video_token_id=VIDEO_ID,
)

PICTURE = VisionInput(
    "image",
    VisionLayout((4, 4, 4), local_grid=(1, 2), kept=(0, 0, 2, 4), newline=True),
    digest="a" * 64,
)
VIDEO = VisionInput("video", VisionLayout((4, 1, 1, 1, 1, 1, 1)), digest="b" * 64)

FACTS = replace(FAKE_FACTS, max_request_tokens=256, kv_tokens=256)


def make_request(
    name: str = "r",
    *,
    prompt: Sequence[int | VisionInput] = (1, 2, 3),
    max_tokens: int = 4,
    temperature: float = 0.0,
    stop: Sequence[int] = (),
    seed: int | None = None,
    priority: int = 0,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    num_choices: int = 1,
    spec: VisionSpec = SPEC,
) -> GenerationRequest:
    """A request whose prompt is ids, and media where their placeholders stand."""
    ids: list[int] = []
    starts: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
        else:
            starts.append(len(ids))
            token_id = spec.image_token_id if part.kind == "image" else spec.video_token_id
            assert token_id is not None
            ids += [token_id] * part.num_tokens
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        stop_token_ids=tuple(stop),
        seed=seed,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )
    vision = tuple(part for part in prompt if isinstance(part, VisionInput))
    return GenerationRequest(
        name, "tenant", tuple(ids), sampling, vision, tuple(starts), priority, num_choices
    )


def make_tiles(request: GenerationRequest, *, side: int = TILE_SIZE) -> list[Tiles]:
    """Noise that depends on the digest, so that two media never look alike."""
    return [
        np.random.default_rng(list(vision.digest.encode())).integers(
            0, 256, (len(vision.layout.tile_queries), side, side, 3), np.uint8
        )
        for vision in request.vision
    ]
