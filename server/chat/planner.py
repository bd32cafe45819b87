"""Meets a budget of visual tokens: which picture gets fewer tiles, which video fewer frames.

Every medium has a ladder of sizes. Whoever has the most tokens steps down, the last one of equals,
until all together fit; so the largest pay first, equals end up alike, and the same media with the
same budget always give the same plan. Pure; must not know how media are decoded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rung:
    """One size of a medium: its tokens, and what it is cut with.

    `limit` is a picture's most grids, 0 for its thumbnail alone, or a video's most frames; None
    leaves it as it would be without a budget.
    """

    tokens: int
    limit: int | None


def plan(ladders: Sequence[Sequence[Rung]], budget: int) -> list[Rung] | None:
    """The rung of each medium; None where even the lowest together are above the budget.

    Each ladder is not empty and begins with the size that would be used without a budget; tokens
    fall from rung to rung.
    """
    chosen = [0] * len(ladders)
    total = sum(ladder[0].tokens for ladder in ladders)
    largest = [(-ladder[0].tokens, -index) for index, ladder in enumerate(ladders)]
    heapq.heapify(largest)
    while total > budget:
        if not largest:
            return None
        tokens, index = (-each for each in heapq.heappop(largest))
        if chosen[index] + 1 == len(ladders[index]):
            continue  # at its lowest
        chosen[index] += 1
        lower = ladders[index][chosen[index]].tokens
        total += lower - tokens
        heapq.heappush(largest, (-lower, -index))
    return [ladder[rung] for ladder, rung in zip(ladders, chosen, strict=True)]
