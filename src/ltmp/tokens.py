"""The state of one call between two blocks."""

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
    """

    size: Tensor
    keep: Tensor
    origin: Tensor

    @classmethod
    def start(cls, images: int, tokens: int, device: torch.device) -> Tokens:
        """All tokens live, each one patch."""
        ones = torch.ones(images, tokens, device=device)
        return cls(ones, ones, torch.arange(tokens, device=device).expand(images, tokens))

    @property
    def live(self) -> Tensor:
        """bool [B, N]."""
        return self.keep > 0

    def counts(self) -> Tensor:
        """float32 [B], live tokens of each image; differentiable."""
        return self.keep.sum(1)


@dataclass(frozen=True)
class Reduced:
    """What an engine hands back.

    Attributes:
        x: [B, N', C], prefix tokens first, then the other live tokens; what rows of size 0 hold means nothing.
        size: float32 [B, N'], patches in each token, 0 for a row that is not there; differentiable like `kept`.
        kept: float32 [B, L], tokens after each block; differentiable from the masked engine.
    """

    x: Tensor
    size: Tensor
    kept: Tensor


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` [B, N] or [B, N, C] at `index` [B, M], image by image."""
    if values.ndim == 3:
        index = index[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index)


def take_all(state, index: Tensor):  # type: ignore[no-untyped-def]
    """The same frozen dataclass with every tensor reordered by `index` [B, M]."""
    return replace(state, **{f.name: take(getattr(state, f.name), index) for f in fields(state)})
