"""The limits of decoding as the settings' defaults make them, some of them changed."""

from __future__ import annotations

from typing import Any

from server.config import MediaConfig
from server.decoding.pool import limits_of
from server.media.limits import DecodeLimits


def limits(**changes: Any) -> DecodeLimits:
    return limits_of(MediaConfig(**changes))
