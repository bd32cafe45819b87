"""Whether a request can be computed at all, asked twice: before it is sent and after it arrives.

Every id that will index anything is checked here against the width of the logits, and every
placeholder against the features its media will make.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.core import GenerationRequest, Tiles, VisionSpec
from server.engine.facts import EngineFacts
from server.errors import CONTEXT_IS, InvalidPrompt, InvalidRequest, PromptTooLong


def check_request(
    request: GenerationRequest,
    tiles: Sequence[Tiles],
    *,
    facts: EngineFacts,
    vision: VisionSpec | None,
) -> None:
    """Raises the InvalidRequest that says what is wrong."""
    num_tokens = len(request.prompt_ids) + request.sampling.max_tokens
    if not request.prompt_ids:
        raise InvalidPrompt("The prompt is empty.")
    if request.sampling.max_tokens < 1:
        raise InvalidRequest("The answer must be allowed at least one token.", param="max_tokens")
    if request.grammar is not None and not request.sampling.stop_token_ids:
        raise InvalidRequest(
            "With ignore_eos nothing could end an answer of the form that is asked for.",
            param="ignore_eos",
        )
    if request.num_choices < 1:
        raise InvalidRequest("A request has at least one choice.", param="n")
    if num_tokens > facts.max_request_tokens:
        raise PromptTooLong(
            f"{CONTEXT_IS} {facts.max_request_tokens} tokens here; {len(request.prompt_ids)} in "
            f"the prompt and {request.sampling.max_tokens} for the answer are more.",
            param="messages",
        )
    num_ids = min(facts.logits_width, facts.embedding_rows)
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= num_ids:
        raise InvalidPrompt("The prompt holds a token id that the model does not have.")
    sampling = request.sampling
    for param, ids in (
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if any(not 0 <= token_id < facts.logits_width for token_id in ids):
            raise InvalidRequest(
                f"{param} holds an id that is not below {facts.logits_width}.", param=param
            )
    if vision is None:
        if request.vision or tiles:
            raise InvalidPrompt("This model takes no pictures or videos.")
    else:
        _check_vision(request, tiles, vision)


def _check_vision(request: GenerationRequest, tiles: Sequence[Tiles], vision: VisionSpec) -> None:
    if not len(request.vision) == len(request.vision_starts) == len(tiles):
        raise InvalidPrompt("The media and their places in the prompt differ in number.")
    placeholder_ids = {"image": vision.image_token_id, "video": vision.video_token_id}
    position = 0
    num_promised = 0
    for medium, start, pixels in zip(request.vision, request.vision_starts, tiles, strict=True):
        stop = start + medium.num_tokens
        placeholders = request.prompt_ids[start:stop]
        if start < position or set(placeholders) != {placeholder_ids[medium.kind]}:
            raise InvalidPrompt("A medium does not stand where the prompt has room for it.")
        if len(placeholders) != medium.num_tokens:
            raise InvalidPrompt("A medium and its places in the prompt differ in length.")
        side = vision.tile_size
        if pixels.shape != (len(medium.layout.tile_queries), side, side, 3):
            raise InvalidPrompt("A medium does not have the tiles it says it has.")
        position = stop
        num_promised += medium.num_tokens
    ids = {vision.image_token_id, vision.video_token_id}
    if sum(token_id in ids for token_id in request.prompt_ids) != num_promised:
        raise InvalidPrompt("The prompt has places for media that were not sent.")
