"""Which blocks of the key/value cache are free and who uses the others; knows no tensors.

A block is `block_size` consecutive positions of one sequence, in every layer. The pool owns the
numbers; a sequence owns its table of them. Sharing is counted here, so that a block goes back only
when its last holder lets go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks 0 .. num_blocks - 1, each free or counted by how many tables hold it."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a pool needs at least one block of at least one position")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The last one freed is the next one used: its memory is there already, and warm.
        self._free: list[int] = list(range(num_blocks))[::-1]
        self._holders: list[int] = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_tokens(self) -> int:
        """The positions that all blocks together can hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one new holder; all or none."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._holders[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """One holder lets go of each of these."""
        for block_id in block_ids:
            if self._holders[block_id] < 1:
                raise ValueError(f"block {block_id} is freed but not held")
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self._free.append(block_id)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Free and used make up all, and the counts are those of `tables`: all there are."""
        held = Counter(block_id for table in tables for block_id in table)
        free = Counter(self._free)
        for block_id, holders in enumerate(self._holders):
            if holders != held[block_id]:
                raise RuntimeError(f"block {block_id}: {holders} counted, {held[block_id]} hold it")
            if free[block_id] != (holders == 0):
                raise RuntimeError(f"block {block_id}: {free[block_id]} times free, {holders} held")
        if not held.keys() | free.keys() <= set(range(self.num_blocks)):
            raise RuntimeError("a block that does not exist is held or free")
