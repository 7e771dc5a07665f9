"""A reduced stack one block at a time, every patch in its place: for hosts that look between their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LTMPError
from . import masked, packed
from .positions import Positions
from .request import Active
from .state import Reduced, State

if TYPE_CHECKING:
    from ..hosts.stack import ReducedStack


class Blockwise:
    """One call's way through the blocks of `stack`: what it hands out is the full grid, what runs is what is left.

    Raises:
        LTMPError: the features that a block is given are not those that the block before handed out.
    """

    def __init__(self, stack: ReducedStack) -> None:
        self.stack = stack
        self.step: Callable[[ReducedStack, int, State, Active], State] = packed.step
        self.active: Active = ()
        self.reached: dict[int, tuple[State, Tensor]] = {}

    def __call__(self, i: int, x: Tensor, positions: Positions | None) -> Tensor:
        """Block `i`: [B, N, C], what the block before gave, to [B, N, C]."""
        if i == 0 and not self._gave(0, x):
            self._start(x, positions)
        if not self._gave(i, x):
            raise LTMPError(
                "the host did something to its features between two blocks, which a reduced model cannot follow: "
                "call ltmp.detach(model) for this"
            )
        # gradient checkpointing runs a block again, long after the call
        again = i + 1 in self.reached
        state, _ = self.reached[i] if self._checkpoints() else self.reached.pop(i)
        state = self.step(self.stack, i, state, self.active)
        grid = state.unmerged() if any(map(any, self.active[: i + 1])) else state.x
        self.reached[i + 1] = (state, grid)
        if i + 1 == len(self.active) and not again:
            kept = torch.stack([torch.as_tensor(k, dtype=torch.float32, device=x.device) for k in state.kept], 1)
            self.stack.note(x, Reduced(grid, state.tokens.size, kept, state.tokens.source, state.trail))
        return grid

    def _gave(self, i: int, x: Tensor) -> bool:
        return i in self.reached and self.reached[i][1] is x

    def _checkpoints(self) -> bool:
        return self.stack.grad_checkpointing and torch.is_grad_enabled()

    def _start(self, x: Tensor, positions: Positions | None) -> None:
        self.active = self.stack.active(x)
        if self.active[-1][1] and self.stack.thresholds.prunes_all(-1):
            # learned for a head that reads none of the last block's patches; here they are read
            self.active = (*self.active[:-1], (self.active[-1][0], False))
        trains = self.stack.thresholds.training and any(map(any, self.active))
        self.step = masked.step if trains else packed.step
        self.reached = {0: (State.start(x, packs=not trains, positions=positions, unmerges=True), x)}
