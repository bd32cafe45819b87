"""GET /v1/limits: what this server allows, as configured and as built in.

Only what is named here is shown: no path, host or key can slip out with a new setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from server.api import chat, json_body, middleware, schemas
from server.api.json_body import json_response
from server.chat import grammar, parts, prepare, tools
from server.config import EngineConfig, HttpConfig, MediaConfig
from server.engine.client import EngineFacts

HTTP_SETTINGS: Final = (
    "strict",
    "max_body_bytes",
    "max_multipart_bytes",
    "max_header_bytes",
    "headers_timeout_s",
    "receive_timeout_s",
    "max_connections",
    "keep_alive_timeout_s",
    "request_timeout_s",
    "drain_timeout_s",
)

MEDIA_SETTINGS: Final = (
    "max_images",
    "max_videos",
    "max_image_bytes",
    "max_video_bytes",
    "max_request_bytes",
    "max_image_pixels",
    "max_image_side",
    "max_image_aspect",
    "max_video_pixels",
    "max_video_duration_s",
    "max_video_packets",
    "max_video_frames_decoded",
    "image_decode_timeout_s",
    "video_decode_timeout_s",
    "image_decode_memory_bytes",
    "video_decode_memory_bytes",
    "decode_processes",
    "max_decodes_waiting",
    "allowed_ports",
    "connect_timeout_s",
    "first_byte_timeout_s",
    "image_fetch_timeout_s",
    "video_fetch_timeout_s",
    "min_fetch_bytes_per_s",
    "max_redirects",
    "max_fetches",
    "max_fetches_per_host",
    "max_fetches_per_request",
    "max_fetches_waiting",
    "cache_bytes",
    "cache_ttl_s",
    "files_ttl_s",
    "max_files_bytes_per_key",
)

ENGINE_SETTINGS: Final = (
    "encoder_cache_bytes",
    "max_requests_running",
    "max_requests_waiting",
    "max_wait_s",
    "max_requests_per_key",
    "loading_timeout_s",
    "step_timeout_s",
    "shutdown_timeout_s",
    "restart_delay_max_s",
)

HTTP_CONSTANTS: Final[Mapping[str, float]] = {
    "max_headers": middleware.MAX_HEADERS,
    "max_header_line_bytes": middleware.MAX_HEADER_LINE_BYTES,
    "min_body_bytes_per_s": middleware.MIN_BODY_BYTES_PER_S,
    "max_json_depth": json_body.MAX_DEPTH,
    "max_json_keys": json_body.MAX_KEYS,
    "max_json_values": json_body.MAX_VALUES,
}

CHAT_CONSTANTS: Final[Mapping[str, int]] = {
    "max_messages": parts.MAX_MESSAGES,
    "max_parts": parts.MAX_PARTS,
    "max_hint_chars": parts.MAX_HINT_CHARS,
    "max_attachments": chat.MAX_ATTACHMENTS,
    "max_choices": schemas.MAX_CHOICES,
    "max_prompts": schemas.MAX_PROMPTS,
    "max_prompts_times_choices": schemas.MAX_PROMPTS_TIMES_CHOICES,
    "max_stop_strings": schemas.MAX_STOP_STRINGS,
    "max_stop_chars": schemas.MAX_STOP_CHARS,
    "max_stop_token_ids": schemas.MAX_STOP_IDS,
    "max_logit_biases": schemas.MAX_BIASES,
    "max_top_logprobs": schemas.MAX_TOP_LOGPROBS,
    "max_completion_logprobs": schemas.MAX_COMPLETION_LOGPROBS,
    "max_user_bytes": schemas.MAX_USER_BYTES,
    "max_cache_salt_bytes": schemas.MAX_SALT_BYTES,
    "max_metadata_pairs": schemas.MAX_METADATA,
    "max_schema_bytes": grammar.MAX_SCHEMA_BYTES,
    "max_schema_depth": grammar.MAX_SCHEMA_DEPTH,
    "max_schema_properties": grammar.MAX_PROPERTIES,
    "max_schema_enum_values": grammar.MAX_ENUM_VALUES,
    "max_regex_chars": grammar.MAX_REGEX_CHARS,
    "max_tools": tools.MAX_TOOLS,
    "max_tool_schemas_bytes": tools.MAX_SCHEMAS_BYTES,
    "max_tool_calls": tools.MAX_CALLS,
    "max_tool_calls_in_message": parts.MAX_CALLS,
}

router = APIRouter()


@router.get("/v1/limits")
async def limits(request: Request) -> Response:
    state = request.app.state
    return json_response(
        effective_limits(
            state.http,
            state.media,
            state.engine_limits,
            context_length=state.model.context_length,
            facts=state.engine.facts,
        )
    )


def effective_limits(
    http: HttpConfig,
    media: MediaConfig,
    engine: EngineConfig,
    *,
    context_length: int,
    facts: EngineFacts | None,
) -> dict[str, dict[str, object]]:
    """By group and name; units are in the names, and null is no limit.

    `context_length` is that of the prompts; without `facts` the engine has not been measured yet.
    """
    of_engine = _chosen(engine, ENGINE_SETTINGS)
    if not http.api_keys:
        # Without keys everyone is one caller, under the server's own limits.
        of_engine["max_requests_per_key"] = None
    of_engine["kv_cache_tokens"] = facts.kv_tokens if facts else None
    return {
        "http": {**_chosen(http, HTTP_SETTINGS), **HTTP_CONSTANTS},
        "media": _chosen(media, MEDIA_SETTINGS),
        "engine": of_engine,
        "chat": {
            "max_context_tokens": facts.max_request_tokens if facts else context_length,
            "max_text_bytes": prepare.MAX_BYTES_PER_CONTEXT_TOKEN * context_length,
            "max_encodes_waiting": prepare.MAX_ENCODES_WAITING,
            **CHAT_CONSTANTS,
        },
    }


def _chosen(section: BaseModel, names: tuple[str, ...]) -> dict[str, object]:
    return section.model_dump(include=set(names))
