"""What the vision tower made of which pixels, kept for whoever shows the same; knows no tensors.

Sequences of one owner that show the same medium share one `Encoding`, while it is being made and
after. Those nobody holds any more are kept, the latest used longest, within a number of bytes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from server.core import VisionInput

if TYPE_CHECKING:
    from torch import Tensor

Owner: TypeAlias = tuple[str, str]
"""A `GenerationRequest.cache_owner`."""

Key: TypeAlias = tuple[Owner, str]
"""The owner, and the digest of the medium."""


@dataclass(slots=True, eq=False)
class Encoding:
    """One medium and how far it has been encoded.

    Each tile passes through `stages_per_tile` stages, one tile after another; `num_stages_encoded`
    counts the stages of all of them. `partial[i]` is how many stages tile i has passed and what it
    has become, `features[i]` what the model made of it in the end, `embeds` what all tiles make
    together and what replaces their features; only the runner looks inside. `encode_s` is the time
    that was spent on all of it so far.
    """

    key: Key
    num_tiles: int
    num_bytes: int
    stages_per_tile: int = 1
    num_stages_encoded: int = 0
    partial: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    encode_s: float = 0.0
    is_forgotten: bool = False

    @property
    def num_stages(self) -> int:
        return self.num_tiles * self.stages_per_tile

    @property
    def is_complete(self) -> bool:
        return self.num_stages_encoded == self.num_stages


class EncoderCache:
    """All encodings there are: held by sequences, or complete and kept."""

    def __init__(self, *, max_bytes: int, bytes_per_token: int, stages_per_tile: int = 1) -> None:
        self._max_bytes = max_bytes
        self._bytes_per_token = bytes_per_token
        self._stages_per_tile = stages_per_tile
        self._held: dict[Key, Encoding] = {}
        self._holders: Counter[Key] = Counter()
        self._kept: OrderedDict[Key, Encoding] = OrderedDict()
        self._held_bytes = 0
        self._kept_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    @property
    def num_bytes(self) -> int:
        """Of everything that is held or kept."""
        return self._held_bytes + self._kept_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def has_room(self, owner: Owner, media: Iterable[VisionInput]) -> bool:
        """Whether these fit beside what is held; whoever is first may be as large as it is."""
        new = {
            (owner, vision.digest): vision.num_tokens * self._bytes_per_token
            for vision in media
            if (owner, vision.digest) not in self._held
        }
        return not self._held or self._held_bytes + sum(new.values()) <= self._max_bytes

    def acquire(self, owner: Owner, vision: VisionInput) -> Encoding:
        """The encoding of this medium, begun or not, with one more holder."""
        key = owner, vision.digest
        encoding = self._held.get(key) or self._kept.pop(key, None)
        if encoding is None:
            self.num_misses += 1
            num_bytes = vision.num_tokens * self._bytes_per_token
            num_tiles = len(vision.layout.tile_queries)
            encoding = Encoding(key, num_tiles, num_bytes, self._stages_per_tile)
        else:
            self.num_hits += 1
            if key not in self._held:
                self._kept_bytes -= encoding.num_bytes
        if key not in self._held:
            self._held[key] = encoding
            self._held_bytes += encoding.num_bytes
        self._holders[key] += 1
        self._shrink()
        return encoding

    def release(self, encoding: Encoding) -> None:
        """One holder lets go. What is not complete by then is of no use to anybody."""
        key = encoding.key
        if self._held.get(key) is not encoding:
            raise ValueError("an encoding is released but not held")
        self._holders[key] -= 1
        if self._holders[key] > 0:
            return
        del self._holders[key], self._held[key]
        self._held_bytes -= encoding.num_bytes
        if encoding.is_complete and not encoding.is_forgotten:
            self._kept[key] = encoding
            self._kept_bytes += encoding.num_bytes
            self._shrink()

    def forget(self, owner: Owner, vision: VisionInput) -> None:
        """What was made of this medium is not kept, or no longer once its holders have let go."""
        key = owner, vision.digest
        if key in self._held:
            self._held[key].is_forgotten = True
        elif key in self._kept:
            self._kept_bytes -= self._kept.pop(key).num_bytes

    def check(self, held: Iterable[Encoding]) -> None:
        """The counts are those of `held`, one for each holder, and the bytes add up."""
        holders = Counter(encoding.key for encoding in held)
        if holders != self._holders or holders.keys() != self._held.keys():
            raise RuntimeError("encodings are counted wrongly")
        if self._held.keys() & self._kept.keys():
            raise RuntimeError("an encoding is both held and kept")
        sums = [
            sum(encoding.num_bytes for encoding in part.values())
            for part in (self._held, self._kept)
        ]
        if sums != [self._held_bytes, self._kept_bytes]:
            raise RuntimeError("the bytes of the encodings do not add up")
        if self._kept and self.num_bytes > self._max_bytes:
            raise RuntimeError("more encodings are kept than there is room for")

    def _shrink(self) -> None:
        while self._kept and self.num_bytes > self._max_bytes:
            _, encoding = self._kept.popitem(last=False)
            self._kept_bytes -= encoding.num_bytes
