"""Removal rates block by block, which thresholds are calibrated to follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError
from ..method.flops import Geometry, flops_share

MAX_MERGE_RATE = 0.8 * math.log(2)
"""Highest merge rate. At most half of the tokens, rate log 2, can merge, each into its partner."""

NEVER = -30.0
"""Logarithm of a rate that removes nothing; not infinite, so that shapes can be mixed."""


@dataclass(frozen=True)
class Schedule:
    """Rates at which the steps of each block remove tokens: of n that enter a step, n exp(-rate) are left.

    Attributes:
        merge, prune: float64 [L]; rate 0 turns a step off, and pruning at rate infinity keeps only protected tokens.
    """

    merge: Tensor
    prune: Tensor

    def kept(self, geometry: Geometry, protected: int) -> Tensor:
        """float64 [L], tokens after each block."""
        left = geometry.tokens * torch.exp(-(self.merge + self.prune).cumsum(0))
        return left.clamp(min=float(max(1, protected)))

    def share(self, geometry: Geometry, protected: int) -> float:
        """FLOPs share of an image that is reduced at these rates."""
        return float(flops_share(self.kept(geometry, protected), geometry))

    def times(self, factor: float) -> Schedule:
        """All rates multiplied by `factor`; merge rates are capped at `MAX_MERGE_RATE`."""
        return Schedule((self.merge * factor).clamp(max=MAX_MERGE_RATE), self.prune * factor)

    def to_cost(self, target: float, geometry: Geometry, protected: int) -> Schedule:
        """The schedule scaled by the factor at which it costs `target`, by bisection."""
        low, high = 0.0, 1.0
        while self.times(high).share(geometry, protected) > target and high < 1e6:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            over = self.times(middle).share(geometry, protected) > target
            low, high = (middle, high) if over else (low, middle)
        return self.times(high)


@dataclass(frozen=True)
class Shape:
    """How removal is spread over the blocks, for any depth and budget: log rates are parabolas of the block's place.

    Only five numbers: near a good shape the rates of single blocks make little difference, and a search on a few
    hundred images would fit noise.

    Attributes:
        merge_slope, prune_slope: change of the log rate from the middle of the network to its end.
        merge_bend, prune_bend: log rate at both ends relative to the middle.
        prune_level: log rate of pruning relative to merging.
    """

    merge_slope: float
    merge_bend: float
    prune_level: float
    prune_slope: float
    prune_bend: float

    def schedule(self, depth: int, steps: tuple[str, ...], last_free: bool = False, every: int = 1) -> Schedule:
        """A schedule of this shape, to be scaled by `Schedule.to_cost`.

        Args:
            depth: number of blocks, L.
            steps: of "merge" and "prune", the steps that the variant has.
            last_free: whether the head reads the prefix tokens only, so that the last block prunes all others.
            every: how many blocks it is from one that removes tokens to the next, which removes at all their rates.
        """
        z = torch.linspace(-1, 1, depth, dtype=torch.float64) if depth > 1 else torch.zeros(1, dtype=torch.float64)
        bow, off = z * z - 0.4, torch.zeros_like(z)
        merge = torch.exp(self.merge_slope * z + self.merge_bend * bow) if "merge" in steps else off
        prune = torch.exp(self.prune_level + self.prune_slope * z + self.prune_bend * bow) if "prune" in steps else off
        if every > 1:
            merge, prune = gathered(merge, every), gathered(prune, every)
        if last_free and "prune" in steps:
            merge[-1], prune[-1] = 0.0, math.inf
        return Schedule(merge, prune)

    def without_pruning(self) -> Shape:
        """The same merging, and next to no pruning."""
        return replace(self, prune_level=NEVER)

    def plus(self, other: Shape, times: float = 1.0) -> Shape:
        """The sum with `times` the numbers of `other`."""
        return Shape(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def towards(self, other: Shape, part: float) -> Shape:
        """Linear interpolation to another shape; `part` 1 is that one."""
        return self.plus(other.plus(self, -1), part)


def check_every(every: int, depth: int) -> None:
    """Refuse what is no number of blocks from one that removes tokens to the next: UsageError."""
    if not 1 <= every < max(2, depth):
        raise UsageError(
            f"every is {every!r}: expected how many blocks it is from one that removes tokens to the next, 1 (all do) "
            f"to {max(1, depth - 1)} in this model of {depth}"
        )


def idle(depth: int, every: int) -> Tensor:
    """bool [depth], the blocks between those that remove tokens: of these the first is one, and every `every`th."""
    return torch.arange(depth) % every > 0


def gathered(rates: Tensor, every: int) -> Tensor:
    """Rates [L] where only some blocks remove tokens: each also at the rates of the idle ones just before it."""
    totals, there = rates.cumsum(0), ~idle(len(rates), every)
    found = torch.zeros_like(rates)
    found[there] = totals[there].diff(prepend=totals.new_zeros(1))
    return found


def between(shapes: dict[float, Shape], share: float) -> Shape:
    """The shape for a share, interpolated between its neighbours; constant beyond the ends."""
    below = max((s for s in shapes if s <= share), default=min(shapes))
    above = min((s for s in shapes if s >= share), default=max(shapes))
    part = (share - below) / (above - below) if above > below else 0.0
    return shapes[below].towards(shapes[above], part)


USUAL: dict[str, dict[float, Shape]] = {
    "bipartite": {
        0.37: Shape(0.2, 0.45, -1.3, 0.9, 0.1),
        0.5: Shape(0.3, -0.9, -1.7, 2.4, 0.0),
        0.625: Shape(0.7, -0.93, -2.9, 2.9, 0.05),
        0.84: Shape(0.89, -0.82, -3.56, 3.35, 0.25),
    },
    "mutual": {
        0.34: Shape(0.0, -0.1, -2.5, 1.3, -0.1),
        0.53: Shape(0.55, -1.0, -2.8, 2.4, 0.0),
        0.79: Shape(1.35, -1.2, -4.0, 3.6, 0.1),
    },
}
"""Shapes that did best in searches (docs/accuracy.md), by matching and FLOPs share. At large budgets merging peaks past
the middle of the network and the little pruning there is grows towards its end; at small ones removal is spread evenly.
Mutual pairs lose less by merging, so that less is pruned."""


def usual(share: float, matching: str = "bipartite") -> Shape:
    """The shape to start from, of those in `USUAL`; `matching` as in `config.Scores`."""
    return between(USUAL[matching], share)


def searched(usual: Callable[[float], Shape], found: dict[float, Shape], share: float) -> Shape:
    """The usual shape at `share`, changed as the searches at the shares of `found` changed it there."""
    if not found:
        return usual(share)
    moves = {at: shape.plus(usual(at), -1) for at, shape in found.items()}
    return usual(share).plus(between(moves, share))
