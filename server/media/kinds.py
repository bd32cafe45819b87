"""The two kinds of media, and what differs between them before anybody looks inside."""

from __future__ import annotations

from typing import Literal, TypeAlias

from server.config import MediaConfig

SourceKind: TypeAlias = Literal["image", "video"]

MAX_LISTED_FRAMES = 10_000
"""Pictures in one list of frames."""


def max_bytes(config: MediaConfig, kind: SourceKind) -> int:
    """Of one encoded medium."""
    return config.max_image_bytes if kind == "image" else config.max_video_bytes
