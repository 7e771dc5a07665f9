"""A budget dial: a table of thresholds for a range of budgets, and interpolation between its rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

PREFIX = "dial."
"""Prefix of its tensors in files and state dicts."""

_ALMOST_ONE = 1 - 1e-6
_ALMOST_ZERO = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Dial:
    """Thresholds at K budgets, linearly interpolated between neighbours.

    Each block's steps are the same at all budgets: a merge step reorders the tokens even if it selects none, so that
    turning it on or off would make the output jump, and a recorded CUDA graph is for one set of steps. `keep_on` makes
    a table so.

    Args:
        share: [K] FLOPs shares in (0, 1), ascending; K is 2 or more.
        merge, prune: [K, L].
        kept: [K, L], mean tokens after each block.

    All tensors are copied to float32 on the CPU.

    Raises:
        ValueError: shapes that do not fit, shares that do not ascend, numbers that are not finite, or a step that is on
            at some budgets only.
    """

    share: Tensor
    merge: Tensor
    prune: Tensor
    kept: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            values = torch.as_tensor(getattr(self, field.name)).detach().to("cpu", torch.float32, copy=True)
            object.__setattr__(self, field.name, values.contiguous())
        self._check()
        # float64, rounded once at the end: a knot's own values come back to the bit
        rows = torch.cat([self.merge, self.prune, self.kept], 1).double().numpy()
        object.__setattr__(self, "_knots", self.share.double().tolist())
        object.__setattr__(self, "_rows", rows)

    def _check(self) -> None:
        knots = self.share.numel()
        if self.share.ndim != 1 or knots < 2:
            raise ValueError(f"a dial needs two budgets or more in one row, got shape {tuple(self.share.shape)}")
        if self.merge.ndim != 2 or self.merge.shape[1] == 0:
            raise ValueError(f"a dial's merge must be [budgets, blocks], got shape {tuple(self.merge.shape)}")
        for field in fields(self):
            values, shape = getattr(self, field.name), tuple(self.merge.shape)
            if field.name != "share" and tuple(values.shape) != (knots, shape[1]):
                raise ValueError(
                    f"a dial's {field.name} has shape {tuple(values.shape)}, expected one row for each of its {knots} "
                    f"budgets and one number for each of its {shape[1]} blocks"
                )
            if not values.isfinite().all():
                raise ValueError(f"a dial's {field.name} holds NaN or infinity: the run that made it is broken")
        if not (self.share.diff() > 0).all() or self.share[0] <= 0 or self.share[-1] >= 1:
            raise ValueError(f"a dial's shares must rise between 0 and 1, got {_listed(self.share)}")
        if not (self.kept > 0).all():
            raise ValueError("a dial's kept tokens must be positive: they are what each block has left on average")
        for name, on in (("merge", self.merge < 1), ("prune", self.prune > 0)):
            mixed = (on.any(0) & ~on.all(0)).nonzero()
            if len(mixed):
                raise ValueError(
                    f"a dial's {name} step of block {int(mixed[0])} is on at some budgets and off at others: give "
                    "ltmp.method.dial.keep_on(merge, prune), which keeps it on"
                )

    @property
    def depth(self) -> int:
        """Number of blocks, L."""
        return self.merge.shape[1]

    @property
    def lowest(self) -> float:
        """The smallest share of its range."""
        return _shortest(self.share[0])

    @property
    def highest(self) -> float:
        """The largest share of its range; 1 (all off) is possible, too."""
        return _shortest(self.share[-1])

    def nearest(self, share: float) -> float:
        """`share` clamped to the range of the dial."""
        return min(max(share, self.lowest), self.highest)

    def at(self, share: float) -> tuple[Tensor, Tensor]:
        """Merge and prune thresholds, float32 [L] each on the CPU, for a FLOPs share; 1 is all off.

        Raises:
            UsageError: the share is neither 1 nor between the dial's ends.
        """
        if share == 1:
            return torch.ones(self.depth, device="cpu"), torch.zeros(self.depth, device="cpu")
        row = self._between(share)
        return row[: self.depth], row[self.depth : 2 * self.depth]

    def kept_at(self, share: float) -> Tensor:
        """float32 [L], mean tokens after each block at a share between the dial's ends.

        Raises:
            UsageError: another share. At 1 all tokens are kept, but a dial does not know how many that is.
        """
        return self._between(share)[2 * self.depth :]

    def _between(self, share: float) -> Tensor:
        """float32 [3 L], the row at `share`. Plain numbers, because servers call this between batches."""
        knots: list[float] = vars(self)["_knots"]
        rows: np.ndarray[Any, np.dtype[np.float64]] = vars(self)["_rows"]
        # rounded like the knots, so that 0.3 is the knot at 0.3
        at = float(np.float32(float(share)))
        if not knots[0] <= at <= knots[-1]:
            raise UsageError(
                f"budget {share:g}: this dial goes from {self.lowest:g} to {self.highest:g}, and 1 turns reduction off"
            )
        low = min(bisect_right(knots, at), len(knots) - 1) - 1
        part = (at - knots[low]) / (knots[low + 1] - knots[low])
        return torch.from_numpy((rows[low] + part * (rows[low + 1] - rows[low])).astype(np.float32))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, named as in a file."""
        return {f"{PREFIX}{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def find(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Dial | None:
        """The dial among named tensors, or None where there is none.

        Raises:
            ValueError: a part of it is missing, or it is broken.
        """
        names = {field.name: f"{prefix}{PREFIX}{field.name}" for field in fields(cls)}
        missing = [name for name in names.values() if name not in tensors]
        if len(missing) == len(names):
            return None
        if missing:
            raise ValueError(f"a dial without {', '.join(missing)}")
        return cls(**{field: tensors[name] for field, name in names.items()})


def keep_on(merge: Tensor, prune: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds [K, L] with every step that is on at one budget turned on at all of them, as `Dial` requires.

    A threshold that was off moves just inside its range and selects next to nothing. A merge step that is on still puts
    even tokens first, so measure a row's share and accuracy after this.
    """
    merges, prunes = (merge < 1).any(0), (prune > 0).any(0)
    return (
        torch.where(merges, merge.clamp(max=_ALMOST_ONE), merge),
        torch.where(prunes, prune.clamp(min=_ALMOST_ZERO), prune),
    )


def _shortest(value: Tensor) -> float:
    """The shortest decimal that rounds to `value` in float32: 0.3, not 0.30000001192092896."""
    return float(str(np.float32(value.item())))


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())
