"""Numbers that attention adds for each pair of places, as hosts of all libraries have them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..method.recipe import Bias


def pairs(table: Tensor) -> Bias:
    """The bias of tokens from `table` [..., H, N, N] by the places where they entered; a merged one has its receiver's.

    The table gets no gradient.
    """
    return partial(_gathered, table.detach().reshape(table.shape[-3:]))


def _gathered(table: Tensor, origin: Tensor) -> Tensor:
    return table[:, origin[:, :, None], origin[:, None]].transpose(0, 1)
