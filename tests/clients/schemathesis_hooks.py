"""What schemathesis cannot know of this server: a name that is served, and what makes an answer.

A document says nothing of fields that depend on each other, so that most requests made from it
alone would be refused before they are answered. Only what is well formed is changed: nothing wrong
is put right. Loaded by schemathesis, by the name of this file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import schemathesis

LONGEST_ANSWER = 3
_LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
_INT64_MAX = 2**63 - 1


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Any, kwargs: dict[str, Any]) -> None:
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("request"), dict):
        body = body["request"]  # of a form
    if not isinstance(body, dict):
        return
    if not isinstance(body.get("file", ""), str | bytes):
        del body["file"]  # in a form it would be text, and that is a file too
    lengthen_stretches(body)
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["CLIENTS_MODEL"]
    limits = _LIMITS.get(case.path, ())
    if limits and all(map(is_limit, map(body.get, limits))):
        shorten(body, limits)
    if body.get("prompt") in ("", [""]):
        body["prompt"] = "a"  # with most tokenizers an empty text is no token
    if body.get("stream") is True and str(case.query.get("dry_run")).lower() == "true":
        case.query["dry_run"] = "false"


def shorten(body: dict[str, Any], limits: Sequence[str]) -> None:
    """Ask for few tokens, whatever the request says of their number."""
    given = [name for name in limits if body.get(name) is not None]
    for name in given or limits[:1]:
        body[name] = LONGEST_ANSWER
    if is_limit(body.get("min_tokens")):
        body["min_tokens"] = 1


def lengthen_stretches(value: object) -> None:
    """Let every stretch of a video begin with it, so that it does not end before."""
    if isinstance(value, dict):
        if "end_s" in value and is_time(value.get("start_s")) and is_time(value["end_s"]):
            value["start_s"], value["end_s"] = None, 1
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            lengthen_stretches(each)


def is_time(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_limit(value: Any) -> bool:
    """Whether this may be a number of tokens; null says nothing."""
    return value is None or (is_number(value) and 0 <= value <= _INT64_MAX and value == int(value))
