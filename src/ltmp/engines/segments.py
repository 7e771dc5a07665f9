"""Which rows of a host's features are the tokens of which image, where that is not one [N, C] an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Images among the features [..., C] of a host, flattened to rows [R, C].

    Attributes:
        index: int64 [B, N], the row of each token: prefix tokens first, then the patches, then any row.
        live: bool [B, N], which tokens there are; those come first.
    """

    index: Tensor
    live: Tensor

    @classmethod
    def packed(cls, lengths: Tensor) -> Segments:
        """Images of these lengths [B], one after the other."""
        place = torch.arange(int(lengths.max()), device=lengths.device)
        live = place < lengths[:, None]
        index = (lengths.cumsum(0) - lengths)[:, None] + place
        return cls(index.clamp(max=int(lengths.sum()) - 1), live)

    @classmethod
    def padded(cls, there: Tensor) -> Segments:
        """Images of which only the tokens that are `there`, bool [B, N], exist."""
        images, length = there.shape
        order = (~there).int().argsort(dim=1, stable=True)[:, : int(there.sum(1).max())]
        first = torch.arange(0, images * length, length, device=there.device)
        return cls(order + first[:, None], there.gather(1, order))

    @classmethod
    def ordered(cls, order: Tensor, images: int) -> Segments:
        """Images whose prefix tokens the host has elsewhere: `order` int64 [N] names the places, those first."""
        first = torch.arange(0, images * len(order), len(order), device=order.device)
        index = first[:, None] + order
        return cls(index, torch.ones_like(index, dtype=torch.bool))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each image."""
        return tuple(self.live.sum(1).tolist())

    def take(self, x: Tensor) -> Tensor:
        """The tokens [B, N, C] of features [..., C]."""
        return x.flatten(0, -2)[self.index]

    def put(self, x: Tensor, grid: Tensor) -> Tensor:
        """`x` [..., C] with the tokens `grid` [B, N, C] in their rows; what is no token stays."""
        rows = x.flatten(0, -2).index_copy(0, self.index[self.live], grid[self.live].to(x.dtype))
        return rows.view_as(x)
