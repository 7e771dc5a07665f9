"""How fast tokens go, block by block: what thresholds are calibrated to follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..method.flops import Geometry, flops_share

MOST = 0.8 * math.log(2)
"""The fastest rate at which tokens may merge: half of them could, each into its partner."""


@dataclass(frozen=True)
class Schedule:
    """Rates at which the steps of each block remove tokens: of n that enter a step, n exp(-rate) stay.

    Attributes:
        merge, prune: float64 [L]; 0 turns a step off, and a block that prunes at rate infinity keeps what it must.
    """

    merge: Tensor
    prune: Tensor

    def kept(self, geometry: Geometry, protected: int) -> Tensor:
        """float64 [L], tokens after each block."""
        left = geometry.tokens * torch.exp(-(self.merge + self.prune).cumsum(0))
        return left.clamp(min=float(max(1, protected)))

    def share(self, geometry: Geometry, protected: int) -> float:
        """FLOPs share of an image that follows it."""
        return float(flops_share(self.kept(geometry, protected), geometry))

    def times(self, factor: float) -> Schedule:
        """All rates by a common factor."""
        return Schedule((self.merge * factor).clamp(max=MOST), self.prune * factor)

    def to_cost(self, target: float, geometry: Geometry, protected: int) -> Schedule:
        """The same schedule sped up or slowed down until it costs `target`."""
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
    """How a schedule is spread over a network, whatever its depth and budget: parabolas of the rates' logarithms.

    Five numbers, because single blocks' rates hardly matter near a good shape, and noise in what a few hundred images
    tell would be learned as if they did.

    Attributes:
        merge_slope, prune_slope: from the middle of the network to its end.
        merge_bend, prune_bend: at both ends against the middle.
        prune_level: of pruning against merging.
    """

    merge_slope: float
    merge_bend: float
    prune_level: float
    prune_slope: float
    prune_bend: float

    def schedule(self, depth: int, steps: tuple[str, ...], last_free: bool = False) -> Schedule:
        """A schedule of this shape; `Schedule.to_cost` gives it a size.

        Args:
            steps: of "merge" and "prune", those that there are.
            last_free: nothing reads the tokens after the last attention, so that the last block keeps only the
                protected.
        """
        z = torch.linspace(-1, 1, depth, dtype=torch.float64) if depth > 1 else torch.zeros(1, dtype=torch.float64)
        bow, off = z * z - 0.4, torch.zeros_like(z)
        merge = torch.exp(self.merge_slope * z + self.merge_bend * bow) if "merge" in steps else off
        prune = torch.exp(self.prune_level + self.prune_slope * z + self.prune_bend * bow) if "prune" in steps else off
        if last_free and "prune" in steps:
            merge[-1], prune[-1] = 0.0, math.inf
        return Schedule(merge, prune)

    def plus(self, other: Shape, times: float = 1.0) -> Shape:
        """Number by number."""
        return Shape(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def towards(self, other: Shape, part: float) -> Shape:
        """The shape `part` of the way to another one."""
        return self.plus(other.plus(self, -1), part)


def between(shapes: dict[float, Shape], share: float) -> Shape:
    """The shape for a share, in proportion between its neighbours, or the nearest beyond the ends."""
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
"""What served best wherever we searched (docs/accuracy.md), by matching and share: with a large budget merging works
past the middle of the network and pruning grows towards its end, the less of it the larger; a small one is better
spread evenly. Mutual pairs lose less by merging, so that less is left to pruning."""


def usual(share: float, matching: str = "bipartite") -> Shape:
    """The shape to start from."""
    return between(USUAL[matching], share)


def searched(usual: Callable[[float], Shape], found: dict[float, Shape], share: float) -> Shape:
    """The usual shape, moved as searches at the shares of `found` moved it: what is usual changes beyond them, too."""
    if not found:
        return usual(share)
    moves = {at: shape.plus(usual(at), -1) for at, shape in found.items()}
    return usual(share).plus(between(moves, share))
