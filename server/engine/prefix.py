"""What a block of the key/value cache holds, as a key: who computes the same may share it.

A block's contents depend on every id up to its end and on the pixels behind the placeholders among
them, so its key is a chain of SHA-256 over both. The chain begins with the request's cache owner
under a secret of this process: owners never meet, and no key can be foreseen.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array

from server.engine.sequence import Sequence


class PrefixKeys:
    """Makes the keys of a sequence's full blocks, each once."""

    def __init__(self, *, block_size: int, secret: bytes) -> None:
        self._block_size = block_size
        self._secret = secret

    def extend(self, sequence: Sequence, *, stop: int) -> None:
        """Adds to `sequence.block_keys` those of the blocks that are full with [0, stop)."""
        keys, size = sequence.block_keys, self._block_size
        parent = keys[-1] if keys else self._root(sequence.request.cache_owner)
        for first in range(len(keys) * size, stop - size + 1, size):
            parent = self._key(parent, sequence, first)
            keys.append(parent)

    def _root(self, owner: tuple[str, str]) -> bytes:
        tenant, salt = (part.encode() for part in owner)
        framed = b"%d:%b%b" % (len(tenant), tenant, salt)
        return hmac.digest(self._secret, framed, "sha256")

    def _key(self, parent: bytes, sequence: Sequence, first: int) -> bytes:
        """Of the block that begins at position `first`. Every field has one length, or is last."""
        last = first + self._block_size
        state = hashlib.sha256(parent)
        state.update(array("q", sequence.token_ids[first:last]).tobytes())
        for medium in sequence.media:
            if medium.start < last and first < medium.stop:
                # Which of its features stand here follows from the blocks before and the ids.
                state.update(hashlib.sha256(medium.vision.digest.encode()).digest())
        return state.digest()
