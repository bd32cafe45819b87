"""What a chat request would cost and be answered with, without answering it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from starlette.requests import Request

from server.api.media_usage import MediaUsage
from server.api.models import ServedModel
from server.chat.prepare import Prepared
from server.chat.tokenizer import Tokenizer
from server.core import GenerationRequest
from server.errors import InvalidRequest, UnsupportedParameter, quoted

PARAMETER = "dry_run"
_VALUES = {"true": True, "false": False}


def is_dry_run(request: Request) -> bool:
    """By the query string; InvalidRequest where it says anything but true or false."""
    given = request.query_params.getlist(PARAMETER)
    if not given:
        return False
    if len(given) > 1 or given[0] not in _VALUES:
        raise InvalidRequest(
            f"{PARAMETER} must be true or false, not {quoted(given[-1])}.", param=PARAMETER
        )
    return _VALUES[given[0]]


def refuse_dry_run(request: Request) -> None:
    """For what has none: whoever asks for it does not want to pay for an answer."""
    if PARAMETER in request.query_params:
        raise UnsupportedParameter(f"{PARAMETER} is known to chats alone.", param=PARAMETER)


def described(
    prepared: Prepared, media: MediaUsage, tokenizer: Tokenizer, model: ServedModel, *, name: str
) -> dict[str, object]:
    """The prompt as text, its tokens by what they stand for, and how an answer would be drawn."""
    request, usage = prepared.request, prepared.usage
    sampling = asdict(request.sampling)
    sampling["logit_bias"] = {str(key): bias for key, bias in request.sampling.logit_bias}
    return {
        "object": "chat.completion.dry_run",
        "model": name,
        "prompt": _text_of(request, tokenizer),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "prompt_tokens_details": {
                "text_tokens": usage.text_tokens,
                "image_tokens": usage.image_tokens,
                "video_tokens": usage.video_tokens,
            },
            "media": media.usage(),
        },
        "context": {
            "max_model_len": model.context_length,
            "left_tokens": model.context_length - usage.prompt_tokens,
        },
        "n": request.num_choices,
        "priority": request.priority,
        "stop": list(prepared.stop),
        "sampling": sampling,
        "has_grammar": request.grammar is not None,
    }


def _text_of(request: GenerationRequest, tokenizer: Tokenizer) -> str:
    """Special tokens by their names; of a medium's placeholders the first stands for all."""
    pieces: list[str] = []
    text: list[int] = []
    for token_id in _shown_ids(request):
        special = tokenizer.token_of(token_id)
        if special is None:
            text.append(token_id)
            continue
        pieces += [tokenizer.decode(text), special]
        text = []
    return "".join([*pieces, tokenizer.decode(text)])


def _shown_ids(request: GenerationRequest) -> Sequence[int]:
    shown: list[int] = []
    end = 0
    for vision, start in zip(request.vision, request.vision_starts, strict=True):
        shown += request.prompt_ids[end : start + 1]
        end = start + vision.num_tokens
    return [*shown, *request.prompt_ids[end:]]
