"""Context managers for calls of reduced models: records, traces, and the dense and unmerged modes."""

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
        kept: for each call, tokens after each block [B, L].
        geometry: for each call, the geometry of the model; FLOPs shares follow from it and `kept`.
        texts: for each call of a model whose language model receives fewer tokens, tokens that enter it for each text,
            [B].
    """

    kept: list[Tensor] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)

    def add(self, kept: Tensor, geometry: Geometry) -> None:
        self.kept.append(kept)
        self.geometry.append(geometry)

    def share(self) -> Tensor:
        """Return the FLOPs share of every image of every call, [images].

        Raises:
            LTMPError: there was no call.
        """
        if not self.kept:
            raise LTMPError("nothing was recorded: call an attached model inside `with ltmp.record() as calls:`")
        return torch.cat([flops_share(k, g) for k, g in zip(self.kept, self.geometry, strict=True)])


_RECORD: ContextVar[Record | None] = ContextVar("ltmp_record", default=None)
_DENSE: ContextVar[bool] = ContextVar("ltmp_dense", default=False)


def record() -> AbstractContextManager[Record]:
    """Collect token counts of the reduced models called inside the context, in this thread only.

    >>> with ltmp.record() as calls:
    ...     logits = model(images)
    >>> calls.share().mean()
    """
    return set_in_context(_RECORD, Record())


def dense() -> AbstractContextManager[bool]:
    """Run attached models as if nothing were attached, in this thread only, e.g. as the baseline of a comparison."""
    return set_in_context(_DENSE, True)


def recording() -> Record | None:
    """Return the active record of this thread, or None."""
    return _RECORD.get()


def is_dense() -> bool:
    """Whether this thread is inside `dense()`."""
    return _DENSE.get()


T = TypeVar("T")


@contextmanager
def set_in_context(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """Set a context variable inside the context, and restore it afterwards."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


@dataclass
class Trace:
    """Where the patches of the calls made inside `trace()` ended.

    Attributes:
        sources: for each call, int32 [B, N]: for each token that entered the first block, the row of the output of
            `forward_features` that it is part of, or -1 - l if block l pruned it. Prefix tokens come first.
        blocks: for each call, int32 [B, L, N]: the same after each block. Patches that are part of one token share a
            number, which identifies that token within its block only. Empty unless `every_block`.
        every_block: whether to fill `blocks`.
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
    """Trace the patches of the reduced models called inside the context, in this thread only: 4 bytes per patch.

    >>> with ltmp.trace() as calls:
    ...     features = model.forward_features(images)
    >>> calls.sources[0]  # int32 [B, N]: which row of `features` each patch is part of

    Args:
        every_block: also trace them after each block: 4 bytes per patch and block.
    """
    return set_in_context(_TRACE, Trace(every_block=every_block))


def tracing() -> Trace | None:
    """Return the active trace of this thread, or None."""
    return _TRACE.get()


def unmerge() -> AbstractContextManager[bool]:
    """Make reduced models called inside the context return features for every patch, in its place.

    A patch gets the features of the token that it was merged into; a pruned patch keeps the features that it had after
    the attention of the block that pruned it. Tokens are still removed, so the cost is that of the reduced model plus a
    copy. Use it for segmentation, feature maps and anything else that needs the grid. Methods that return features
    between blocks (`forward_intermediates`, `get_intermediate_layers`) always unmerge. Applies to this thread only.

    >>> with ltmp.unmerge():
    ...     features = model.forward_features(images)  # [B, N, C], as if nothing were attached

    There is one difference to an ordinary call: a last block with a prune threshold of 1 or more drops every patch,
    because a class-token head reads none of them. Under `unmerge` patches are read, so that block prunes nothing.
    """
    return set_in_context(_UNMERGE, True)


def unmerging() -> bool:
    """Whether this thread is inside `unmerge()`."""
    return _UNMERGE.get()


def recomputing() -> bool:
    """Whether a backward pass is recomputing this call, for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1
