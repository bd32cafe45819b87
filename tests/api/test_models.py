from __future__ import annotations

import openai
import pytest

from server.api.models import ServedModel
from tests.conftest import MODEL, Serve, Server, assert_error, chat
from tests.fakes import FAKE_FACTS


def test_the_model_is_listed(shared_server: Server) -> None:
    body = shared_server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert body["data"] == [
        {
            "id": MODEL,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "hcx-server",
            "max_model_len": FAKE_FACTS.max_request_tokens,
            "modalities": ["text"],
            "media_tokens": {},
        }
    ]


def test_a_model_is_found_by_an_id_with_slashes(shared_server: Server) -> None:
    entry = shared_server.http.get("/v1/models").json()["data"][0]
    for path in (MODEL, MODEL.replace("/", "%2F")):
        assert shared_server.http.get(f"/v1/models/{path}").json() == entry
    for path in ("gpt-4o", "fakes", "fakes/tiny/", "FAKES/tiny", "fakes/tiny/x"):
        assert_error(
            shared_server.http.get(f"/v1/models/{path}"), 404, "model_not_found", param="model"
        )


def test_before_the_engine_is_measured_the_context_is_what_the_checkpoint_says(
    server: Server,
) -> None:
    server.engine.facts = None
    assert server.http.get(f"/v1/models/{MODEL}").json()["max_model_len"] == 4096


def test_a_model_may_have_further_names(serve: Serve) -> None:
    """Each is listed and accepted, and answers echo the one that was asked for."""
    served = ServedModel(
        MODEL,
        context_length=4096,
        created_s=1_700_000_000,
        aliases=("gpt-4o", "team/vision"),
        media_tokens={"image": (17, 96), "video": (16, 576)},
    )
    server = serve(model=served)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        listed = client.models.list().data
        assert [each.id for each in listed] == [MODEL, "gpt-4o", "team/vision"]
        for each in listed:
            assert client.models.retrieve(each.id) == each
            told = each.to_dict()
            assert told["modalities"] == ["text", "image", "video"]
            assert told["media_tokens"] == {
                "image": {"least": 17, "most": 96},
                "video": {"least": 16, "most": 576},
            }
            asked = chat() | {"model": each.id}
            assert client.chat.completions.create(**asked).model == each.id
            chunks = list(client.chat.completions.create(**asked, stream=True))
            assert {chunk.model for chunk in chunks} == {each.id}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**(chat() | {"model": "gpt-4"}))
