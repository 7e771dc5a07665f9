"""The FLOPs share of an image: one formula, used by learning, evaluation and benchmarks alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The sizes that the cost of a block depends on.

    Args:
        tokens: tokens that enter the first block, N (prefix tokens included); the most where images differ.
        width: C.
        mlp_ratio: hidden width over C of a two-layer MLP of the same cost, one number for each block.
        each: tokens of each image where they differ, or None.
    """

    tokens: int
    width: int
    mlp_ratio: tuple[float, ...]
    each: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        return len(self.mlp_ratio)


def block_costs(entering: Tensor, leaving: Tensor, geometry: Geometry) -> Tensor:
    """Multiply-adds of each block over C squared: `4 n_in + 2 n_in^2 / C + 2 r n_out`, all [..., L]."""
    ratio = entering.new_tensor(geometry.mlp_ratio)
    return 4 * entering + 2 * entering.square() / geometry.width + 2 * ratio * leaving


def flops_share(kept: Tensor, geometry: Geometry) -> Tensor:
    """Share of the dense model's multiply-adds that an image costs; differentiable in `kept`.

    Args:
        kept: tokens after each block, [..., L].

    Returns:
        [...] in (0, 1], one share an image: average shares, never counts (the cost is quadratic in them).
    """
    dense = kept.new_tensor(geometry.each or geometry.tokens)[..., None].expand_as(kept[..., :1])
    entering = torch.cat([dense, kept[..., :-1]], -1)
    full = dense.expand_as(kept)
    return block_costs(entering, kept, geometry).sum(-1) / block_costs(full, full, geometry).sum(-1)
