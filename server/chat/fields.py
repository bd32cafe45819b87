"""The checks that every reader of a client's JSON makes, with the contract's 400s.

`path` is where the value lies in the request, as its error will say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from server.errors import (
    InvalidRequest,
    InvalidType,
    MissingParameter,
    StringTooLong,
    UnknownParameter,
    quoted,
)

NAME_PATTERN: Final = "[A-Za-z0-9_-]{1,64}"
"""OpenAI's rule for the names of functions and of forms."""

_NAME = re.compile(NAME_PATTERN, re.ASCII)


def as_name(value: object, path: str) -> str:
    """A string that may name a function or a form; InvalidType or InvalidRequest."""
    name = as_string(value, path)
    if not _NAME.fullmatch(name):
        raise InvalidRequest("A name must be 1 to 64 of A-Z a-z 0-9 _ -.", param=path)
    return name


def as_object(value: object, path: str) -> Mapping[str, Any]:
    """The same; InvalidType where it is no object."""
    if not isinstance(value, Mapping):
        raise InvalidType("This must be an object.", param=path)
    return value


def required(values: Mapping[str, Any], name: str, path: str) -> object:
    """The value of a field; MissingParameter where it is absent or null."""
    if values.get(name) is None:
        raise MissingParameter(f"{name} is missing.", param=path)
    value: object = values[name]
    return value


def refuse_unknown(values: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    """UnknownParameter for the first field that is not among these."""
    for name in values:
        if name not in known:
            # The name is the client's, so that the path shows no more of it than a message may.
            raise UnknownParameter(
                f"{quoted(name)} is not known here.", param=f"{path}.{quoted(name)[1:-1]}"
            )


def as_string(value: object, path: str, *, max_chars: int | None = None) -> str:
    """The same; InvalidType, StringTooLong, or InvalidRequest where it is no Unicode text."""
    if not isinstance(value, str):
        raise InvalidType("This must be a string.", param=path)
    if max_chars is not None and len(value) > max_chars:
        raise StringTooLong(
            f"At most {max_chars} characters are accepted here, not {len(value)}.", param=path
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("This text holds half of a surrogate pair.", param=path) from None
    return value
