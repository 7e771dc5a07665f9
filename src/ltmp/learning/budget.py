"""Budgets: the range that an architecture can reach, and the loss for missing a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UsageError
from ..method.flops import Geometry, flops_share


def lowest_share(geometry: Geometry, protected: int) -> float:
    """The share of an image that loses every token it can in the first block; no thresholds reach a lower one."""
    return float(flops_share(torch.full((geometry.depth,), float(max(1, protected))), geometry))


def check_share(target: float) -> None:
    """Refuse a target that no architecture can have.

    Raises:
        UsageError: not a number in (0, 1).
    """
    if not (isinstance(target, (int, float)) and math.isfinite(target) and 0 < target < 1):
        raise UsageError(
            f"target is {target!r}: expected a share of the dense model's FLOPs between 0 and 1, such as 0.6"
        )


def check_target(target: float, geometry: Geometry, protected: int) -> None:
    """Refuse a target that no thresholds can meet.

    Raises:
        UsageError: outside (0, 1), or below what this architecture can reach.
    """
    check_share(target)
    least = lowest_share(geometry, protected)
    if target <= least:
        raise UsageError(
            f"target {target:g} is out of reach: the first block's attention alone costs {least:.3f} of this model; "
            f"ask for more than {least:.3f}"
        )


def budget_loss(share: Tensor, target: float, weight: float) -> Tensor:
    """`weight * (target - mean share)^2` (paper, equation 11).

    Args:
        share: exact FLOPs share of each image [B], or their mean.
    """
    return weight * (share.mean() - target).square()
