"""Stand-ins for the forward of an attached host's blocks, and for the host's method that runs them all.

The host keeps its container and its blocks. Where nothing is to be removed, a block's forward is its own. Where
something is and the host runs all of its blocks, the first one runs the engine, and the others pass on what it handed
out. A block of a reduced model that is called by itself has every patch in its place, before and after.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import held, recomputing
from ..engines import select
from ..engines.blockwise import goes_on, note_whole, run_block
from ..engines.body import Body, Engine, running, running_body, running_engine
from ..engines.positions import positions_of
from ..errors import LTMPError
from .blocks import Blocks, refuse_replica, refuse_tracers
from .sizes import with_sizes


@dataclass(frozen=True, eq=False)
class HostPass:
    """A call of all blocks, as each of them sees it.

    Attributes:
        body: what runs.
        reduced: whether the first block runs them all; otherwise each is the host's own.
        differentiable: whether the caller wants gradients.
    """

    body: Body
    reduced: bool
    differentiable: bool


_PASS: ContextVar[HostPass | None] = ContextVar("ltmp_pass", default=None)


@dataclass(frozen=True, eq=False)
class Entered:
    """The pass that made these features, for a backward pass that runs it again."""

    body: Body
    engine: Engine | None


class StandIn:
    """Stands in for a method of a module in a host.

    Args:
        blocks: of the host.
        module: whose method it is.
        method: its name.
    """

    def __init__(self, blocks: Blocks, module: nn.Module, method: str) -> None:
        self.blocks, self.module, self.method = blocks, module, method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(getattr(type(self.module), self.method), self.module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Part of a copy of the host; a copy of the module alone has its own method again."""
        if id(self.module) in memo and id(self.blocks.body.host) not in memo:
            module = memo[id(self.module)]
            return MethodType(getattr(type(module), self.method), module)
        made = memo[id(self)] = copy.copy(self)
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


class LoopForward(StandIn):
    """Stands in for the method of a host that runs all of its blocks."""

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's own method."""
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = running_body(self.blocks.body)
        refuse_replica(body, args)
        reduced = body.reduces()
        if reduced:
            refuse_tracers((*args, *kwargs.values()))
            self.blocks.check(whole=not body.grid)
        if body.grid if reduced else torch.compiler.is_exporting():
            # block by block
            return self._own(args, kwargs)
        with held(_PASS, HostPass(body, reduced, torch.is_grad_enabled())):
            return self._own(args, kwargs)


class BlockForward(StandIn):
    """Stands in for the forward of the `i`-th block."""

    def __init__(self, blocks: Blocks, i: int) -> None:
        super().__init__(blocks, blocks.body.blocks[i], "forward")
        self.i = i

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = _PASS.get()
        if here is not None and here.body.host is self.blocks.body.host:
            return self._one_of_all(here, args, kwargs)
        x, others, named = _features(args, kwargs)
        entered = getattr(x, "ltmp_entered", None)
        if self.i == 0 and isinstance(entered, Entered) and recomputing():
            with running(entered.engine, body=entered.body):
                return run_all(entered.body, x, others, named)
        body = running_body(self.blocks.body)
        if self.i < body.depth and (goes_on(body.host, self.i, x) or body.reduces()):
            if self.i == 0:
                self.blocks.check(whole=False)
            own = partial(self._own, body, x, others, named)
            found = run_block(body, self.i, x, self._by_name(others, named), own)
            with_sizes(found[0] if isinstance(found, tuple) else found, None)
            return found
        if self.i == body.depth - 1:
            note_whole(body, x, self._by_name(others, named))
        return self._own(body, x, others, named)

    def _by_name(self, others: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """All that the host gives this block beside the features, by the names that the block has for it."""
        if not others:
            return named
        return {**dict(zip(_names(type(self.blocks.body.blocks[self.i]).forward)[1:], others, strict=False)), **named}

    def _one_of_all(self, here: HostPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """This block in a pass through all of them."""
        body = here.body
        x, others, named = _features(args, kwargs)
        if not here.reduced:
            if self.i == body.first:
                note_whole(body, x, self._by_name(others, named))
            return self._own(body, x, others, named)
        if self.i:
            if not hasattr(x, "ltmp_size"):
                raise LTMPError(
                    "the host did something to its features between two blocks, which a reduced model cannot follow: "
                    "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
                )
            return x
        if body.grad_checkpointing and here.differentiable:
            if not torch.is_grad_enabled():
                raise LTMPError(
                    "a reduced model cannot be checkpointed by torch's reentrant way: ask for gradient checkpointing "
                    "with use_reentrant=False"
                )
            x.ltmp_entered = Entered(body, running_engine())
        return run_all(body, x, others, named)

    def _own(self, body: Body, x: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The host's own block, as if nothing were attached."""
        if self.i >= body.depth:
            return x
        rotary, block = body.recipe.rotary, body.blocks[self.i]
        if rotary is not None:
            named = named | {name: rotary.own(named[name], self.i) for name in rotary.names if name in named}
        return type(block).forward(block, x, *others, **named)


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Of the arguments of a block's forward, the block left out."""
    return tuple(inspect.signature(forward).parameters)[1:]


_FEATURES = ("x", "hidden_states", "input")
"""Names of a block's first argument, where it is called by keyword."""


def _features(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A block's arguments: its features, and the others."""
    if args:
        return args[0], args[1:], kwargs
    name = next((name for name in _FEATURES if name in kwargs), None)
    if name is None:
        raise TypeError(f"a block was called without its features: expected one of {', '.join(_FEATURES)}")
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def run_all(body: Body, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run all blocks.

    Args:
        x: [B, N, C] embedded tokens, prefix tokens first.
        args, kwargs: what the host gives its blocks besides: positions that the recipe knows, or nothing.

    Returns:
        [B, N', C]; `sizes_of` tells the pooling how many patches each row stands for.

    Raises:
        NotImplementedError: the host asks its blocks for what a reduced model cannot do.
    """
    positions = positions_of(body.recipe, body.host, x.shape[1], args, kwargs)
    reduced = select.run(body, x, positions)
    body.note(x, reduced)
    return with_sizes(reduced.x, reduced.size)
