"""Replacements for the `forward` of an attached host's blocks, and for the host's method that runs all of them.

The host keeps its container and its blocks. If nothing is to be removed, every block runs its own forward. Otherwise,
when the host runs all of its blocks, the first one runs the engine for all, and the others return their input. A block
of a reduced model that is called by itself takes and returns features with every patch in its place.
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

from ..calls import recomputing, set_in_context
from ..engines import select
from ..engines.blockwise import continues_call, record_dense, run_block
from ..engines.body import Body, Engine, running, running_body, running_engine
from ..engines.positions import positions_of
from ..errors import LTMPError
from .blocks import Blocks, refuse_replica, refuse_tracers
from .sizes import with_sizes


@dataclass(frozen=True, eq=False)
class HostPass:
    """One run of the host through all of its blocks, as each block sees it.

    Attributes:
        body: what runs.
        reduced: whether the first block runs the engine for all; otherwise each block runs its own forward.
        differentiable: whether gradients were enabled when the host was called.
    """

    body: Body
    reduced: bool
    differentiable: bool


_PASS: ContextVar[HostPass | None] = ContextVar("ltmp_pass", default=None)


@dataclass(frozen=True, eq=False)
class CheckpointedPass:
    """The body and engine of a pass, kept on its input features for gradient checkpointing, which runs it again."""

    body: Body
    engine: Engine | None


class MethodReplacement:
    """Base of replacements for a method of a module in a host.

    Args:
        blocks: the blocks of the host.
        module: the module whose method is replaced.
        method: name of the method.
    """

    def __init__(self, blocks: Blocks, module: nn.Module, method: str) -> None:
        self.blocks, self.module, self.method = blocks, module, method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(getattr(type(self.module), self.method), self.module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy with the host; a copy of the module without its host gets its original method back."""
        if id(self.module) in memo and id(self.blocks.body.host) not in memo:
            module = memo[id(self.module)]
            return MethodType(getattr(type(module), self.method), module)
        clone = memo[id(self)] = copy.copy(self)
        vars(clone).update(copy.deepcopy(vars(self), memo))
        return clone


class LoopForward(MethodReplacement):
    """Replaces the method of a host that runs all of its blocks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = running_body(self.blocks.body)
        refuse_replica(body, args)
        reduced = body.reduces()
        if reduced:
            refuse_tracers((*args, *kwargs.values()))
            self.blocks.check(at_once=not body.grid)
        if body.grid if reduced else torch.compiler.is_exporting():
            # without a pass, blocks run one by one
            return self._original(args, kwargs)
        with set_in_context(_PASS, HostPass(body, reduced, torch.is_grad_enabled())):
            return self._original(args, kwargs)

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


class BlockForward(MethodReplacement):
    """Replaces the forward of the `i`-th block."""

    def __init__(self, blocks: Blocks, i: int) -> None:
        super().__init__(blocks, blocks.body.blocks[i], "forward")
        self.i = i

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        host_pass = _PASS.get()
        if host_pass is not None and host_pass.body.host is self.blocks.body.host:
            return self._in_pass(host_pass, args, kwargs)
        x, others, named = _split_features(args, kwargs)
        entered = getattr(x, "ltmp_entered", None)
        if self.i == 0 and isinstance(entered, CheckpointedPass) and recomputing():
            with running(entered.engine, body=entered.body):
                return run_all(entered.body, x, others, named)
        body = running_body(self.blocks.body)
        if self.i < body.depth and (continues_call(body.host, self.i, x) or body.reduces()):
            if self.i == 0:
                self.blocks.check(at_once=False)
            original = partial(self._original, body, x, others, named)
            output = run_block(body, self.i, x, self._by_name(others, named), original)
            with_sizes(output[0] if isinstance(output, tuple) else output, None)
            return output
        if self.i == body.depth - 1:
            record_dense(body, x, self._by_name(others, named))
        return self._original(body, x, others, named)

    def _in_pass(self, host_pass: HostPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run as part of a pass through all blocks."""
        body = host_pass.body
        x, others, named = _split_features(args, kwargs)
        if not host_pass.reduced:
            if self.i == body.first:
                record_dense(body, x, self._by_name(others, named))
            return self._original(body, x, others, named)
        if self.i:
            if not hasattr(x, "ltmp_size"):
                raise LTMPError(
                    "the host changed its features between two blocks, which a reduced model cannot follow: call it "
                    "inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
                )
            return x
        if body.grad_checkpointing and host_pass.differentiable:
            if not torch.is_grad_enabled():
                raise LTMPError(
                    "a reduced model does not support torch's reentrant gradient checkpointing: request it with "
                    "use_reentrant=False"
                )
            x.ltmp_entered = CheckpointedPass(body, running_engine())
        return run_all(body, x, others, named)

    def _original(self, body: Body, x: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the block's own forward, as if nothing were attached."""
        if self.i >= body.depth:
            return x
        rotary, block = body.recipe.rotary, body.blocks[self.i]
        if rotary is not None:
            named = named | {name: rotary.own(named[name], self.i) for name in rotary.names if name in named}
        return type(block).forward(block, x, *others, **named)

    def _by_name(self, others: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """All arguments of this block except the features, by the names of its parameters."""
        if not others:
            return named
        names = _parameter_names(type(self.blocks.body.blocks[self.i]).forward)[1:]
        return {**dict(zip(names, others, strict=False)), **named}


@cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a block's forward, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


_FEATURES = ("x", "hidden_states", "input")
"""Names of a block's first parameter, for blocks that are called by keyword."""


def _split_features(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a block's arguments into its features, the other positional arguments, and the other keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = next((name for name in _FEATURES if name in kwargs), None)
    if name is None:
        raise TypeError(f"a block was called without its features: expected one of {', '.join(_FEATURES)}")
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def run_all(body: Body, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run all blocks reduced.

    Args:
        x: [B, N, C] embedded tokens, prefix tokens first.
        args, kwargs: what else the host passes to its blocks: positions that the recipe describes, or nothing.

    Returns:
        [B, N', C]; for the pooling, `sizes_of` returns how many patches each row stands for.

    Raises:
        NotImplementedError: the host passes its blocks an argument that a reduced model does not support.
    """
    positions = positions_of(body.recipe, body.host, x.shape[1], args, kwargs)
    reduced = select.run(body, x, positions)
    body.record_call(x, reduced)
    return with_sizes(reduced.x, reduced.size)
