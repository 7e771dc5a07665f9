"""Schedules of removal rates per block, which calibration makes the thresholds follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError
from ..method.flops import Geometry, flops_share

MAX_MERGE_RATE = 0.8 * math.log(2)
"""Highest merge rate. Each merging token needs a partner, so at most half of the tokens (rate log 2) can merge."""

NEVER = -30.0
"""Log rate that removes nothing; finite, so that shapes can be interpolated."""


@dataclass(frozen=True)
class Schedule:
    """Rates at which the steps of each block remove tokens: of n tokens that enter a step, n exp(-rate) are left.

    Attributes:
        merge, prune: float64 [L]; rate 0 turns a step off, and pruning at rate infinity keeps only protected tokens.
    """

    merge: Tensor
    prune: Tensor

    def kept(self, geometry: Geometry, protected: int) -> Tensor:
        """Tokens after each block, float64 [L]."""
        left = geometry.tokens * torch.exp(-(self.merge + self.prune).cumsum(0))
        return left.clamp(min=float(max(1, protected)))

    def share(self, geometry: Geometry, protected: int) -> float:
        """FLOPs share of an image reduced at these rates."""
        return float(flops_share(self.kept(geometry, protected), geometry))

    def scaled(self, factor: float) -> Schedule:
        """All rates multiplied by `factor`; merge rates are capped at `MAX_MERGE_RATE`."""
        return Schedule((self.merge * factor).clamp(max=MAX_MERGE_RATE), self.prune * factor)

    def scaled_to(self, target: float, geometry: Geometry, protected: int) -> Schedule:
        """The schedule scaled so that it costs `target`, by bisection on the factor."""
        low, high = 0.0, 1.0
        while self.scaled(high).share(geometry, protected) > target and high < 1e6:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            over = self.scaled(middle).share(geometry, protected) > target
            low, high = (middle, high) if over else (low, middle)
        return self.scaled(high)


@dataclass(frozen=True)
class Shape:
    """How removal is spread over the blocks, at any depth and budget: log rates are parabolas in a block's position.

    Five numbers suffice: near a good shape the rates of single blocks make little difference, and a search over more
    numbers on a few hundred images would fit noise.

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
        """A schedule of this shape, to be scaled by `Schedule.scaled_to`.

        Args:
            depth: number of blocks, L.
            steps: of "merge" and "prune", the steps that the variant has.
            last_free: whether the head reads the prefix tokens only, so that the last block prunes all others.
            every: remove tokens in one of this many blocks, at the rates of all of them.
        """
        z = torch.linspace(-1, 1, depth, dtype=torch.float64) if depth > 1 else torch.zeros(1, dtype=torch.float64)
        bow, off = z * z - 0.4, torch.zeros_like(z)
        merge = torch.exp(self.merge_slope * z + self.merge_bend * bow) if "merge" in steps else off
        prune = torch.exp(self.prune_level + self.prune_slope * z + self.prune_bend * bow) if "prune" in steps else off
        if every > 1:
            merge, prune = concentrated(merge, every), concentrated(prune, every)
        if last_free and "prune" in steps:
            merge[-1], prune[-1] = 0.0, math.inf
        return Schedule(merge, prune)

    def without_pruning(self) -> Shape:
        """The same merging and practically no pruning."""
        return replace(self, prune_level=NEVER)

    def plus(self, other: Shape, times: float = 1.0) -> Shape:
        """The elementwise sum with `times` the numbers of `other`."""
        return Shape(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def towards(self, other: Shape, part: float) -> Shape:
        """Linear interpolation between this shape (`part` 0) and another (`part` 1)."""
        return self.plus(other.plus(self, -1), part)


def check_every(every: int, depth: int) -> None:
    """Refuse a spacing of the blocks that remove tokens that a model of `depth` blocks cannot have.

    Raises:
        UsageError: `every` is not from 1 to `depth` - 1.
    """
    if not 1 <= every < max(2, depth):
        raise UsageError(
            f"every is {every!r}: expected how many blocks it is from one that removes tokens to the next, 1 (all do) "
            f"to {max(1, depth - 1)} in this model of {depth}"
        )


def idle_blocks(depth: int, every: int) -> Tensor:
    """Blocks that remove no tokens, bool [depth]: all but the first and every `every`th after it."""
    return torch.arange(depth) % every > 0


def concentrated(rates: Tensor, every: int) -> Tensor:
    """Rates [L] when only some blocks remove tokens: each also takes the rates of the idle blocks just before it."""
    totals, active = rates.cumsum(0), ~idle_blocks(len(rates), every)
    moved = torch.zeros_like(rates)
    moved[active] = totals[active].diff(prepend=totals.new_zeros(1))
    return moved


DEFAULT_SHAPES: dict[str, dict[float, Shape]] = {
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
"""The best shapes of searches (docs/accuracy.md), by matching and FLOPs share. At large budgets merging peaks past the
middle of the network, and the little pruning there is grows towards the end; at small budgets removal is spread evenly.
Mutual pairs lose less by merging, so less is pruned."""


def default_shape(share: float, matching: str = "bipartite") -> Shape:
    """The shape to start from at a share, see `DEFAULT_SHAPES`; `matching` as in `config.Scores`."""
    return interpolated(DEFAULT_SHAPES[matching], share)


def adapted_shape(default: Callable[[float], Shape], found: dict[float, Shape], share: float) -> Shape:
    """The default shape at `share`, moved as searches at the shares of `found` moved it there."""
    if not found:
        return default(share)
    moves = {at: shape.plus(default(at), -1) for at, shape in found.items()}
    return default(share).plus(interpolated(moves, share))


def interpolated(shapes: dict[float, Shape], share: float) -> Shape:
    """The shape at a share, interpolated between its neighbours and constant beyond the ends."""
    below = max((s for s in shapes if s <= share), default=min(shapes))
    above = min((s for s in shapes if s >= share), default=max(shapes))
    part = (share - below) / (above - below) if above > below else 0.0
    return shapes[below].towards(shapes[above], part)
