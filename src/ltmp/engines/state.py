"""The state of an engine: the batch between two blocks, and the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..calls import tracing
from ..method.recipe import Bias
from ..method.tokens import Tokens, spread
from .positions import Positions
from .segments import Segments


@dataclass(frozen=True)
class State:
    """A batch between two blocks.

    Attributes:
        x: [B, N, C], or the live rows [T, C].
        tokens: what is known of them.
        counts: live tokens of each image, where the engine packs its rows.
        kept: tokens after each block so far, one [B] each.
        trail: the sources after each block so far, where every block is traced, or None.
        dropped: [B, tokens at the start, C], the features of each pruned patch when it went, where unmerging asks.
        positions: of the tokens at the start, where the host's attention needs them.
        bias: what the next block adds to its attention, where it adds something; see `Recipe.bias`.
    """

    x: Tensor
    tokens: Tokens
    counts: list[int] | None = None
    kept: tuple[Any, ...] = ()
    trail: tuple[Tensor, ...] | None = None
    dropped: Tensor | None = None
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
        dropped = x if unmerges else None
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
        if packs:
            return cls(x[live], tokens, live.sum(1).tolist(), (), trail, x, positions)
        return cls(x, tokens, None, (), trail, x, positions)

    def attended(self, x: Tensor) -> State:
        """The same with the features `x` that a block's attention left: what is dropped next is remembered so."""
        state = replace(self, x=x)
        return state if state.dropped is None else replace(state, dropped=state.unmerged())

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
        if self.x.ndim == 3:
            images, length = self.x.shape[:2]
            rows, number = self.x.flatten(0, 1), torch.full((images,), length, device=self.x.device)
        else:
            rows, number = self.x, torch.tensor(self.counts, device=self.x.device)
        return spread(rows, number.cumsum(0) - number, self.tokens.source, self.dropped)


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
