"""Which blocks of the key/value cache are free and who uses the others; knows no tensors.

A block is `block_size` consecutive positions of one sequence, in every layer. The pool owns the
numbers; a sequence owns its table of them. Sharing is counted here, so that a block goes back only
when its last holder lets go; what it holds may then be kept under a key until the room is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks 0 .. num_blocks - 1. Each is in exactly one of three states:

    held     by one table or more
    cached   by nobody, but its contents have a key: who begins with the same may have it back
    free     by nobody, and nothing in it is worth keeping

    Cached blocks are free room too; the one let go longest ago is given away first.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a pool needs at least one block of at least one position")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The last one freed is the next one used: its memory is there already, and warm.
        self._free: list[int] = list(range(num_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders: list[int] = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """The blocks that can be had, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_tokens(self) -> int:
        """The positions that all blocks together can hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one new holder; all or none."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._holders[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """One holder lets go of each of these, which follow one another in its table."""
        # From the end: of a cached prefix the end must be given away before the beginning.
        for block_id in reversed(block_ids):
            if self._holders[block_id] < 1:
                raise ValueError(f"block {block_id} is freed but not held")
            self._holders[block_id] -= 1
            if self._holders[block_id] > 0:
                continue
            if block_id in self._key_of:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)

    def name(self, block_id: int, key: bytes) -> None:
        """Says what a held block now holds. The first block of a key is the one that is found."""
        if self._holders[block_id] < 1:
            raise ValueError(f"block {block_id} is named but not held")
        if key not in self._block_of and block_id not in self._key_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def forget(self, block_ids: Iterable[int]) -> None:
        """What these held blocks hold is not to be found any more."""
        for block_id in block_ids:
            key = self._key_of.pop(block_id, None)
            if key is not None:
                del self._block_of[key]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, as far as they are known without a gap."""
        block_ids: list[int] = []
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more holder for each of these, which `find` gave."""
        for block_id in block_ids:
            if block_id not in self._key_of:
                raise ValueError(f"block {block_id} has no key")
            self._cached.pop(block_id, None)
            self._holders[block_id] += 1

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Every block is in one state, and the counts are those of `tables`: all there are."""
        held = Counter(block_id for table in tables for block_id in table)
        free = Counter([*self._free, *self._cached])
        for block_id, holders in enumerate(self._holders):
            if holders != held[block_id]:
                raise RuntimeError(f"block {block_id}: {holders} counted, {held[block_id]} hold it")
            if free[block_id] != (holders == 0):
                raise RuntimeError(f"block {block_id}: {free[block_id]} times free, {holders} held")
        if not held.keys() | free.keys() <= set(range(self.num_blocks)):
            raise RuntimeError("a block that does not exist is held or free")
        if {block_id: key for key, block_id in self._block_of.items()} != self._key_of:
            raise RuntimeError("keys and blocks do not belong together")
        if not self._cached.keys() <= self._key_of.keys() or self._key_of.keys() & set(self._free):
            raise RuntimeError("a free block has a key, or a cached one has none")

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        return block_id
