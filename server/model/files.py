"""The JSON files of a checkpoint: reading them, and looking keys up without ever guessing silently.

Knows nothing of what the keys mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not valid JSON"
        raise CheckpointError(f"{path}: cannot be read: {reason}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file."""
    return read_json(path) if path.exists() else {}


@dataclass(frozen=True, slots=True)
class Keys:
    """Values by key from one or more JSON objects, the first that has the key first.

    A null or an empty list counts as missing. A key has one or more names, the newest first.
    Where a default stands in for a missing key, `assumptions` says so; without a default a
    missing key is an error.
    """

    sources: Sequence[tuple[str, Mapping[str, Any]]]
    """(what to call it, the object)."""
    assumptions: list[str] = field(default_factory=list)

    def find(self, *names: str) -> tuple[str, Any] | None:
        """(where it stands, the value), or None. A second source that disagrees is noted."""
        found: tuple[str, Any] | None = None
        for label, source in self.sources:
            for name in names:
                value = source.get(name)
                if value is None or value == []:
                    continue
                if found is None:
                    found = (f"{label}: '{name}'", value)
                elif value != found[1]:
                    self.note(
                        f"{found[0]} is {found[1]!r}, {label}: '{name}' is {value!r}: "
                        "the first is used"
                    )
                break
        return found

    def has(self, *names: str) -> bool:
        return any(source.get(name) is not None for _, source in self.sources for name in names)

    def note(self, assumption: str) -> None:
        if assumption not in self.assumptions:
            self.assumptions.append(assumption)

    def integer(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        where, value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise CheckpointError(
                f"{where} must be a whole number of at least {minimum}, not {value!r}"
            )
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        where, value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{where} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        where, value = self._value(names, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{where} must be true or false, not {value!r}")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        where, value = self._value(names, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{where} must be a string, not {value!r}")
        return value

    def _value(self, names: Sequence[str], default: Any) -> tuple[str, Any]:
        found = self.find(*names)
        if found is not None:
            return found
        where = " and ".join(label for label, _ in self.sources)
        if default is None:
            raise CheckpointError(f"{where}: the key '{names[0]}' is missing")
        self.note(f"{where}: the key '{names[0]}' is missing: assumed {default!r}")
        return where, default
