"""Write docs/compatibility.md: what becomes of each field that OpenAI's API knows, from the code.

    python -m tools.compatibility

Which fields OpenAI knows is asked of its own client library; what this server does with them, of
the tables that it parses requests by.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.api.response_fields import RESPONSE_UNSUPPORTED
from server.api.response_schemas import response_fields
from server.api.schemas import (
    COMPLETION_UNSUPPORTED,
    SHARED_FIELDS,
    UNSUPPORTED,
    CompletionFields,
)
from server.api.wire_schemas import COMPLETION_NOTES, HINTS, chat_fields, fields_of

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
UNLIMITED = 2**31 - 1
"""A bound of this size only says how wide the number is."""

INTRODUCTION = """# Compatibility with OpenAI's API

<!-- Written by `make compatibility`, from the code; a test compares the two. -->

What becomes of each field of a request. Nothing is ignored in silence:

- *honoured*: it does what OpenAI documents, within the limits named here
- *hint*: taken, checked and not used, as OpenAI's own servers may
- *only ...*: of these values, which ask for nothing, none is refused; any other is answered with
  400 `unsupported_parameter`, as is every value of a field that is *refused*

`null` is always the same as nothing. [The API](api.md) says more; `/openapi.json` says it to
programs.
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What one endpoint knows. `params` are the classes that tell OpenAI's fields."""

    title: str
    params: tuple[type, ...]
    honoured: Mapping[str, Mapping[str, Any]]
    unsupported: Mapping[str, tuple[object, ...]]

    @property
    def fields(self) -> list[str]:
        """OpenAI's, in the order of their names."""
        return sorted({name for each in self.params for name in each.__annotations__})

    @property
    def own_fields(self) -> list[str]:
        """Those that OpenAI does not know."""
        return sorted({*self.honoured, *self.unsupported} - set(self.fields))

    def is_known(self, field: str) -> bool:
        return field in self.honoured or field in self.unsupported


def endpoints() -> tuple[Endpoint, ...]:
    chat = chat_fields()
    own = fields_of(CompletionFields, COMPLETION_NOTES)
    return (
        Endpoint(
            "Chat completions",
            (
                chat_create_params.CompletionCreateParamsBase,
                chat_create_params.CompletionCreateParamsStreaming,
            ),
            chat,
            UNSUPPORTED,
        ),
        Endpoint(
            "Completions",
            (
                completion_create_params.CompletionCreateParamsBase,
                completion_create_params.CompletionCreateParamsStreaming,
            ),
            {name: chat[name] for name in SHARED_FIELDS} | own,
            COMPLETION_UNSUPPORTED,
        ),
        Endpoint(
            "Responses",
            (
                response_create_params.ResponseCreateParamsBase,
                response_create_params.ResponseCreateParamsStreaming,
            ),
            response_fields(),
            RESPONSE_UNSUPPORTED,
        ),
    )


def page() -> str:
    """The whole file."""
    return INTRODUCTION + "".join(map(_section, endpoints()))


def _section(endpoint: Endpoint) -> str:
    honoured = [name for name in endpoint.own_fields if name in endpoint.honoured]
    refused = [name for name in endpoint.own_fields if name not in endpoint.honoured]
    return (
        f"\n## {endpoint.title}\n\n{_table(endpoint, endpoint.fields)}\n"
        f"Beyond OpenAI:\n\n{_table(endpoint, honoured)}\n"
        f"Known from other servers or endpoints, and not honoured: {_listed(refused)}.\n"
    )


def _table(endpoint: Endpoint, fields: Iterable[str]) -> str:
    rows = "".join(
        f"| `{name}` | {kind} | {words} |\n"
        for name in fields
        for kind, words in [_fate(endpoint, name)]
    )
    return f"| field | | |\n|---|---|---|\n{rows}"


def _fate(endpoint: Endpoint, name: str) -> tuple[str, str]:
    """What becomes of a field, in one word and in more."""
    if name in endpoint.honoured:
        schema = endpoint.honoured[name]
        if name in HINTS:
            return "hint", schema["description"]
        return "honoured", "; ".join(filter(None, (_range(schema), schema["description"])))
    neutral = endpoint.unsupported[name]
    return ("only " + _values(neutral), "") if neutral else ("refused", "")


def _values(values: Sequence[object]) -> str:
    return " or ".join(f"`{_json(value)}`" for value in values)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _range(schema: Mapping[str, Any]) -> str:
    """The bounds of a field that has but one form, in a few words."""
    forms = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    if len(forms) != 1:
        return ""
    (form,) = forms
    least, most = form.get("minimum"), form.get("maximum")
    if "exclusiveMinimum" in form:
        return f"above {form['exclusiveMinimum']}, to {most}"
    if least is not None and most is not None:
        if least <= -UNLIMITED:
            return f"an integer of {most.bit_length() + 1} bits"
        return f"{least} and up" if most >= UNLIMITED else f"{least} to {most}"
    for bound, text in (
        ("maxItems", "up to {:,}"),
        ("maxProperties", "up to {:,}"),
    ):
        if bound in form:
            return text.format(form[bound])
    return ""


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
