"""Single blocks of a reduced model, every patch in its place after each: for whoever looks between blocks.

What runs is what is left. Where it is rides on the features that a block hands out, so that the next block goes on from
there, whoever calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LTMPError
from ..method.policy import Active
from . import masked, packed
from .body import Body
from .positions import Positions
from .state import Reduced, State


@dataclass(frozen=True)
class Reached:
    """Where a call is between two blocks.

    Attributes:
        block: the one that comes next.
        body, active: of the call.
        state: what is left; without its features where they are those that were handed out.
    """

    block: int
    body: Body
    active: Active
    state: State


def run_block(body: Body, i: int, x: Tensor, positions: Positions | None) -> Tensor:
    """Block `i`: [B, N, C], what the block before gave, to [B, N, C].

    Raises:
        LTMPError: `x` is not what the block before handed out.
    """
    reached = getattr(x, "ltmp_reached", None)
    if i == 0 and not (recomputing() and isinstance(reached, Reached) and reached.block == 0):
        reached = _start(body, x, positions)
    if not isinstance(reached, Reached) or reached.block != i or reached.body.host is not body.host:
        raise LTMPError(
            f"block {i} of a reduced model goes on from what block {i - 1} handed out, and was given something else: "
            "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
        )
    return _step(reached, x)


def _start(body: Body, x: Tensor, positions: Positions | None) -> Reached:
    active = body.active()
    # here patches are read whatever the head reads
    active = body.read_whole(active) if active[-1][1] else active
    state = State.start(x, packs=not body.policy.masks, positions=positions, unmerges=True)
    reached = Reached(0, body, active, _bare(state, x))
    if torch.is_grad_enabled() and body.grad_checkpointing:
        # found again when the host recomputes this block, whatever this thread runs by then
        x.ltmp_reached = reached  # type: ignore[attr-defined]
    return reached


def _step(reached: Reached, x: Tensor) -> Tensor:
    i, body, active, state = reached.block, reached.body, reached.active, reached.state
    # features that nothing was removed from are what was handed out
    reduced = any(map(any, active[: i + 1]))
    state = state if any(map(any, active[:i])) else replace(state, x=x, dropped=x)
    step = packed.step if state.counts is not None else masked.step
    state = step(body, i, state, active)
    grid = state.unmerged() if reduced else state.x
    # an engine may hand back what it was given
    grid = grid if grid is not x else grid.view_as(grid)
    if i + 1 == body.depth and not recomputing():
        kept = torch.stack([torch.as_tensor(k, dtype=torch.float32, device=x.device) for k in state.kept], 1)
        body.note(x, Reduced(grid, state.tokens.size, kept, state.tokens.source, state.trail))
    state = state if reduced else _bare(state, x)
    grid.ltmp_reached = Reached(i + 1, body, active, state)  # type: ignore[attr-defined]
    return grid


def _bare(state: State, x: Tensor) -> State:
    """The state without its features, to ride on them: a tensor that holds itself would not be freed in time."""
    empty = x.new_empty(0)
    return replace(state, x=empty, dropped=empty)


def recomputing() -> bool:
    """Whether a backward pass runs this again, for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
