"""GET /v1/models and /v1/models/{id}: the one model served here. An id may hold slashes."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.json_body import json_response
from server.errors import ModelNotFound, quoted

router = APIRouter()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model under the name clients use; `created_s` in seconds since 1970."""

    name: str
    context_length: int
    created_s: int


def check_name(model: ServedModel, name: str) -> None:
    """ModelNotFound unless `name` is served."""
    if name != model.name:
        raise ModelNotFound(f"The model {quoted(name)} does not exist.", param="model")


@router.get("/v1/models")
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_entry(request)]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    check_name(request.app.state.model, name)
    return json_response(_entry(request))


def _entry(request: Request) -> dict[str, object]:
    state = request.app.state
    facts = state.engine.facts
    return {
        "id": state.model.name,
        "object": "model",
        "created": state.model.created_s,
        "owned_by": "hcx-server",
        # Known exactly once the engine has measured its cache.
        "max_model_len": facts.max_request_tokens if facts else state.model.context_length,
    }
