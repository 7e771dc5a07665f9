"""Rotary embeddings as hosts of all libraries have them: pairs of channels turned by an angle of each token's place."""

from __future__ import annotations

import torch
from torch import Tensor


def turn_table(sin: Tensor, cos: Tensor, tokens: int) -> Tensor:
    """Sines and cosines of all tokens side by side, [..., N, 2 E].

    Args:
        sin, cos: [..., P, E] of the patches.
        tokens: N; the first N - P are prefix tokens, which are not turned.
    """
    prefix = tokens - sin.shape[-2]
    still = sin.new_zeros(*sin.shape[:-2], prefix, sin.shape[-1])
    return torch.cat([torch.cat([still, sin], -2), torch.cat([still + 1, cos], -2)], -1)


def turned(x: Tensor, rows: Tensor, half: bool) -> Tensor:
    """x [..., H, D] turned by the rows [..., 1 or H, 2 D] of `turn_table`.

    Args:
        half: a pair is a channel of the first half and one of the second; otherwise two neighbours.
    """
    sin, cos = rows.chunk(2, -1)
    if half:
        first, second = x.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    else:
        across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + across * sin).to(x.dtype)
