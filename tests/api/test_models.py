from __future__ import annotations

from tests.conftest import MODEL, Server, assert_error
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
