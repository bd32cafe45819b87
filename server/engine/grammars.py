"""Grammars that have been started, the last used ones: the next request copies instead of building.

Must not know what is kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

MAX_GRAMMARS = 256
MAX_GRAMMAR_BYTES = 256 << 20

Started = TypeVar("Started")


class GrammarCache(Generic[Started]):
    """Bounded in number and bytes; the one that was not used for longest goes first.

    One thread may put in what another takes out.
    """

    def __init__(
        self, *, max_entries: int = MAX_GRAMMARS, max_bytes: int = MAX_GRAMMAR_BYTES
    ) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Started, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, key: Hashable) -> Started | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, started: Started, *, num_bytes: int) -> None:
        """Nothing is kept that is larger than the whole cache."""
        with self._lock:
            self._num_bytes -= self._entries.pop(key, (started, 0))[1]
            if num_bytes > self._max_bytes:
                return
            self._entries[key] = started, num_bytes
            self._num_bytes += num_bytes
            while len(self._entries) > self._max_entries or self._num_bytes > self._max_bytes:
                _, (_, freed_bytes) = self._entries.popitem(last=False)
                self._num_bytes -= freed_bytes
