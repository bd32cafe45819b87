"""How long an answer may be used again: the part of HTTP caching (RFC 9111) that media need.

Stricter than it must be where that costs little: what is `private` is not kept, because without API
keys everybody is one tenant; nothing is guessed from `Last-Modified`; nothing stale is ever used.
Must not know where answers are kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import httpx

_MAX_VALIDATOR_CHARS = 512


@dataclass(frozen=True)
class StoredAnswer:
    """An answer's bytes, with what it takes to use them again. Times are seconds since 1970."""

    data: bytes
    etag: str | None
    last_modified: str | None
    stored_at_s: float
    fresh_until_s: float

    def is_fresh(self, now_s: float) -> bool:
        """Never before it was stored: then the clock was set back, and tells nothing."""
        return self.stored_at_s <= now_s < self.fresh_until_s

    def conditions(self) -> dict[str, str]:
        """Request headers that ask for the answer only if it has become another one."""
        named = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in named.items() if value is not None}

    def packed(self) -> bytes:
        header = {
            "etag": self.etag,
            "last_modified": self.last_modified,
            "stored_at_s": self.stored_at_s,
            "fresh_until_s": self.fresh_until_s,
        }
        return json.dumps(header).encode() + b"\n" + self.data


def unpacked(packed: bytes) -> StoredAnswer | None:
    """None where the header is not one that `packed` writes."""
    header, _, data = packed.partition(b"\n")
    try:
        fields = json.loads(header)
        return StoredAnswer(
            data=data,
            etag=fields["etag"],
            last_modified=fields["last_modified"],
            stored_at_s=float(fields["stored_at_s"]),
            fresh_until_s=float(fields["fresh_until_s"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def stored_answer(
    data: bytes, headers: httpx.Headers, *, now_s: float, ttl_s: float
) -> StoredAnswer | None:
    """What to keep of an answer, None where it may not be kept or could never be used again."""
    directives = _directives(headers)
    vary = ",".join(headers.get_list("vary"))
    if "no-store" in directives or "private" in directives or "*" in vary:
        return None
    lifetime_s = min(_lifetime_s(headers, directives, now_s) - _age_s(headers), ttl_s)
    answer = StoredAnswer(
        data=data,
        etag=_validator(headers, "etag"),
        last_modified=_validator(headers, "last-modified"),
        stored_at_s=now_s,
        fresh_until_s=now_s + max(0.0, lifetime_s),
    )
    return answer if answer.is_fresh(now_s) or answer.conditions() else None


def confirmed(
    stored: StoredAnswer, headers: httpx.Headers, *, now_s: float, ttl_s: float
) -> StoredAnswer | None:
    """A stored answer after a 304 with these headers; None where it may not be kept any longer."""
    directives = _directives(headers)
    if "no-store" in directives or "private" in directives:
        return None
    lifetime_s = min(_lifetime_s(headers, directives, now_s) - _age_s(headers), ttl_s)
    return replace(
        stored,
        etag=_validator(headers, "etag") or stored.etag,
        last_modified=_validator(headers, "last-modified") or stored.last_modified,
        stored_at_s=now_s,
        fresh_until_s=now_s + max(0.0, lifetime_s),
    )


def _directives(headers: httpx.Headers) -> dict[str, str]:
    """Cache-Control by name, the value "" where there is none; of two values the last."""
    found: dict[str, str] = {}
    for part in ",".join(headers.get_list("cache-control")).split(","):
        name, _, value = part.partition("=")
        found[name.strip().lower()] = value.strip().strip('"')
    return found


def _lifetime_s(headers: httpx.Headers, directives: dict[str, str], now_s: float) -> float:
    if "no-cache" in directives:
        return 0.0
    if "max-age" in directives:
        return _seconds(directives["max-age"])
    expires_s = _time_s(headers.get("expires", ""))
    if expires_s is None:
        return 0.0
    date_s = _time_s(headers.get("date", ""))
    return expires_s - (now_s if date_s is None else date_s)


def _age_s(headers: httpx.Headers) -> float:
    return _seconds(headers.get("age", "0"))


def _seconds(text: str) -> float:
    """0 where it is not a number of seconds; ten digits are more than anybody's lifetime."""
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0.0


def _time_s(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text[:64]).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _validator(headers: httpx.Headers, name: str) -> str | None:
    """A header's value if it can be sent back as it came."""
    value = headers.get(name, "")
    is_plain = value.isascii() and value.isprintable() and len(value) <= _MAX_VALIDATOR_CHARS
    return value if value and is_plain else None
