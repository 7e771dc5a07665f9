"""Budgets: what an architecture can reach, how a schedule meets a target, how far a model is from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UsageError
from ..flops import Geometry, flops_share


def lowest_share(geometry: Geometry, protected: int) -> float:
    """The share of an image that loses every token it can in the first block: no thresholds go below."""
    return float(flops_share(torch.full((geometry.depth,), float(max(1, protected))), geometry))


def check_target(target: float, geometry: Geometry, protected: int) -> None:
    """Refuse a target that no thresholds can meet.

    Raises:
        UsageError: outside (0, 1), or below what this architecture can reach.
    """
    if not (isinstance(target, (int, float)) and math.isfinite(target) and 0 < target < 1):
        raise UsageError(
            f"target is {target!r}: expected a share of the dense model's FLOPs between 0 and 1, such as 0.6"
        )
    least = lowest_share(geometry, protected)
    if target <= least:
        raise UsageError(
            f"target {target:g} is out of reach: the first block's attention alone costs {least:.3f} of this model; "
            f"ask for more than {least:.3f}"
        )


def schedule(target: float, geometry: Geometry, protected: int, last_free: bool = False) -> list[float]:
    """Tokens to have left after each block so that an image costs `target`: the same number goes in every block.

    A constant number a block is the strongest fixed schedule known (ToMe, table 3), which makes it a good start. Where
    that would empty an image early, a block takes at most 40 % of what is left.

    Args:
        last_free: nothing reads the tokens after the last attention, so that the last block keeps only the protected.
    """

    def kept(removed: float) -> list[float]:
        left, after = float(geometry.tokens), []
        for _ in range(geometry.depth):
            left = max(left - removed, 0.6 * left, max(1.0, protected))
            after.append(left)
        return [*after[:-1], max(1.0, protected)] if last_free else after

    low, high = 0.0, float(geometry.tokens)
    for _ in range(50):
        middle = (low + high) / 2
        over = float(flops_share(torch.tensor(kept(middle)), geometry)) > target
        low, high = (middle, high) if over else (low, middle)
    return kept(high)


def budget_loss(share: Tensor, target: float, weight: float) -> Tensor:
    """`weight * (target - mean share)^2` (paper, equation 11).

    Args:
        share: exact FLOPs share of each image [B], or their mean.
    """
    return weight * (share.mean() - target).square()
