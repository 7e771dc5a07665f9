"""Sizes of tokens on their way from the blocks to the pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ..calls import unmerging
from ..engines.body import Body, running_body
from ..errors import LTMPError


def with_sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """`x` with its sizes attached: pooling happens in the host's own code, and they must reach it call by call.

    None says that every row is one patch.
    """
    x.ltmp_size = size  # type: ignore[attr-defined]
    return x


def sizes_of(x: Tensor, body: Body | None = None) -> Tensor | None:
    """The sizes that `with_sizes` attached; None where every row is one patch.

    Args:
        body: whose features they are; of one that removes nothing they need no sizes.

    Raises:
        LTMPError: none were, so that nobody knows which rows are there: `x` was cut or copied on its way.
    """
    if _has_sizes(x):
        return x.ltmp_size  # type: ignore[attr-defined]
    if unmerging() or (body is not None and (running_body(body).grid or not running_body(body).reduces())):
        return None
    raise LTMPError(
        "the sizes of these tokens got lost between the blocks and the pooling: attach after the norm between them is "
        "replaced, and give forward_head what forward_features returned, unchanged; or call ltmp.detach(model)"
    )


def carry_sizes(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the norm between blocks and pooling: sizes go on with the tokens."""
    if _has_sizes(inputs[0]):
        with_sizes(output, inputs[0].ltmp_size)


def _has_sizes(x: Any) -> bool:
    """Not what torch.fx traces with, which has any attribute and would write the question down."""
    return hasattr(x, "ltmp_size") and not isinstance(x, fx.Proxy)
