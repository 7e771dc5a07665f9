"""What calls of reduced models are told beside their arguments, and what is told of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .context import held
from .flops import Geometry, flops_share


@dataclass
class Record:
    """Statistics of the calls made inside `record()`.

    Attributes:
        kept: one [B, L] tensor a call, tokens after each block.
        geometry: one a call; shares follow from both.
    """

    kept: list[Tensor] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)

    def add(self, kept: Tensor, geometry: Geometry) -> None:
        self.kept.append(kept)
        self.geometry.append(geometry)

    def share(self) -> Tensor:
        """[images], FLOPs share of every image of every call."""
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
