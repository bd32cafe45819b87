from __future__ import annotations

import pytest

from server.api.schemas import ChatCompletionRequest
from server.api.wire_schemas import HINTS
from tools.compatibility import PAGE, Endpoint, endpoints, page


def test_the_page_is_what_the_code_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make compatibility"


@pytest.mark.parametrize("endpoint", endpoints(), ids=lambda endpoint: endpoint.title)
def test_no_field_of_openai_is_unknown(endpoint: Endpoint) -> None:
    assert {"model", "stream", "temperature"} <= set(endpoint.fields)
    assert [name for name in endpoint.fields if not endpoint.is_known(name)] == []


def test_every_row_tells_what_becomes_of_its_field() -> None:
    rows = [line.split("|") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for _, name, kind, words, _ in rows:
        assert kind.strip() in ("honoured", "hint", "refused") or kind.startswith(" only `"), name
        assert bool(words.strip()) == (kind.strip() in ("honoured", "hint")), name


def test_hints_are_fields() -> None:
    assert set(HINTS) <= set(ChatCompletionRequest.model_fields)
