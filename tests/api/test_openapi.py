from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api.docs_page import render_page
from server.api.openapi import ROUTES, openapi_document
from server.api.response_fields import (
    RESPONSE_SHARED_FIELDS,
    RESPONSE_UNSUPPORTED,
    TOOL_FIELDS,
    ResponseFields,
)
from server.api.response_schemas import NOTES_OF_RESPONSES
from server.api.schemas import (
    SHARED_FIELDS,
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionFields,
)
from server.api.wire_schemas import COMPLETION_NOTES, NOTES, PART_SCHEMAS, error_codes
from server.app import FILE_ROUTERS, ROUTERS
from server.chat.options import FIELDS_OF, MediaOptions
from server.chat.parts import PART_TYPES
from server.config import ApiKey, HttpConfig
from server.media.store import FileStore
from tests.conftest import MODEL, Serve, Server, assert_error, running

KEY = {"alice": ApiKey(sha256=hashlib.sha256(b"sesame").hexdigest())}


@pytest.fixture(scope="module")
def with_files(
    build: Callable[..., FastAPI], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    store = FileStore(tmp_path_factory.mktemp("files"), 3600.0, 1 << 20)
    with running(build(files=store)) as served:
        yield served


@pytest.fixture(scope="module")
def document(with_files: Server) -> dict[str, Any]:
    response = with_files.http.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    whole: dict[str, Any] = response.json()
    return whole


def test_every_route_is_described_and_no_other(document: dict[str, Any]) -> None:
    of_routers = {
        (route.path.replace(":path", ""), method.lower())
        for router in (*ROUTERS, *FILE_ROUTERS)
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    of_page = {("/openapi.json", "get"), ("/docs", "get")}
    described = {(path, method) for path, given in document["paths"].items() for method in given}
    assert described == of_routers | of_page


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            if name == "$ref":
                yield each
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    found = set(references(document))
    assert found
    for each in found:
        part: Any = document
        for step in each.removeprefix("#/").split("/"):
            part = part[step]
        assert part


def test_names_are_given_once(document: dict[str, Any]) -> None:
    names = [route.name for route in ROUTES]
    assert len(set(names)) == len(names)


def test_fields_and_forms_are_those_that_are_parsed(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert set(chat["properties"]) == {*ChatCompletionRequest.model_fields, *UNSUPPORTED}
    assert "additionalProperties" not in chat
    assert chat["properties"]["temperature"]["anyOf"][0] == {
        "type": "number",
        "minimum": 0,
        "maximum": 2,
    }
    assert chat["properties"]["n"]["anyOf"][0]["maximum"] == 8
    assert chat["properties"]["model"]["examples"] == [MODEL]
    response = schemas["ResponseRequest"]["properties"]
    honoured = {*RESPONSE_SHARED_FIELDS, *TOOL_FIELDS, *ResponseFields.model_fields}
    assert set(response) == honoured | set(RESPONSE_UNSUPPORTED)
    assert set(PART_SCHEMAS) == set(PART_TYPES)
    assert all(schema["additionalProperties"] is False for schema in PART_SCHEMAS.values())
    options = schemas["MediaOptions"]["properties"]
    assert set(options) == {field.name for field in fields(MediaOptions)}
    assert set(schemas["ImageOptions"]["properties"]) == set(FIELDS_OF["image"])


def test_each_honoured_field_has_its_words() -> None:
    assert set(NOTES) == set(ChatCompletionRequest.model_fields)
    assert set(COMPLETION_NOTES) == set(CompletionFields.model_fields)
    assert set(SHARED_FIELDS) <= set(NOTES)
    assert {*ResponseFields.model_fields, *TOOL_FIELDS} == set(NOTES_OF_RESPONSES)


def test_strictness_is_told(serve: Serve) -> None:
    document = serve(http=HttpConfig(strict=True)).http.get("/openapi.json").json()
    assert (
        document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False
    )
    assert "/v1/files" not in document["paths"]


def test_errors_are_those_of_the_error_tree(document: dict[str, Any]) -> None:
    codes = error_codes()
    assert "invalid_video_url" in codes[400] and codes[503]["model_loading"].startswith("service")
    error = document["components"]["schemas"]["Error404"]["properties"]["error"]["properties"]
    assert set(error["code"]["enum"]) == {"model_not_found", "file_not_found", "unknown_url"}
    for response in document["components"]["responses"].values():
        assert response["headers"]["x-request-id"]["$ref"].endswith("x-request-id")


class Page(HTMLParser):
    """What a page would load or run, and what it can be searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_and_runs_nothing(with_files: Server) -> None:
    response = with_files.http.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    style = re.search(r"<style>(.*)</style>", response.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = response.headers["content-security-policy"]
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    page = Page()
    page.feed(response.text)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "style", "onclick"} & set(attrs)
        if tag == "a":
            target = attrs["href"] or ""
            assert target == "openapi.json" or target.removeprefix("#") in ids
    for words in ("/v1/chat/completions", "context_length_exceeded", "lens_keywords", "at most 8"):
        assert words in page.text


def test_with_keys_nothing_is_shown_unless_wanted(serve: Serve) -> None:
    closed = serve(http=HttpConfig(api_keys=KEY))
    for path in ("/docs", "/openapi.json"):
        assert_error(closed.http.get(path), 401, "invalid_api_key")
        with_key = closed.http.get(path, headers={"authorization": "Bearer sesame"})
        assert_error(with_key, 404, "unknown_url")
    shown = serve(http=HttpConfig(api_keys=KEY, docs=True))
    assert shown.http.get("/docs").status_code == 200
    document = shown.http.get("/openapi.json").json()
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert_error(shown.http.get("/v1/models"), 401, "invalid_api_key")


def test_without_keys_it_can_be_hidden(serve: Serve) -> None:
    server = serve(http=HttpConfig(docs=False))
    for path in ("/docs", "/openapi.json"):
        assert_error(server.http.get(path), 404, "unknown_url")


def test_a_document_is_only_text_on_the_page() -> None:
    document = openapi_document(
        HttpConfig(), version="<script>1</script>", model_name="m", has_files=False
    )
    assert "<script>" not in render_page(document)
