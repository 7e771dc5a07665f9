"""Capacity of CUDA graphs: how many rows they need after each block, planned from batches that ran before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..method.policy import Policy
from ..method.thresholds import Thresholds

LEVELS = 16
"""Number of equal parts of the budget range from 0 to 1; budgets in one part share graphs.

Fewer levels waste capacity, more levels record more graphs."""

_ROWS = 128
"""Capacities are multiples of this many rows, the tile of a matrix product."""

SLACK = 0.02
"""Spare capacity beyond the largest batch seen, as a share of it; doubled whenever it was not enough.

The total tokens of random batches of 256 images vary by about 1 %; photographs sorted by class vary more."""


@dataclass(frozen=True)
class Level:
    """A part of the budget dial, whose budgets share graphs.

    Attributes:
        top: the largest budget of the level; None if the thresholds were not set by a dial.
        growth: for each block, tokens kept at `top` over tokens kept at the current budget.
    """

    top: float | None = None
    growth: tuple[float, ...] = ()

    @classmethod
    def of(cls, policy: Policy) -> Level:
        """Return the level of `policy`, estimated without synchronizing a device; a wrong one only wastes capacity."""
        if not isinstance(policy, Thresholds) or policy.dial is None or policy.requested_budget is None:
            return cls()
        top, dial = math.ceil(policy.requested_budget * LEVELS) / LEVELS, policy.dial
        if policy.requested_budget == 1:
            return cls(top)
        most = dial.kept_at(min(top, dial.highest)) / dial.kept_at(policy.requested_budget)
        return cls(top, tuple(most.clamp(min=1).tolist()))

    def scaled(self, stats: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the tokens that a batch with these stats would have at the top of the level."""
        growth = self.growth or (1.0,) * len(stats)
        return [[factor * n for n in block] for block, factor in zip(stats, growth, strict=True)]


def plan_capacity(
    stats: Sequence[Sequence[float]], tokens: int, rows: int, slack: float = SLACK, minimum: Capacity | None = None
) -> Capacity:
    """Plan the capacity for batches like one that ran.

    Args:
        stats: [L][tokens of the batch, tokens of its longest image, ...], zeros for a block that reduced nothing.
        tokens: tokens of one image at the start.
        rows: tokens of the batch at the start.
        slack: spare capacity, as a share of what the batch needed.
        minimum: a lower bound, the capacity planned before.

    Returns:
        What the batch needed plus slack, but never more than it started with.
    """
    total_rows: list[int] = []
    longest: list[int] = []
    for i, (total, most, *_) in enumerate(stats):
        before = (rows, tokens) if i == 0 else (total_rows[-1], longest[-1])
        needed = -(-int(total * (1 + slack)) // _ROWS) * _ROWS
        # counts of single images vary more than their sum, and a loose bound on them costs next to nothing
        bound = -(-int(most * 1.1) // 16) * 16
        if minimum is not None:
            needed, bound = max(needed, minimum.rows[i]), max(bound, minimum.longest[i])
        total_rows.append(min(needed, before[0]) if most else before[0])
        longest.append(min(bound, before[1]) if most else before[1])
    return Capacity(tuple(total_rows), tuple(longest))


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes of a batch after each block, so that nothing is read back from the device while it runs.

    Attributes:
        rows: tokens of the batch.
        longest: tokens of its longest image.
    """

    rows: tuple[int, ...]
    longest: tuple[int, ...]

    def fits(self, stats: Sequence[Sequence[int]]) -> bool:
        """Whether a batch with these `stats` (tokens, longest image, ...) after each block fits."""
        return all(
            total <= rows and most <= longest
            for (total, most, *_), rows, longest in zip(stats, self.rows, self.longest, strict=True)
        )
