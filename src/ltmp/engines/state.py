"""The state of an engine: the batch between two blocks, and the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calls import tracing
from ..method.recipe import Bias
from ..method.tokens import Tokens, spread
from .positions import Positions
from .segments import Segments


@dataclass
class Dropped:
    """What pruned patches were when they went: after the attention of the block that dropped them.

    Each block adds to the same memory, and none reads what a later one adds.

    Attributes:
        values: [B, tokens at the start, C]; of a patch that is not pruned, anything.
        block: the last one that wrote to it, -1 for none.
    """

    values: Tensor
    block: int = -1

    @classmethod
    def start(cls, x: Tensor, among: Segments | None = None) -> Dropped:
        """For patches that enter as x [B, N, C]; those that are not there keep this."""
        if among is not None or torch.is_grad_enabled():
            return cls(x.clone())
        return cls(torch.empty_like(x))

    def ready(self, block: int) -> Dropped:
        """What `block` may write to: this, or a copy where a call went on from here before."""
        if self.block >= block:
            return Dropped(self.values.clone(), block)
        self.block = block
        return self


class Partway(Protocol):
    """A batch between two blocks, of an engine that goes block by block."""

    @property
    def tokens(self) -> Tokens:
        """What is left, [B, N]."""

    def step(self, i: int, bias: Bias | None) -> Partway:
        """Run block `i`, which adds `bias` to its attention, see `Recipe.bias`."""

    def unmerged(self) -> Tensor:
        """[B, tokens at the start, C], every patch in its place."""

    def reduced(self) -> Reduced:
        """What there is to tell of it: `kept`, `source` and `trail`."""


@dataclass(frozen=True)
class State:
    """A batch between two blocks.

    Attributes:
        x: [B, N, C], or the live rows [T, C].
        tokens: what is known of them.
        counts: live tokens of each image, where the engine packs its rows.
        kept: tokens after each block so far, one [B] each.
        trail: the sources after each block so far, where every block is traced, or None.
        dropped: what pruned patches were, where unmerging asks.
        positions: of the tokens at the start, where the host's attention needs them.
        bias: what the next block adds to its attention, where it adds something; see `Recipe.bias`.
    """

    x: Tensor
    tokens: Tokens
    counts: list[int] | None = None
    kept: tuple[Any, ...] = ()
    trail: tuple[Tensor, ...] | None = None
    dropped: Dropped | None = None
    positions: Positions | None = None
    bias: Bias | None = None

    @classmethod
    def start(
        cls,
        x: Tensor,
        *,
        packs: bool,
        positions: Positions | None,
        unmerges: bool = False,
        among: Segments | None = None,
    ) -> State:
        """[B, N, C] as it enters the first block.

        Args:
            unmerges: whether `unmerged` will be asked for.
            among: where images are among the host's features, if not of N tokens each.
        """
        if among is not None:
            return cls._start_among(x, among, packs, positions)
        images, length, _ = x.shape
        calls = tracing()
        tokens = Tokens.start(images, length, x.device, traced=calls is not None or unmerges)
        trail = () if calls is not None and calls.every_block else None
        dropped = Dropped.start(x) if unmerges else None
        return cls(x, tokens, [length] * images if packs else None, (), trail, dropped, positions)

    @classmethod
    def _start_among(cls, x: Tensor, among: Segments, packs: bool, positions: Positions | None) -> State:
        """`start` of images of different sizes, to be unmerged: what is not there never lives."""
        calls, live = tracing(), among.live
        tokens = Tokens.start(len(live), live.shape[1], x.device, traced=True)
        assert tokens.source is not None
        tokens = replace(
            tokens, keep=live.float(), source=tokens.source.where(live, -1),
            # rows of the host's positions, which differ between images
            origin=tokens.origin if positions is None else among.index,
        )  # fmt: skip
        trail = () if calls is not None and calls.every_block else None
        dropped = Dropped.start(x, among)
        if packs:
            return cls(x[live], tokens, live.sum(1).tolist(), (), trail, dropped, positions)
        return cls(x, tokens, None, (), trail, dropped, positions)

    def without(self, block: int, x: Tensor, after: Tokens) -> State:
        """The same, where what `block` drops is remembered as the features `x` that its attention left."""
        before = self.tokens.source
        if self.dropped is None or before is None or after.source is None:
            return self
        gone = (before >= 0) & (after.source < 0)
        rows, first = self._rows(x)
        if torch.is_grad_enabled():
            values = spread(rows, first, before.where(gone, -1), self.dropped.values)
            return replace(self, dropped=Dropped(values))
        dropped = self.dropped.ready(block)
        image, patch = gone.nonzero(as_tuple=True)
        dropped.values[image, patch] = rows[first[image] + before[image, patch]].to(dropped.values.dtype)
        return replace(self, dropped=dropped)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features as rows [T, C], and the row of each image's first token, int64 [B]."""
        if x.ndim == 3:
            images, length = x.shape[:2]
            return x.flatten(0, 1), torch.arange(0, images * length, length, device=x.device)
        number = torch.tensor(self.counts, device=x.device)
        return x, number.cumsum(0) - number

    def after(self, x: Tensor, tokens: Tokens, counts: list[int] | None = None) -> State:
        """One block further."""
        kept = tokens.counts() if counts is None else counts
        trail = self.trail
        if trail is not None and tokens.source is not None:
            trail = (*trail, tokens.source)
        return State(x, tokens, counts, (*self.kept, kept), trail, self.dropped, self.positions)

    def unmerged(self) -> Tensor:
        """[B, tokens at the start, C]: every patch with the features of its token, or those it had when it was dropped.

        Only of a state that was started for it.
        """
        assert self.tokens.source is not None
        assert self.dropped is not None
        return spread(*self._rows(self.x), self.tokens.source, self.dropped.values)


@dataclass(frozen=True)
class Reduced:
    """The result of an engine.

    Attributes:
        x: [B, N', C], prefix tokens first, then the other live tokens; what rows of size 0 hold means nothing.
        size: float32 [B, N'], patches in each token, 0 for a row that is not there; differentiable like `kept`.
        kept: float32 [B, L], tokens after each block; differentiable from the masked engine.
        source: int32 [B, N], for each token at the start its row in x, or -1 - l where block l pruned it; None where
            nobody asked.
        trail: the same after each block, numbered as there, where every block was asked for.
    """

    x: Tensor
    size: Tensor
    kept: Tensor
    source: Tensor | None = None
    trail: tuple[Tensor, ...] | None = None

    @classmethod
    def whole(cls, x: Tensor, depth: int, among: Segments | None = None) -> Reduced:
        """[B, N, C] after `depth` blocks that removed nothing; `among` says which tokens there were."""
        images, length, _ = x.shape
        start = Tokens.start(images, length, x.device, traced=True)
        kept = torch.full((images, depth), float(length), device=x.device, dtype=torch.float32)
        if among is not None:
            kept = among.live.sum(1, keepdim=True).expand(-1, depth).float()
        return cls(x, start.size, kept, start.source, (start.source,) * depth if start.source is not None else None)
