"""The FLOPs share of an image: one formula for learning, evaluation and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The sizes that the cost of a block depends on.

    Args:
        tokens: tokens that enter the first block, N (prefix tokens included); of the longest image if images differ.
        width: embedding width, C.
        mlp_ratio: per block, hidden width over C of a two-layer MLP of the same cost.
        each: tokens of each image if they differ, or None.
    """

    tokens: int
    width: int
    mlp_ratio: tuple[float, ...]
    each: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        return len(self.mlp_ratio)


def block_costs(entering: Tensor, leaving: Tensor, geometry: Geometry) -> Tensor:
    """Multiply-adds of each block divided by C squared: `4 n_in + 2 n_in^2 / C + 2 r n_out`, all [..., L]."""
    ratio = entering.new_tensor(geometry.mlp_ratio)
    return 4 * entering + 2 * entering.square() / geometry.width + 2 * ratio * leaving


def flops_share(kept: Tensor, geometry: Geometry) -> Tensor:
    """The multiply-adds of an image as a share of the dense model's; differentiable in `kept`.

    Args:
        kept: tokens after each block, [..., L].

    Returns:
        [...] in (0, 1], one share per image. Average shares, not token counts: the cost is quadratic in them.
    """
    dense = kept.new_tensor(geometry.each or geometry.tokens)[..., None].expand_as(kept[..., :1])
    entering = torch.cat([dense, kept[..., :-1]], -1)
    full = dense.expand_as(kept)
    return block_costs(entering, kept, geometry).sum(-1) / block_costs(full, full, geometry).sum(-1)
