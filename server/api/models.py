"""GET /v1/models and /v1/models/{id}: the one model served here. An id may hold slashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.json_body import json_response
from server.core import MediaKind
from server.errors import ModelNotFound, quoted

router = APIRouter()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model under the names clients use; `created_s` in seconds since 1970.

    `media_tokens` are the least and the most tokens of one medium of each kind that the model
    takes: none where it takes only text.
    """

    name: str
    context_length: int
    created_s: int
    aliases: tuple[str, ...] = ()
    media_tokens: Mapping[MediaKind, tuple[int, int]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def check_name(model: ServedModel, name: str) -> None:
    """ModelNotFound unless `name` is served."""
    if name not in model.names:
        raise ModelNotFound(f"The model {quoted(name)} does not exist.", param="model")


def context_length(request: Request) -> int:
    """Of prompt and answer together; known exactly once the engine has measured its cache."""
    state = request.app.state
    facts = state.engine.facts
    tokens: int = facts.max_request_tokens if facts else state.model.context_length
    return tokens


@router.get("/v1/models")
async def models(request: Request) -> Response:
    names = request.app.state.model.names
    return json_response({"object": "list", "data": [_entry(request, name) for name in names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    check_name(request.app.state.model, name)
    return json_response(_entry(request, name))


def _entry(request: Request, name: str) -> dict[str, object]:
    served: ServedModel = request.app.state.model
    return {
        "id": name,
        "object": "model",
        "created": served.created_s,
        "owned_by": "hcx-server",
        "max_model_len": context_length(request),
        "modalities": ["text", *served.media_tokens],
        "media_tokens": {
            kind: {"least": least, "most": most}
            for kind, (least, most) in served.media_tokens.items()
        },
    }
