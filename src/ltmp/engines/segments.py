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
        whole: whether all are known to be there, so that nobody needs to look.
    """

    index: Tensor
    live: Tensor
    whole: bool = False

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
        return cls(index, torch.ones_like(index, dtype=torch.bool), True)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each image."""
        return (self.live.shape[1],) * len(self.live) if self.whole else tuple(self.live.sum(1).tolist())

    def take(self, x: Tensor) -> Tensor:
        """The tokens [B, N, C] of features [..., C]."""
        return x.flatten(0, -2)[self.index]

    def put(self, x: Tensor, grid: Tensor) -> Tensor:
        """`x` [..., C] with the tokens `grid` [B, N, C] in their rows; what is no token stays."""
        index, tokens = self.index.flatten(), grid.flatten(0, 1)
        if not self.whole:
            live = self.live.flatten()
            index, tokens = index[live], tokens[live]
        return x.flatten(0, -2).index_copy(0, index, tokens.to(x.dtype)).view_as(x)
