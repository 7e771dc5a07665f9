"""Single blocks of a reduced model, every patch in its place after each: for whoever looks between blocks.

What runs is what is left, by the engine that would run all blocks at once. Where it is rides on the features that a
block hands out, so that the next block goes on from there, whoever calls it; those features are put together when they
are read (`deferred`), which between most blocks nobody does.
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
from .state import Partway, Reduced
from .steps import Stepping

PLACES: ContextVar[list[Tensor] | None] = ContextVar("ltmp_places", default=None)
"""Where calls of this thread say, after each block, which of the features [..., C] that they hand out are in the place
of a token that is left, bool [...]; None where nobody asks."""


@dataclass(frozen=True)
class Reached:
    """Where a call is between two blocks.

    Attributes:
        block: the one that comes next.
        body, active: of the call.
        state: what is left, or None where nothing was removed yet.
        entered: the features [..., C] from which something was removed first.
        among: where images are among them, if not of N tokens each.
        positioned: whether the host has positions for its tokens.
        waits: whether features may be computed when they are read: nothing follows what is done with them.
    """

    block: int
    body: Body
    active: Active
    state: Partway | None = None
    entered: Tensor | None = None
    among: Segments | None = None
    positioned: bool = False
    waits: bool = False

    def grid(self) -> Tensor:
        """The features [..., C] to hand out."""
        assert self.state is not None
        assert self.entered is not None
        grid = self.state.unmerged()
        return grid if self.among is None else self.among.put(self.entered, grid)


def goes_on(host: nn.Module, i: int, x: Tensor) -> bool:
    """Whether x is what block `i - 1` of a reduced `host` handed out, so that it need not be asked again."""
    reached = getattr(x, "ltmp_reached", None)
    return isinstance(reached, Reached) and reached.block == i > 0 and reached.body.host is host and not is_dense()


def run_block(body: Body, i: int, x: Tensor, named: Mapping[str, Any], own: Callable[[], Any]) -> Any:
    """Block `i`: [B, N, C], or rows that `Recipe.images` knows, as the block before gave them, to the same.

    Args:
        named: what else the host calls this block with.
        own: calls the host's own block with all that; so it is as long as nothing was removed and nothing will be.

    Returns:
        What `own` would: the features, or a pair where the recipe says so.

    Raises:
        LTMPError: `x` is not what the block before handed out.
    """
    reached = getattr(x, "ltmp_reached", None)
    if i == 0 and not (recomputing() and isinstance(reached, Reached) and reached.block == 0):
        brought = running_engine()
        active = brought.active if isinstance(brought, Stepping) else None
        active = body.active() if active is None else active
        # here patches are read whatever the head reads
        reached = Reached(0, body, body.read_whole(active) if active[-1][1] and not body.grid else active)
        if torch.is_grad_enabled() and body.grad_checkpointing:
            # found again when the host recomputes this block, whatever this thread runs by then
            x.ltmp_reached = reached  # type: ignore[attr-defined]
    if not isinstance(reached, Reached) or reached.block != i or reached.body.host is not body.host:
        raise LTMPError(
            f"block {i} of a reduced model goes on from what block {i - 1} handed out, and was given something else: "
            "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
        )
    if not any(map(any, reached.active[: i + 1])):
        found = own()
        grid = found[0] if body.recipe.wraps else found
        # a block may hand back what it was given
        grid = grid if grid is not x else grid.view_as(grid)
        reached = replace(reached, block=i + 1)
        if i + 1 == body.depth:
            note_whole(reached.body, x, named)
    else:
        reached = _reduce(_started(reached, x, named) if reached.state is None else reached, named)
        # behind the last block somebody reads them
        grid = defer(reached.grid, x) if i + 1 < body.depth and reached.waits else reached.grid()
        _note(reached, x)
    places = PLACES.get()
    if places is not None:
        places.append(_places(reached, x))
    grid.ltmp_reached = reached
    return (grid, None) if body.recipe.wraps else grid


def _started(reached: Reached, x: Tensor, named: Mapping[str, Any]) -> Reached:
    """At the first block that may remove something."""
    i, body = reached.block, reached.body
    among = body.recipe.images(body.host, x, named)
    positions = positions_of(body.recipe, body.host, x.shape[-2], (), named)
    entering = x if among is None else among.take(x)
    state = select.start(body, entering, reached.active, positions, i, among)
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    # under autocast features change their type on the way
    waits = not (followed or torch.is_autocast_enabled(x.device.type))
    return replace(reached, state=state, entered=x, among=among, positioned=positions is not None, waits=waits)


def _reduce(reached: Reached, named: Mapping[str, Any]) -> Reached:
    i, body, state = reached.block, reached.body, reached.state
    assert state is not None
    return replace(reached, block=i + 1, state=state.step(i, body.recipe.bias(body.host, i, named)))


def _places(reached: Reached, x: Tensor) -> Tensor:
    """bool [...], which of the features x [..., C] are in the place of a token that is left."""
    if reached.state is None:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    tokens, among = reached.state.tokens, reached.among
    image, slot = tokens.live.nonzero(as_tuple=True)
    row = tokens.origin[image, slot]
    if among is None:
        row = image * x.shape[1] + row
    elif not reached.positioned:
        row = among.index[image, row]
    found = torch.zeros(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
    return found.index_fill(0, row, True).view(x.shape[:-1])


def _note(reached: Reached, x: Tensor) -> None:
    """Tell of a call that has passed its last block."""
    body, state = reached.body, reached.state
    assert state is not None
    if reached.block == body.depth:
        body.note(x, state.reduced(), reached.among)


def note_whole(body: Body, x: Tensor, named: Mapping[str, Any]) -> None:
    """Tell `record()` and `trace()` of a call with these features that removes nothing."""
    if recording() is not None or tracing() is not None:
        among = body.recipe.images(body.host, x, named)
        body.note(x, Reduced.whole(x if among is None else among.take(x), body.depth, among), among)
