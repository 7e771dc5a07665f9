"""Rotary embeddings, shared by recipes: pairs of channels rotated by angles that depend on a token's position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_rows(sin: Tensor, cos: Tensor, tokens: int) -> Tensor:
    """Return the sines and cosines of all tokens, concatenated to [..., N, 2 E].

    Args:
        sin, cos: [..., P, E] of the patches.
        tokens: N; the first N - P are prefix tokens, which are not rotated.
    """
    prefix = tokens - sin.shape[-2]
    zeros = sin.new_zeros(*sin.shape[:-2], prefix, sin.shape[-1])
    return torch.cat([torch.cat([zeros, sin], -2), torch.cat([zeros + 1, cos], -2)], -1)


def rotated(x: Tensor, rows: Tensor, half: bool) -> Tensor:
    """Rotate x [..., H, D] by rows [..., 1 or H, 2 D] of `rotary_rows`.

    Args:
        half: whether channel i is paired with i + D / 2, rather than 2 i with 2 i + 1.
    """
    sin, cos = rows.chunk(2, -1)
    if half:
        first, second = x.chunk(2, -1)
        partners = torch.cat([-second, first], -1)
    else:
        partners = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + partners * sin).to(x.dtype)
