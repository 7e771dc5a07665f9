"""State of an engine: the batch between two blocks, and the result after the last."""

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
    """Features that patches had when they were pruned: after the attention of the block that pruned them.

    All blocks write to the same memory, and no block reads what a later one writes.

    Attributes:
        values: [B, tokens at the start, C]; arbitrary values for patches that are not pruned.
        block: index of the last block that wrote to it, -1 for none.
    """

    values: Tensor
    block: int = -1

    @classmethod
    def start(cls, x: Tensor, segments: Segments | None = None) -> Dropped:
        """Allocate memory for patches that enter as x [B, N, C]; the padding of `segments` keeps its values in x."""
        if segments is not None or torch.is_grad_enabled():
            return cls(x.clone())
        return cls(torch.empty_like(x))

    def ready(self, block: int) -> Dropped:
        """Return memory that `block` may write to: `self`, or a copy if `block` has already run from this state."""
        if self.block >= block:
            return Dropped(self.values.clone(), block)
        self.block = block
        return self


class BlockwiseRun(Protocol):
    """A run that advances one block at a time: `step` returns its next state and leaves this one valid."""

    @property
    def tokens(self) -> Tokens:
        """The live tokens, [B, N]."""

    def step(self, i: int, bias: Bias | None) -> BlockwiseRun:
        """Run block `i`, with `bias` added to its attention scores, see `Recipe.bias`."""

    def unmerged(self) -> Tensor:
        """Return features [B, tokens at the start, C] with every patch in its place."""

    def result(self) -> Reduced:
        """Return the result so far, of which `kept`, `source` and `trail` are valid."""


@dataclass(frozen=True)
class State:
    """A batch between two blocks.

    Attributes:
        x: [B, N, C], or packed rows of live tokens [T, C].
        tokens: size, origin and source of the tokens.
        counts: live tokens of each image if the engine packs rows, or None.
        kept: tokens of each image, [B], after each block so far.
        trail: sources after each block so far, or None unless every block is traced.
        dropped: features of pruned patches if the run will be unmerged, or None.
        positions: positions of the tokens at the start, or None if the host's attention needs none.
        bias: what the next block adds to its attention scores, or None; see `Recipe.bias`.
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
        segments: Segments | None = None,
    ) -> State:
        """Return the state before the first block, which x [B, N, C] enters.

        Args:
            packs: whether the engine packs the rows of live tokens.
            positions: positions of the tokens, or None if the host's attention needs none.
            unmerges: whether `unmerged` will be called.
            segments: rows of each image among the host's features, None if every image has N tokens.
        """
        if segments is not None:
            return cls._start_segments(x, segments, packs, positions)
        images, length, _ = x.shape
        calls = tracing()
        tokens = Tokens.start(images, length, x.device, traced=calls is not None or unmerges)
        trail = () if calls is not None and calls.every_block else None
        dropped = Dropped.start(x) if unmerges else None
        return cls(x, tokens, [length] * images if packs else None, (), trail, dropped, positions)

    @classmethod
    def _start_segments(cls, x: Tensor, segments: Segments, packs: bool, positions: Positions | None) -> State:
        """`start` for images of different lengths, to be unmerged; their padding is never live."""
        calls, live = tracing(), segments.live
        tokens = Tokens.start(len(live), live.shape[1], x.device, traced=True)
        assert tokens.source is not None
        tokens = replace(
            tokens, keep=live.float(), source=tokens.source.where(live, -1),
            # positions differ between images, so that origins are rows of the host's features
            origin=tokens.origin if positions is None else segments.index,
        )  # fmt: skip
        trail = () if calls is not None and calls.every_block else None
        dropped = Dropped.start(x, segments)
        if packs:
            return cls(x[live], tokens, live.sum(1).tolist(), (), trail, dropped, positions)
        return cls(x, tokens, None, (), trail, dropped, positions)

    def save_dropped(self, block: int, x: Tensor, after: Tokens) -> State:
        """Return this state with the features of the patches that `block` drops saved in `dropped`, if that is needed.

        Args:
            x: the features after the block's attention.
            after: the tokens that the block keeps.
        """
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
        """Return features as rows [T, C], and the row of each image's first token, int64 [B]."""
        if x.ndim == 3:
            images, length = x.shape[:2]
            return x.flatten(0, 1), torch.arange(0, images * length, length, device=x.device)
        number = torch.tensor(self.counts, device=x.device)
        return x, number.cumsum(0) - number

    def after(self, x: Tensor, tokens: Tokens, counts: list[int] | None = None) -> State:
        """Return the state after one more block."""
        kept = tokens.counts() if counts is None else counts
        trail = self.trail
        if trail is not None and tokens.source is not None:
            trail = (*trail, tokens.source)
        return State(x, tokens, counts, (*self.kept, kept), trail, self.dropped, self.positions)

    def unmerged(self) -> Tensor:
        """Return [B, tokens at the start, C]: for each patch, the features of its token or those it was dropped with.

        Only for a state that was started with `unmerges`.
        """
        assert self.tokens.source is not None
        assert self.dropped is not None
        return spread(*self._rows(self.x), self.tokens.source, self.dropped.values)


@dataclass(frozen=True)
class Reduced:
    """The result of an engine.

    Attributes:
        x: [B, N', C], prefix tokens first, then the other live tokens; rows of size 0 hold arbitrary values.
        size: float32 [B, N'], number of patches in each token, 0 for padding; differentiable like `kept`.
        kept: float32 [B, L], tokens after each block; differentiable if the masked engine ran.
        source: int32 [B, N], for each token at the start its row in x, or -1 - l if block l pruned it; None unless the
            call is traced.
        trail: the same after each block, with the numbering of that block; None unless every block is traced.
    """

    x: Tensor
    size: Tensor
    kept: Tensor
    source: Tensor | None = None
    trail: tuple[Tensor, ...] | None = None

    @classmethod
    def dense(cls, x: Tensor, depth: int, segments: Segments | None = None) -> Reduced:
        """Return the result of `depth` blocks that removed nothing, with output x [B, N, C].

        Args:
            segments: tells tokens from padding if images have different lengths.
        """
        images, length, _ = x.shape
        start = Tokens.start(images, length, x.device, traced=True)
        kept = torch.full((images, depth), float(length), device=x.device, dtype=torch.float32)
        if segments is not None:
            kept = segments.live.sum(1, keepdim=True).expand(-1, depth).float()
        return cls(x, start.size, kept, start.source, (start.source,) * depth if start.source is not None else None)
