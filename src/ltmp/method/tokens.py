"""The state of an image's tokens between two blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of each image, live tokens first. Frozen, so that calls share no state.

    Attributes:
        size: float32 [B, N], number of patches in the token.
        keep: float32 [B, N], 1 if live and 0 if removed; carries the straight-through gradient.
        origin: int64 [B, N], position of the token when it entered the first block.
        source: int32 [B, N at the first block], for each of those tokens the position of the token that it is now part
            of, or -1 - l if block l pruned it; None unless the call is traced.
    """

    size: Tensor
    keep: Tensor
    origin: Tensor
    source: Tensor | None = None

    @classmethod
    def start(cls, images: int, tokens: int, device: torch.device, traced: bool = False) -> Tokens:
        """Tokens before the first block: all live, one patch each."""
        ones = torch.ones(images, tokens, device=device, dtype=torch.float32)
        places = torch.arange(tokens, device=device).expand(images, tokens)
        return cls(ones, ones, places, places.int() if traced else None)

    @property
    def live(self) -> Tensor:
        """bool [B, N]."""
        return self.keep > 0

    def counts(self) -> Tensor:
        """float32 [B], live tokens of each image; differentiable."""
        return self.keep.sum(1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` [B, N] or [B, N, C] at `index` [B, M], image by image."""
    if values.ndim == 3:
        index = index[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index)


def take_all(state, index: Tensor):  # type: ignore[no-untyped-def]
    """Reorder every tensor of a frozen dataclass by `index` [B, M]."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return replace(state, **{name: take(value, index) for name, value in values.items() if value is not None})


def follow(source: Tensor, into: Tensor, order: Tensor, live: Tensor, block: int) -> Tensor:
    """Update `Tokens.source` by one block.

    Args:
        source: int32 [B, N] before, positions of live tokens or negative.
        into: int64 [B, M], for each old position the position that its token is merged into.
        order: int64 [B, M], for each new position the old one.
        live: bool [B, M], which new positions hold a live token.
        block: number of the block, recorded for tokens that it pruned.

    Returns:
        int32 [B, N] after.
    """
    position = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    moved = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, position.where(live, -1 - block))
    at = into.gather(1, source.clamp_min(0).long())
    return torch.where(source < 0, source, moved.gather(1, at))


def spread(rows: Tensor, first: Tensor, source: Tensor, other: Tensor) -> Tensor:
    """Give every patch the features of the token that it was merged into.

    Args:
        rows: [T, C], the tokens of all images.
        first: int64 [B], the row of each image's first token.
        source: int32 [B, N], see `Tokens.source`.
        other: [B, N, C], features of patches whose source is negative.

    Returns:
        [B, N, C].
    """
    at = first[:, None] + source.clamp_min(0)
    features = rows.index_select(0, at.flatten()).unflatten(0, at.shape)
    return torch.where((source < 0)[..., None], other, features)
