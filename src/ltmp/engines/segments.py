"""Location of images in a host's features, for hosts whose features are not one [N, C] per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Rows of each image in the features [..., C] of a host, flattened to rows [R, C].

    Attributes:
        index: int64 [B, N], the row of each token: prefix tokens first, then patches, then arbitrary rows as padding.
        live: bool [B, N], False for padding.
    """

    index: Tensor
    live: Tensor

    @classmethod
    def packed(cls, lengths: Tensor) -> Segments:
        """Images of these lengths, int [B], one after the other."""
        place = torch.arange(int(lengths.max()), device=lengths.device)
        live = place < lengths[:, None]
        index = (lengths.cumsum(0) - lengths)[:, None] + place
        return cls(index.clamp(max=int(lengths.sum()) - 1), live)

    @classmethod
    def padded(cls, mask: Tensor) -> Segments:
        """Images padded to N tokens; `mask`, bool [B, N], is False for padding, which may be anywhere."""
        images, length = mask.shape
        order = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        first = torch.arange(0, images * length, length, device=mask.device)
        return cls(order + first[:, None], mask.gather(1, order))

    @classmethod
    def ordered(cls, order: Tensor, images: int) -> Segments:
        """Images whose prefix tokens are not in front: `order`, int64 [N], lists the places, prefix tokens first."""
        first = torch.arange(0, images * len(order), len(order), device=order.device)
        index = first[:, None] + order
        return cls(index, torch.ones_like(index, dtype=torch.bool))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each image."""
        return tuple(self.live.sum(1).tolist())

    def take(self, x: Tensor) -> Tensor:
        """Gather the tokens [B, N, C] of features [..., C]."""
        return x.flatten(0, -2)[self.index]

    def put(self, x: Tensor, grid: Tensor) -> Tensor:
        """Return a copy of `x` [..., C] with the tokens `grid` [B, N, C] in their rows, and other rows unchanged."""
        rows = x.flatten(0, -2).index_copy(0, self.index[self.live], grid[self.live].to(x.dtype))
        return rows.view_as(x)
