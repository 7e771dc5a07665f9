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
"""Prefix of a dial's tensors in files and state dicts."""

_ALMOST_ONE = 1 - 1e-6
_ALMOST_ZERO = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Dial:
    """Thresholds at K budgets, linearly interpolated in between.

    The steps of each block must be the same at all budgets. A merge step reorders the tokens even if it selects none,
    so turning it on or off would make the output jump; and a recorded CUDA graph is for one set of steps. `keep_on`
    makes thresholds meet this.

    Args:
        share: [K] FLOPs shares in (0, 1), ascending; K is at least 2.
        merge, prune: [K, L].
        kept: [K, L], mean tokens after each block.

    All tensors are copied to float32 on the CPU.

    Raises:
        ValueError: shapes do not match, shares do not ascend, a number is not finite, or a step is on at some budgets
            only.
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
        # float64, rounded once at the end: at a knot, its own values come back bit for bit
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
            values = getattr(self, field.name)
            if field.name != "share" and tuple(values.shape) != (knots, self.depth):
                raise ValueError(
                    f"a dial's {field.name} has shape {tuple(values.shape)}, expected one row for each of its {knots} "
                    f"budgets and one number for each of its {self.depth} blocks"
                )
            if not values.isfinite().all():
                raise ValueError(f"a dial's {field.name} holds NaN or infinity: the run that made it is broken")
        if not (self.share.diff() > 0).all() or self.share[0] <= 0 or self.share[-1] >= 1:
            shares = ", ".join(f"{share:g}" for share in self.share.tolist())
            raise ValueError(f"a dial's shares must rise between 0 and 1, got {shares}")
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
        """The smallest FLOPs share of the dial's range."""
        return _shortest(self.share[0])

    @property
    def highest(self) -> float:
        """The largest FLOPs share of the dial's range; beyond it, only 1 (reduction off) is possible."""
        return _shortest(self.share[-1])

    def nearest(self, share: float) -> float:
        """Clamp `share` to the range of the dial."""
        return min(max(share, self.lowest), self.highest)

    def at(self, share: float) -> tuple[Tensor, Tensor]:
        """Return the merge and prune thresholds, float32 [L] each on the CPU, for a FLOPs share; 1 turns all off.

        Raises:
            UsageError: the share is neither 1 nor within the range of the dial.
        """
        if share == 1:
            return torch.ones(self.depth, device="cpu"), torch.zeros(self.depth, device="cpu")
        row = self._between(share)
        return row[: self.depth], row[self.depth : 2 * self.depth]

    def kept_at(self, share: float) -> Tensor:
        """Return the mean tokens after each block, float32 [L], for a FLOPs share.

        Raises:
            UsageError: the share is outside the range of the dial, or 1: all tokens are kept then, but a dial does not
                record how many there are.
        """
        return self._between(share)[2 * self.depth :]

    def _between(self, share: float) -> Tensor:
        """The interpolated row at `share`, float32 [3 L]. Fast, without tensors: servers call this between batches."""
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
        """Return the tensors by their names in a file."""
        return {f"{PREFIX}{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def find(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Dial | None:
        """Return the dial among named tensors, or None if there is none.

        Raises:
            ValueError: some of its tensors are missing or invalid.
        """
        names = {field.name: f"{prefix}{PREFIX}{field.name}" for field in fields(cls)}
        missing = [name for name in names.values() if name not in tensors]
        if len(missing) == len(names):
            return None
        if missing:
            raise ValueError(f"a dial without {', '.join(missing)}")
        return cls(**{field: tensors[name] for field, name in names.items()})


def keep_on(merge: Tensor, prune: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each step of thresholds [K, L] that is on at some budget on at all of them, as `Dial` requires.

    A threshold that was off moves just inside its range, where it selects next to nothing. A merge step that is on
    still puts even tokens first, so measure shares and accuracy after this.
    """
    merges, prunes = (merge < 1).any(0), (prune > 0).any(0)
    return (
        torch.where(merges, merge.clamp(max=_ALMOST_ONE), merge),
        torch.where(prunes, prune.clamp(min=_ALMOST_ZERO), prune),
    )


def _shortest(value: Tensor) -> float:
    """Return the shortest decimal that rounds to `value` in float32: 0.3, not 0.30000001192092896."""
    return float(str(np.float32(value.item())))
