"""Block-by-block runs: the protocol for engines passed to `running`, and the engines in plain torch."""

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
from .state import BlockwiseRun, Reduced, State


@runtime_checkable
class SteppableEngine(Protocol):
    """An engine passed to `running` that can also run block by block.

    Attributes:
        active: steps to run, or None to read them from the policy.
    """

    active: Active | None

    def start(
        self, body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int,
        segments: Segments | None,
    ) -> BlockwiseRun:  # fmt: skip
        """Start a run that will be unmerged, see `select.start`."""


@dataclass(frozen=True)
class TorchRun:
    """A block-by-block run of `masked` or `packed`; see `state.BlockwiseRun`."""

    body: Body
    active: Active
    state: State

    @property
    def tokens(self) -> Tokens:
        return self.state.tokens

    def step(self, i: int, bias: Bias | None) -> TorchRun:
        step = masked.step if self.state.counts is None else packed.step
        return replace(self, state=step(self.body, i, replace(self.state, bias=bias), self.active))

    def unmerged(self) -> Tensor:
        return self.state.unmerged()

    def result(self) -> Reduced:
        x, tokens = self.state.x, self.tokens
        kept = torch.stack([torch.as_tensor(k, dtype=torch.float32, device=x.device) for k in self.state.kept], 1)
        return Reduced(x, tokens.size, kept, tokens.source, self.state.trail)


def start_in_torch(
    body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int, segments: Segments | None
) -> TorchRun:
    """Start a run of `masked` or `packed` that will be unmerged, see `select.start`."""
    state = State.start(x, packs=not body.policy.masks, positions=positions, unmerges=True, segments=segments)
    kept, source = state.tokens.counts() if state.counts is None else state.counts, state.tokens.source
    trail = None if state.trail is None or source is None else (source,) * first_block
    return TorchRun(body, active, replace(state, kept=(kept,) * first_block, trail=trail))
