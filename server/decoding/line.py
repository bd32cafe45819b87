"""Who waits for a decoder, and who is next.

Tenants take turns, and the media of each come in the order they were sent. Videos take long, so
they may be passed over: nobody's picture waits for somebody's video. Must not know what a medium
is, nor who decodes it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Line(Generic[Entry]):
    def __init__(self) -> None:
        self._of_tenant: OrderedDict[str, list[tuple[Entry, bool]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of_tenant.values()))

    def add(self, entry: Entry, *, tenant: str, is_video: bool) -> None:
        self._of_tenant.setdefault(tenant, []).append((entry, is_video))

    def take(self, *, with_videos: bool) -> Entry | None:
        """The next one, who leaves the line; its tenant goes to the end of the turns."""
        for tenant, waiting in self._of_tenant.items():
            for index, (entry, is_video) in enumerate(waiting):
                if with_videos or not is_video:
                    del waiting[index]
                    self._of_tenant.move_to_end(tenant)
                    self._forget_if_empty(tenant)
                    return entry
        return None

    def remove(self, entry: Entry, *, tenant: str) -> None:
        """Leave without a turn; nothing happens to one who is not in the line."""
        waiting = self._of_tenant.get(tenant, [])
        waiting[:] = [each for each in waiting if each[0] is not entry]
        self._forget_if_empty(tenant)

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._of_tenant.get(tenant, True):
            del self._of_tenant[tenant]
