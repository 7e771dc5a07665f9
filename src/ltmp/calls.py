"""Context of a call of a reduced model: requests beside its arguments, and records of what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import LTMPError
from .method.flops import Geometry, flops_share


@dataclass
class Record:
    """Statistics of the calls made inside `record()`.

    Attributes:
        kept: one [B, L] tensor a call, tokens after each block.
        geometry: one a call; shares follow from both.
        texts: one [B] a call of a model whose language model receives fewer tokens, tokens of each text that enter it.
    """

    kept: list[Tensor] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, geometry: Geometry) -> None:
        self.kept.append(kept)
        self.geometry.append(geometry)

    def share(self) -> Tensor:
        """[images], FLOPs share of every image of every call.

        Raises:
            LTMPError: there was no call.
        """
        if not self.kept:
            raise LTMPError("nothing was recorded: call an attached model inside `with ltmp.record() as calls:`")
        return torch.cat([flops_share(k, g) for k, g in zip(self.kept, self.geometry, strict=True)])


_RECORD: ContextVar[Record | None] = ContextVar("ltmp_record", default=None)
_DENSE: ContextVar[bool] = ContextVar("ltmp_dense", default=False)


def record() -> AbstractContextManager[Record]:
    """Collect token counts of the reduced models called inside, in this thread only.

    >>> with ltmp.record() as calls:
    ...     logits = model(images)
    >>> calls.share().mean()
    """
    return held(_RECORD, Record())


def dense() -> AbstractContextManager[bool]:
    """Run attached models as if nothing were attached, inside and in this thread only: the baseline of a comparison."""
    return held(_DENSE, True)


def recording() -> Record | None:
    """The record that calls of this thread go to, if any."""
    return _RECORD.get()


def is_dense() -> bool:
    """Whether this thread is inside `dense()`."""
    return _DENSE.get()


T = TypeVar("T")


@contextmanager
def held(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """Give a variable a value inside, in this thread only."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


@dataclass
class Trace:
    """Where the patches of the calls made inside `trace()` ended.

    Attributes:
        sources: one int32 [B, N] a call: for each token that entered the first block, the row of `forward_features`'
            output that it is part of, or -1 - l where block l pruned it. Prefix tokens come first.
        blocks: one int32 [B, L, N] a call, the same after each block: what is part of one token has one number, which
            names that token in its block alone. Empty unless asked for.
        every_block: whether it was.
    """

    sources: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    every_block: bool = False

    def add(self, source: Tensor, trail: tuple[Tensor, ...]) -> None:
        self.sources.append(source)
        if self.every_block:
            self.blocks.append(torch.stack(trail, 1))


_TRACE: ContextVar[Trace | None] = ContextVar("ltmp_trace", default=None)


_UNMERGE: ContextVar[bool] = ContextVar("ltmp_unmerge", default=False)


def trace(*, every_block: bool = False) -> AbstractContextManager[Trace]:
    """Follow the patches of the reduced models called inside, in this thread only: 4 bytes a patch.

    >>> with ltmp.trace() as calls:
    ...     features = model.forward_features(images)
    >>> calls.sources[0]  # int32 [B, N]: which row of `features` each patch is part of

    Args:
        every_block: keep what was so after each block, too: 4 bytes a patch and block.
    """
    return held(_TRACE, Trace(every_block=every_block))


def tracing() -> Trace | None:
    """The trace that calls of this thread go to, if any."""
    return _TRACE.get()


def unmerge() -> AbstractContextManager[bool]:
    """Features of reduced models called inside cover every patch, at its own place, in this thread only.

    A patch gets the features of the token that it ended in, and one that was pruned keeps those that it had when it
    was: after the attention of that block. Tokens are removed all the same, so the cost is that of the reduced model
    and a copy. For segmentation, feature maps and whatever else needs the grid; what looks between a host's blocks
    (`forward_intermediates`, `get_intermediate_layers`) is unmerged without asking.

    >>> with ltmp.unmerge():
    ...     features = model.forward_features(images)  # [B, N, C], as if nothing were attached

    One thing differs from an ordinary call: a last block whose prune threshold is 1 or more drops every patch because a
    class-token head reads none of them; here they are read, and that block prunes nothing.
    """
    return held(_UNMERGE, True)


def unmerging() -> bool:
    """Whether this thread is inside `unmerge()`."""
    return _UNMERGE.get()


def recomputing() -> bool:
    """Whether a backward pass runs this again, for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
