"""Which of the two kinds of body a request brings, by its content-type: the only place that asks.

A route that reads JSON calls `require_json`, one that reads a form `require_multipart`. Must not
know any route.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from server.errors import UnsupportedContentType

_JSON = re.compile(
    r"application/json[ \t]*(;[ \t]*charset=(utf-8|\"utf-8\"))?[ \t]*;?", re.ASCII | re.IGNORECASE
)
_MULTIPART = re.compile(r"multipart/form-data[ \t]*(;.*)?", re.ASCII | re.IGNORECASE)


def is_multipart(headers: Headers) -> bool:
    """Whether the body says to be multipart/form-data, and nothing else beside."""
    return _has_one_of(headers, _MULTIPART)


def require_json(headers: Headers) -> None:
    """UnsupportedContentType unless the body is JSON in UTF-8."""
    if not _has_one_of(headers, _JSON):
        raise UnsupportedContentType()


def require_multipart(headers: Headers) -> str:
    """The content-type of a form; UnsupportedContentType where the body is something else."""
    if not is_multipart(headers):
        raise UnsupportedContentType(
            "The request body must be sent as multipart/form-data, without encoding."
        )
    return headers["content-type"]


def _has_one_of(headers: Headers, pattern: re.Pattern[str]) -> bool:
    given = headers.getlist("content-type")
    return len(given) == 1 and pattern.fullmatch(given[0]) is not None
