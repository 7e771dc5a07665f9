"""Run a reduced model block by block, with every patch in its place, for code that reads features between blocks.

Each block runs on the live tokens only, with the engine that would run all blocks at once. The state of the run is an
attribute of the features that a block returns, so that the next block can continue from them, whatever code calls it.
The features themselves are only computed if something reads them (`deferred`), which is rare between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import is_dense, recomputing, recording, tracing
from ..errors import LTMPError
from ..method.policy import Active
from . import select
from .body import Body, running_engine
from .deferred import defer
from .positions import positions_of
from .segments import Segments
from .state import BlockwiseRun, Reduced
from .steps import SteppableEngine

PLACES: ContextVar[list[Tensor] | None] = ContextVar("ltmp_places", default=None)
"""List to which calls of this thread append a mask after each block, or None.

The mask, bool [...], tells which of the features [..., C] that the block returns are in the place of a live token."""


@dataclass(frozen=True)
class Progress:
    """State of a call between two blocks.

    Attributes:
        block: index of the next block.
        body, active: blocks, policy and active steps of the call.
        state: the run on live tokens, or None while no block could remove any.
        unreduced: the features [..., C] that entered the first block that may remove tokens.
        segments: rows of each image in them, None if they are one [N, C] per image.
        has_positions: whether the host passes positions to its blocks.
        defers: whether features may be computed only when they are read: neither autograd nor a tracer follows them.
    """

    block: int
    body: Body
    active: Active
    state: BlockwiseRun | None = None
    unreduced: Tensor | None = None
    segments: Segments | None = None
    has_positions: bool = False
    defers: bool = False

    def grid(self) -> Tensor:
        """Return the features [..., C] after the block that ran last."""
        assert self.state is not None
        assert self.unreduced is not None
        grid = self.state.unmerged()
        return grid if self.segments is None else self.segments.put(self.unreduced, grid)


def continues_call(host: nn.Module, i: int, x: Tensor) -> bool:
    """Whether block `i` continues a reduced call of `host`: `x` is the output of block `i - 1` in such a call."""
    progress = getattr(x, "ltmp_progress", None)
    return isinstance(progress, Progress) and progress.block == i > 0 and progress.body.host is host and not is_dense()


def run_block(body: Body, i: int, x: Tensor, named: Mapping[str, Any], run_own: Callable[[], Any]) -> Any:
    """Run block `i` of a reduced model.

    Args:
        x: [B, N, C], or rows located by `Recipe.images`: the output of block `i - 1`.
        named: the other arguments that the host passes to this block.
        run_own: calls the host's own block with these arguments; used while no block up to this one removes tokens.

    Returns:
        The same as `run_own`: the features, shaped like `x`, or a pair if `Recipe.wraps`.

    Raises:
        LTMPError: `x` is not the output of block `i - 1`.
    """
    progress = getattr(x, "ltmp_progress", None)
    if i == 0 and not (recomputing() and isinstance(progress, Progress) and progress.block == 0):
        override = running_engine()
        active = override.active if isinstance(override, SteppableEngine) else None
        active = body.active() if active is None else active
        # patches are read between blocks, even if the head reads none
        progress = Progress(0, body, body.keep_last_patches(active) if active[-1][1] and not body.grid else active)
        if torch.is_grad_enabled() and body.grad_checkpointing:
            # used again when the backward pass recomputes this block, whatever this thread runs by then
            x.ltmp_progress = progress  # type: ignore[attr-defined]
    if not isinstance(progress, Progress) or progress.block != i or progress.body.host is not body.host:
        raise LTMPError(
            f"block {i} of a reduced model goes on from what block {i - 1} handed out, and was given something else: "
            "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
        )
    if not any(map(any, progress.active[: i + 1])):
        output = run_own()
        grid = output[0] if body.recipe.wraps else output
        # a block may return its input itself, which must keep its own progress
        grid = grid if grid is not x else grid.view_as(grid)
        progress = replace(progress, block=i + 1)
        if i + 1 == body.depth:
            record_dense(progress.body, x, named)
    else:
        progress = _step(_start(progress, x, named) if progress.state is None else progress, named)
        # the output of the last block is always read
        grid = defer(progress.grid, x) if i + 1 < body.depth and progress.defers else progress.grid()
        _note(progress, x)
    places = PLACES.get()
    if places is not None:
        places.append(_live_places(progress, x))
    grid.ltmp_progress = progress
    return (grid, None) if body.recipe.wraps else grid


def record_dense(body: Body, x: Tensor, named: Mapping[str, Any]) -> None:
    """Add a call with features `x` that removes nothing to the active `record()` and `trace()`, if any."""
    if recording() is not None or tracing() is not None:
        segments = body.recipe.images(body.host, x, named)
        body.record_call(x, Reduced.dense(x if segments is None else segments.take(x), body.depth, segments), segments)


def _start(progress: Progress, x: Tensor, named: Mapping[str, Any]) -> Progress:
    """Start the run on live tokens, at the first block that may remove any."""
    i, body = progress.block, progress.body
    segments = body.recipe.images(body.host, x, named)
    positions = positions_of(body.recipe, body.host, x.shape[-2], (), named)
    entering = x if segments is None else segments.take(x)
    state = select.start(body, entering, progress.active, positions, i, segments)
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    # autocast may change the dtype of features between blocks, which a deferred tensor has to state in advance
    defers = not (followed or torch.is_autocast_enabled(x.device.type))
    has_positions = positions is not None
    return replace(
        progress, state=state, unreduced=x, segments=segments, has_positions=has_positions, defers=defers
    )  # fmt: skip


def _step(progress: Progress, named: Mapping[str, Any]) -> Progress:
    i, body, state = progress.block, progress.body, progress.state
    assert state is not None
    return replace(progress, block=i + 1, state=state.step(i, body.recipe.bias(body.host, i, named)))


def _note(progress: Progress, x: Tensor) -> None:
    """Add the call to the active `record()` and `trace()` after its last block."""
    body, state = progress.body, progress.state
    assert state is not None
    if progress.block == body.depth:
        body.record_call(x, state.result(), progress.segments)


def _live_places(progress: Progress, x: Tensor) -> Tensor:
    """Return bool [...], which of the features x [..., C] are in the place of a live token."""
    if progress.state is None:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    tokens, segments = progress.state.tokens, progress.segments
    image, slot = tokens.live.nonzero(as_tuple=True)
    row = tokens.origin[image, slot]
    if segments is None:
        row = image * x.shape[1] + row
    elif not progress.has_positions:
        row = segments.index[image, row]
    places = torch.zeros(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
    return places.index_fill(0, row, True).view(x.shape[:-1])
