"""What is known of the tokens between two blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What is known of each token of each image, live tokens first. Frozen: a call shares nothing with another.

    Attributes:
        size: float32 [B, N], patches merged into the token.
        keep: float32 [B, N], 1 live and 0 gone; carries the straight-through gradient.
        origin: int64 [B, N], the token's place when it entered the first block.
        source: int32 [B, tokens at the start], the place where each of those is now, or -1 - l where block l pruned it;
            None where nobody asks.
    """

    size: Tensor
    keep: Tensor
    origin: Tensor
    source: Tensor | None = None

    @classmethod
    def start(cls, images: int, tokens: int, device: torch.device, traced: bool = False) -> Tokens:
        """All tokens live, each one patch."""
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
    """The same frozen dataclass with every tensor that it has reordered by `index` [B, M]."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return replace(state, **{name: take(value, index) for name, value in values.items() if value is not None})


def follow(source: Tensor, into: Tensor, order: Tensor, live: Tensor, block: int) -> Tensor:
    """One block further.

    Args:
        source: int32 [B, N] before, places of live tokens or negative.
        into: int64 [B, M], for each old place the one it is folded into.
        order: int64 [B, M], for each new place the old one.
        live: bool [B, M], which new places hold a token.
        block: its number, for those that it pruned.

    Returns:
        int32 [B, N] after.
    """
    place = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    moved = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, place.where(live, -1 - block))
    at = into.gather(1, source.clamp_min(0).long())
    return torch.where(source < 0, source, moved.gather(1, at))


def spread(rows: Tensor, first: Tensor, source: Tensor, other: Tensor) -> Tensor:
    """Give every patch the features of the token that it is part of.

    Args:
        rows: [T, C], the tokens of all images.
        first: int64 [B], the row of each image's first token.
        source: int32 [B, N], places of tokens in their image, or negative.
        other: [B, N, C], what patches of negative source get.

    Returns:
        [B, N, C].
    """
    at = first[:, None] + source.clamp_min(0)
    found = rows.index_select(0, at.flatten()).unflatten(0, at.shape)
    return torch.where((source < 0)[..., None], other, found)
