"""Relative position bias, which attention adds to the score of each pair of positions; shared by recipes."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..method.recipe import Bias


def pairs(table: Tensor) -> Bias:
    """Return the bias of the tokens left, looked up in `table` [..., H, N, N] by the positions where they entered.

    A merged token keeps its receiver's position. The table gets no gradient.
    """
    return partial(_gather, table.detach().reshape(table.shape[-3:]))


def _gather(table: Tensor, origin: Tensor) -> Tensor:
    return table[:, origin[:, :, None], origin[:, None]].transpose(0, 1)
