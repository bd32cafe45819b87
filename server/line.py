"""Who waits, and who is next.

Tenants take turns, and what each of them asked for is in the order it came. Where the line is full,
whoever holds more of it makes room for whoever holds less: nobody can be locked out by somebody
else's requests. Must not know what is waited for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Line(Generic[Entry]):
    def __init__(self) -> None:
        self._of_tenant: OrderedDict[str, list[Entry]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of_tenant.values()))

    def add(self, entry: Entry, *, tenant: str) -> None:
        self._of_tenant.setdefault(tenant, []).append(entry)

    def take(self, may_go: Callable[[Entry], bool] = lambda _: True) -> Entry | None:
        """The next one that may go, who leaves the line; its tenant's turn comes last then."""
        for tenant, waiting in self._of_tenant.items():
            for index, entry in enumerate(waiting):
                if may_go(entry):
                    del waiting[index]
                    self._of_tenant.move_to_end(tenant)
                    self._forget_if_empty(tenant)
                    return entry
        return None

    def crowd_out(self, *, tenant: str) -> Entry | None:
        """The newest of whoever has most in the line, who leaves it for one more of this tenant.

        None where that would only turn the tables.
        """
        longest = max(self._of_tenant, key=lambda each: len(self._of_tenant[each]), default=tenant)
        own = len(self._of_tenant.get(tenant, []))
        if longest == tenant or len(self._of_tenant[longest]) <= own + 1:
            return None
        entry = self._of_tenant[longest].pop()
        self._forget_if_empty(longest)
        return entry

    def remove(self, entry: Entry, *, tenant: str) -> None:
        """Leave without a turn; nothing happens to one who is not in the line."""
        waiting = self._of_tenant.get(tenant, [])
        waiting[:] = [each for each in waiting if each is not entry]
        self._forget_if_empty(tenant)

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._of_tenant.get(tenant, True):
            del self._of_tenant[tenant]
