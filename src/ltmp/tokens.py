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
        ones = torch.ones(images, tokens, device=device)
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
