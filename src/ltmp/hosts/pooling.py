"""Pooling of a reduced model: rows of size 0 are left out, and a merged token is weighted by its size."""

from __future__ import annotations

import torch
from torch import Tensor


def sized_mean(x: Tensor, size: Tensor) -> Tensor:
    """Return the mean [B, C] over the patches that the rows of x [B, N, C] stand for.

    Args:
        size: [B, N], number of patches in each row; 0 for a row that is absent or not to be pooled.
    """
    return (x * size[..., None].to(x.dtype)).sum(1) / size.sum(1, keepdim=True).to(x.dtype)


def without_prefix(size: Tensor, prefix: int) -> Tensor:
    """Set the sizes [B, N] of the prefix tokens to 0, except in images that have no patch left to pool."""
    patches = torch.cat([torch.zeros_like(size[:, :prefix]), size[:, prefix:]], 1)
    return torch.where((patches > 0).any(1, keepdim=True), patches, size)


def log_size(size: Tensor) -> Tensor:
    """Return the bias for the scores of attention pooling: log(size), and -inf for absent rows.

    Absent rows get no gradient: that of log(0) would be NaN.
    """
    present = size > 0
    return torch.where(present, size, torch.ones_like(size)).log().masked_fill(~present, float("-inf"))
