"""Engines block by block: what one offers that a caller brings, and those in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..method.policy import Active
from ..method.recipe import Bias
from ..method.tokens import Tokens
from . import masked, packed
from .body import Body
from .positions import Positions
from .segments import Segments
from .state import Partway, Reduced, State


@runtime_checkable
class Stepping(Protocol):
    """An engine that a caller brings, of blocks that a host takes one by one.

    Attributes:
        active: steps to run, where they have been read already.
    """

    active: Active | None

    def start(
        self, body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, among: Segments | None
    ) -> Partway:
        """[B, N, C] behind `before` blocks that removed nothing, to be unmerged."""


@dataclass(frozen=True)
class InTorch:
    """A batch between two blocks of `masked` or `packed`; see `state.Partway`."""

    body: Body
    active: Active
    state: State

    @property
    def tokens(self) -> Tokens:
        return self.state.tokens

    def step(self, i: int, bias: Bias | None) -> InTorch:
        step = masked.step if self.state.counts is None else packed.step
        return replace(self, state=step(self.body, i, replace(self.state, bias=bias), self.active))

    def unmerged(self) -> Tensor:
        return self.state.unmerged()

    def reduced(self) -> Reduced:
        x, tokens = self.state.x, self.tokens
        kept = torch.stack([torch.as_tensor(k, dtype=torch.float32, device=x.device) for k in self.state.kept], 1)
        return Reduced(x, tokens.size, kept, tokens.source, self.state.trail)


def start_in_torch(
    body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, among: Segments | None
) -> InTorch:
    """`x` [B, N, C] behind `before` blocks that removed nothing, to be unmerged."""
    state = State.start(x, packs=not body.policy.masks, positions=positions, unmerges=True, among=among)
    kept, source = state.tokens.counts() if state.counts is None else state.counts, state.tokens.source
    trail = None if state.trail is None or source is None else (source,) * before
    return InTorch(body, active, replace(state, kept=(kept,) * before, trail=trail))
