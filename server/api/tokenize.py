"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokens without the model.

The shapes are vLLM's. A conversation's media are read for the number of their tokens, as in a dry
run. Special tokens come from ids and templates alone: a text that spells one is text here too. Must
not know how text is encoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.dry_run import refuse_dry_run
from server.api.json_body import json_response, read_json_object
from server.api.media_usage import MediaUsage
from server.api.metrics import counting_refusals
from server.api.models import check_name, context_length
from server.api.schemas import UNSUPPORTED, check_names, check_salt, parse_ending
from server.api.sse import in_time
from server.chat.options import parse_request_options
from server.chat.prepare import ChatRequest, Preparer, RawPrompt
from server.chat.tools import parse_tools
from server.errors import (
    InvalidType,
    MediaError,
    MissingParameter,
    UnsupportedParameter,
)

Result = TypeVar("Result")

CONVERSATION_FIELDS: Final = (
    *("add_generation_prompt", "continue_final_message", "media_options", "tools", "tool_choice"),
    "cache_salt",
)
"""What has a meaning only with messages."""

TOKENIZE_FIELDS: Final = frozenset(
    {"model", "prompt", "messages", "add_special_tokens", *CONVERSATION_FIELDS}
)
TOKENIZE_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    name: neutral for name, neutral in UNSUPPORTED.items() if name not in TOKENIZE_FIELDS
} | {"return_token_strs": (False,)}

DETOKENIZE_FIELDS: Final = frozenset({"model", "tokens"})

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """`{"prompt": text}` as a completion's, or `{"messages": [...]}` as a conversation's prompt."""
    body = await _read(request, TOKENIZE_FIELDS, TOKENIZE_UNSUPPORTED)
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise MissingParameter("Either prompt or messages is required.", param="prompt")
    encode = _text if messages is None else _conversation
    ids = await _answered(request, encode(request, body))
    max_model_len = context_length(request)
    return json_response({"count": len(ids), "max_model_len": max_model_len, "tokens": ids})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of `{"tokens": [...]}`, to which special tokens add nothing."""
    body = await _read(request, DETOKENIZE_FIELDS, {})
    tokens = body.get("tokens")
    if tokens is None:
        raise MissingParameter("tokens is required.", param="tokens")
    if not isinstance(tokens, list):
        raise InvalidType("tokens must be an array.", param="tokens")
    preparer: Preparer = request.app.state.preparer
    decode = preparer.decode(tokens, "tokens", tenant=request.state.tenant)
    return json_response({"prompt": await _answered(request, decode)})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    preparer: Preparer = request.app.state.preparer
    tokenizer = preparer.tokenizer
    return json_response(
        {
            "tokenizer_class": "ByteLevelBPE",
            "vocab_size": tokenizer.size,
            "max_model_len": context_length(request),
            "special_tokens": tokenizer.special,
            **preparer.named_special_tokens,
        }
    )


async def _answered(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Within the time of a request, and only while its client is there."""
    deadline_s = asyncio.get_running_loop().time() + request.app.state.http.request_timeout_s
    with counting_refusals(request.app.state.metrics):
        return await in_time(work, receive=request.receive, deadline_s=deadline_s)


async def _text(request: Request, body: Mapping[str, Any]) -> Sequence[int]:
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        raise InvalidType("prompt must be a string.", param="prompt")
    for name in CONVERSATION_FIELDS:
        if body.get(name) is not None:
            raise UnsupportedParameter(f"{name} has a meaning only with messages.", param=name)
    preparer: Preparer = request.app.state.preparer
    return await preparer.encode_raw(
        RawPrompt(prompt, "prompt"),
        tenant=request.state.tenant,
        add_special_tokens=_flag(body, "add_special_tokens") is not False,
    )


async def _conversation(request: Request, body: Mapping[str, Any]) -> Sequence[int]:
    messages = body["messages"]
    if not isinstance(messages, list):
        raise InvalidType("messages must be an array.", param="messages")
    if _flag(body, "add_special_tokens"):
        raise UnsupportedParameter(
            "add_special_tokens has no meaning with messages: their template has them.",
            param="add_special_tokens",
        )
    options, token_budget = parse_request_options(body.get("media_options"), "media_options")
    asked = ChatRequest(
        messages,
        media_options=options,
        visual_token_budget=token_budget,
        ending=parse_ending(
            _flag(body, "add_generation_prompt"), _flag(body, "continue_final_message")
        ),
        tools=parse_tools(body.get("tools"), body.get("tool_choice"), None),
        cache_salt=check_salt(body.get("cache_salt")),
    )
    preparer: Preparer = request.app.state.preparer
    metrics = request.app.state.metrics
    try:
        prompt = await preparer.encode_messages(asked, tenant=request.state.tenant)
    except MediaError as error:
        metrics.count_medium(error.kind, error.code)
        raise
    MediaUsage(metrics).prepared(prompt.reports)
    return prompt.ids


async def _read(
    request: Request, known: frozenset[str], unsupported: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    """The body; with a `model` only one that is served."""
    state = request.app.state
    refuse_dry_run(request)
    body = await read_json_object(request)
    num_unknown = check_names(body, known, unsupported, is_strict=state.http.strict)
    request.state.num_unknown_parameters = num_unknown
    state.metrics.count_unknown_parameters(num_unknown)
    model = body.get("model")
    if model is not None:
        if not isinstance(model, str):
            raise InvalidType("model must be a string.", param="model")
        check_name(request.app.state.model, model)
    return body


def _flag(body: Mapping[str, Any], name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidType(f"{name} must be true or false.", param=name)
    return value
