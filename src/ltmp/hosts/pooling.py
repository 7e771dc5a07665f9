"""Pooling over what is there: rows of size 0 never enter, and a merged token counts by its size."""

from __future__ import annotations

import torch
from torch import Tensor


def sized_mean(x: Tensor, size: Tensor) -> Tensor:
    """[B, C], the mean over the patches that the rows of x [B, N, C] stand for.

    Args:
        size: [B, N], patches in each row; 0 for a row that is not there or not to be pooled.
    """
    return (x * size[..., None].to(x.dtype)).sum(1) / size.sum(1, keepdim=True).to(x.dtype)


def without_prefix(size: Tensor, prefix: int) -> Tensor:
    """Sizes [B, N] with those of the prefix 0, but for images that have nothing else left to pool."""
    patches = torch.cat([torch.zeros_like(size[:, :prefix]), size[:, prefix:]], 1)
    return torch.where((patches > 0).any(1, keepdim=True), patches, size)


def log_size(size: Tensor) -> Tensor:
    """Bias for the scores of attention pooling: -inf for rows that are not there, without a gradient to them.

    The gradient of log(0) would be NaN.
    """
    there = size > 0
    return torch.where(there, size, torch.ones_like(size)).log().masked_fill(~there, float("-inf"))
