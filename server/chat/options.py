"""What a client may say about how its pictures and videos are looked at.

`media_options` stands in a request, for all its media, and in a content part, for that one; what a
part says comes first. They may only lower what the server and the checkpoint allow: a number beyond
that is refused, and a rate gives no more frames than the checkpoint takes. Must not know where
media come from or how they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from server.core import MediaKind, VisionSpec
from server.errors import InvalidRequest, InvalidType, UnknownParameter, quoted

Detail = Literal["auto", "low", "high"]

MIN_FPS = 0.001
MAX_FPS = 1_000.0

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """None says nothing. Times in seconds after the first frame."""

    detail: Detail | None = None
    max_grids: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None

    def over(self, others: MediaOptions) -> MediaOptions:
        """These, and the others' where these say nothing."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        # A number of frames and a rate are two answers to one question: the nearer one holds.
        if self.fps is not None:
            others = replace(others, num_frames=None)
        if self.num_frames is not None:
            others = replace(others, fps=None)
        return replace(others, **{name: value for name, value in said.items() if value is not None})


NO_OPTIONS = MediaOptions()

FIELDS_OF: Mapping[MediaKind, tuple[str, ...]] = {
    "image": ("detail", "max_grids"),
    "video": ("fps", "num_frames", "max_frames", "start_s", "end_s"),
}


def parse_options(value: object, path: str, *, kind: MediaKind | None = None) -> MediaOptions:
    """The options at `path`; those that have no meaning for the kind of their part are refused."""
    if value is None:
        return NO_OPTIONS
    if not isinstance(value, Mapping):
        raise InvalidType("This must be an object.", param=path)
    known = FIELDS_OF[kind] if kind is not None else (*FIELDS_OF["image"], *FIELDS_OF["video"])
    for name in value:
        if name not in known:
            raise UnknownParameter(
                f"{quoted(str(name))} is not an option here: use {', '.join(known)}.",
                param=f"{path}.{quoted(str(name))[1:-1]}",
            )
    options = MediaOptions(
        detail=parse_detail(value.get("detail"), f"{path}.detail"),
        max_grids=_integer(value.get("max_grids"), f"{path}.max_grids"),
        fps=_number(value.get("fps"), f"{path}.fps", least=MIN_FPS, most=MAX_FPS),
        num_frames=_integer(value.get("num_frames"), f"{path}.num_frames"),
        max_frames=_integer(value.get("max_frames"), f"{path}.max_frames"),
        start_s=_number(value.get("start_s"), f"{path}.start_s", least=0.0, most=math.inf),
        end_s=_number(value.get("end_s"), f"{path}.end_s", least=0.0, most=math.inf),
    )
    check_together(options, path)
    return options


def parse_detail(value: object, path: str) -> Detail | None:
    """None where nothing is said."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidType("This must be a string.", param=path)
    for detail in get_args(Detail):
        if value == detail:
            said: Detail = detail
            return said
    raise InvalidRequest(f"detail must be auto, low or high, not {quoted(value)}.", param=path)


def parse_request_options(value: object, path: str) -> tuple[MediaOptions, int | None]:
    """The options of a request, and the most tokens that all its media may be worth together."""
    budget = None
    if isinstance(value, Mapping):
        budget = _integer(value.get("visual_token_budget"), f"{path}.visual_token_budget")
        value = {name: each for name, each in value.items() if name != "visual_token_budget"}
    return parse_options(value, path), budget


def check_together(options: MediaOptions, path: str) -> None:
    """What no option shows by itself."""
    if options.fps is not None and options.num_frames is not None:
        raise InvalidRequest("fps and num_frames cannot both be given.", param=f"{path}.num_frames")
    if options.end_s is not None and options.end_s <= (options.start_s or 0.0):
        raise InvalidRequest("end_s must be greater than start_s.", param=f"{path}.end_s")


def check_kind(options: MediaOptions, kind: MediaKind, path: str) -> None:
    """Refuse what has no meaning for a medium whose kind was not known when it was parsed."""
    for each in fields(options):
        if getattr(options, each.name) is not None and each.name not in FIELDS_OF[kind]:
            raise InvalidRequest(
                f"{each.name} has no meaning for a medium of the kind {kind}.",
                param=f"{path}.{each.name}",
            )


def check_limits(options: MediaOptions, spec: VisionSpec, path: str) -> None:
    """Refuse what goes beyond the checkpoint."""
    limits = {
        "max_grids": spec.max_grids,
        "num_frames": spec.max_frames,
        "max_frames": spec.max_frames,
    }
    for name, limit in limits.items():
        asked = getattr(options, name)
        if asked is not None and asked > max(limit, 1):
            raise InvalidRequest(f"{name} may be at most {limit} here.", param=f"{path}.{name}")


def _integer(value: object, path: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType("This must be an integer.", param=path)
    if not 1 <= value <= _INT64_MAX:
        raise InvalidRequest("This must be at least 1.", param=path)
    return value


def _number(value: object, path: str, *, least: float, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType("This must be a number.", param=path)
    if not math.isfinite(value) or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise InvalidRequest(f"This must be {bounds}.", param=path)
    return float(value)
