"""Where every patch went: one number a patch, brought up to date block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .context import held


@dataclass
class Trace:
    """Where the patches of the calls made inside `trace()` ended.

    Attributes:
        sources: one int32 [B, N] a call: for each token that entered the first block, the row of `forward_features`'
            output that it is part of, or -1 - l where block l pruned it. Prefix tokens come first.
        blocks: one int32 [B, L, N] a call, the same after each block: what is part of one token has one number, which
            names that token in its block alone. Empty unless asked for.
        every_block: whether it was.
    """

    sources: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    every_block: bool = False

    def add(self, source: Tensor, trail: tuple[Tensor, ...]) -> None:
        self.sources.append(source)
        if self.every_block:
            self.blocks.append(torch.stack(trail, 1))


_TRACE: ContextVar[Trace | None] = ContextVar("ltmp_trace", default=None)
_UNMERGE: ContextVar[bool] = ContextVar("ltmp_unmerge", default=False)


def trace(*, every_block: bool = False) -> AbstractContextManager[Trace]:
    """Follow the patches of the reduced models called inside, in this thread only: 4 bytes a patch.

    >>> with ltmp.trace() as calls:
    ...     features = model.forward_features(images)
    >>> calls.sources[0]  # int32 [B, N]: which row of `features` each patch is part of

    Args:
        every_block: keep what was so after each block, too: 4 bytes a patch and block.
    """
    return held(_TRACE, Trace(every_block=every_block))


def tracing() -> Trace | None:
    """The trace that calls of this thread go to, if any."""
    return _TRACE.get()


def unmerge() -> AbstractContextManager[bool]:
    """Features of reduced models called inside cover every patch, at its own place, in this thread only.

    A patch gets the features of the token that it ended in, and one that was pruned keeps those that it had when it
    was: after the attention of that block. Tokens are removed all the same, so the cost is that of the reduced model
    and a copy. For segmentation, feature maps and whatever else needs the grid; what looks between a host's blocks
    (`forward_intermediates`, `get_intermediate_layers`) is unmerged without asking.

    >>> with ltmp.unmerge():
    ...     features = model.forward_features(images)  # [B, N, C], as if nothing were attached

    One thing differs from an ordinary call: a last block whose prune threshold is 1 or more drops every patch because a
    class-token head reads none of them; here they are read, and that block prunes nothing.
    """
    return held(_UNMERGE, True)


def unmerging() -> bool:
    """Whether this thread is inside `unmerge()`."""
    return _UNMERGE.get()


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
