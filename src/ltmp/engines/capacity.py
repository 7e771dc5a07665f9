"""How much room a CUDA graph needs: what batches took before and a little more, at the top of its part of the dial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..method.policy import Policy
from ..method.thresholds import Thresholds

LEVELS = 16
"""Parts of the range from 0 to 1 whose budgets share graphs: fewer waste room, more record more."""

_ROWS = 128
"""Rooms are multiples of this many rows: a matrix product's tile."""

SLACK = 0.02
"""Room beyond the largest batch seen, doubled whenever it was too little. Totals of random batches of 256 images vary
by about 1 %; photographs sorted by class vary more."""


@dataclass(frozen=True)
class Level:
    """The part of a budget dial that graphs are for.

    Attributes:
        top: the largest budget in it; None where no dial set the thresholds.
        growth: for each block how many times the tokens of the present budget that one leaves.
    """

    top: float | None = None
    growth: tuple[float, ...] = ()

    @classmethod
    def of(cls, policy: Policy) -> Level:
        """Where `policy` is, as far as that is known without waiting for a device: a wrong answer costs room."""
        if not isinstance(policy, Thresholds) or policy.dial is None or policy.asked is None:
            return cls()
        top, dial = math.ceil(policy.asked * LEVELS) / LEVELS, policy.dial
        if policy.asked == 1:
            return cls(top)
        most = dial.kept_at(min(top, dial.highest)) / dial.kept_at(policy.asked)
        return cls(top, tuple(most.clamp(min=1).tolist()))

    def scaled(self, stats: Sequence[Sequence[int]]) -> list[list[float]]:
        """Room that a batch with these stats would take at the top level."""
        growth = self.growth or (1.0,) * len(stats)
        return [[factor * n for n in block] for block, factor in zip(stats, growth, strict=True)]


def plan_capacity(
    stats: Sequence[Sequence[float]], tokens: int, rows: int, slack: float = SLACK, least: Capacity | None = None
) -> Capacity:
    """Room for batches like one that ran.

    Args:
        stats: [L][tokens of the batch, longest image, ...], zeros where a block reduced nothing.
        tokens: of one image at the start; rows: of the whole batch at the start.
        slack: room beyond what it took, as a share of that.
        least: room that must not shrink.

    Returns:
        What the batch took and a little more, never more than it started with.
    """
    room: list[int] = []
    longest: list[int] = []
    for i, (total, most, *_) in enumerate(stats):
        before = (rows, tokens) if i == 0 else (room[-1], longest[-1])
        wanted = -(-int(total * (1 + slack)) // _ROWS) * _ROWS
        # counts of single images vary more than their sum, and a loose bound on them costs next to nothing
        reach = -(-int(most * 1.1) // 16) * 16
        if least is not None:
            wanted, reach = max(wanted, least.rows[i]), max(reach, least.longest[i])
        room.append(min(wanted, before[0]) if most else before[0])
        longest.append(min(reach, before[1]) if most else before[1])
    return Capacity(tuple(room), tuple(longest))


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes of a batch after each block, so that nothing needs to be read back while it runs.

    Attributes:
        rows: tokens of the whole batch.
        longest: tokens of its longest image.
    """

    rows: tuple[int, ...]
    longest: tuple[int, ...]

    def holds(self, stats: Sequence[Sequence[int]]) -> bool:
        """Whether a batch with these `stats` (tokens, longest image, ...) after each block fitted."""
        return all(
            total <= rows and most <= longest
            for (total, most, *_), rows, longest in zip(stats, self.rows, self.longest, strict=True)
        )
