from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from server.api.limits import ENGINE_SETTINGS, HTTP_SETTINGS, MEDIA_SETTINGS, effective_limits
from server.config import EngineConfig, HttpConfig, MediaConfig
from tests.conftest import Serve, Server, assert_error
from tests.fakes import FAKE_FACTS

KEYS = {"alice": hashlib.sha256(b"sesame").hexdigest()}


def test_the_limits_in_force_are_told(serve: Serve) -> None:
    server = serve(
        http=HttpConfig(max_body_bytes=12_345),
        media=MediaConfig(max_images=3, allowed_ports=(443,)),
    )
    limits = server.http.get("/v1/limits").json()
    assert set(limits) == {"http", "media", "engine", "chat"}
    assert limits["http"]["max_body_bytes"] == 12_345
    assert limits["http"]["max_json_depth"] == 64
    assert limits["media"]["max_images"] == 3
    assert limits["media"]["allowed_ports"] == [443]
    assert limits["engine"]["max_requests_waiting"] == EngineConfig().max_requests_waiting
    assert limits["engine"]["max_requests_per_key"] is None
    assert limits["engine"]["kv_cache_tokens"] == FAKE_FACTS.kv_tokens
    assert limits["chat"]["max_context_tokens"] == FAKE_FACTS.max_request_tokens
    assert limits["chat"]["max_choices"] == 8
    assert limits["chat"]["max_prompts"] == 64


def test_a_stated_limit_is_the_one_that_is_enforced(server: Server) -> None:
    limits = server.http.get("/v1/limits").json()["http"]
    deep = "[" * limits["max_json_depth"] + "]" * limits["max_json_depth"]
    response = server.http.post(
        "/tokenize",
        content=f'{{"prompt": {deep}}}',
        headers={"content-type": "application/json"},
    )
    assert_error(response, 400, "invalid_json")


def test_before_the_engine_is_measured_the_context_is_the_checkpoints(server: Server) -> None:
    server.engine.facts = None
    limits = server.http.get("/v1/limits").json()
    assert limits["chat"]["max_context_tokens"] == 4096
    assert limits["engine"]["kv_cache_tokens"] is None


def test_they_need_a_key(serve: Serve) -> None:
    server = serve(http=HttpConfig(api_keys=KEYS))
    assert_error(server.http.get("/v1/limits"), 401, "invalid_api_key")
    response = server.http.get("/v1/limits", headers={"authorization": "Bearer sesame"})
    assert response.json()["engine"]["max_requests_per_key"] == 64


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (HttpConfig, HTTP_SETTINGS),
        (MediaConfig, MEDIA_SETTINGS),
        (EngineConfig, ENGINE_SETTINGS),
    ],
)
def test_every_name_is_a_setting(section: Any, names: tuple[str, ...]) -> None:
    assert set(names) <= set(section.model_fields)
    assert len(set(names)) == len(names)


def test_nothing_that_is_nobodys_business_is_among_them() -> None:
    secret = "canary"
    shown = json.dumps(
        effective_limits(
            HttpConfig(
                host=secret, admin_host=secret, api_keys=KEYS, api_keys_file=Path(f"/{secret}")
            ),
            MediaConfig(
                proxy=f"http://{secret}:1",
                allowed_hosts=(secret,),
                denied_hosts=(secret,),
                allowed_private_hosts=(secret,),
                ca_file=Path(f"/{secret}"),
                cache_dir=Path(f"/{secret}"),
                local_root=Path(f"/{secret}"),
                files_dir=Path(f"/{secret}"),
                spool_dir=Path(f"/{secret}"),
            ),
            EngineConfig(),
            context_length=100,
            facts=None,
        )
    )
    for word in (secret, "alice", *KEYS.values(), "/"):
        assert word not in shown
