"""Sizes of tokens on their way from the blocks to the pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import LTMPError


def with_sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """`x` with its sizes attached: pooling happens in the host's own code, and they must reach it call by call.

    None says that every row is one patch.
    """
    x.ltmp_size = size  # type: ignore[attr-defined]
    return x


def sizes_of(x: Tensor) -> Tensor | None:
    """The sizes that `with_sizes` attached.

    Raises:
        LTMPError: none were, so that nobody knows which rows are there: `x` was cut or copied on its way.
    """
    if not hasattr(x, "ltmp_size"):
        raise LTMPError(
            "the sizes of these tokens got lost between the blocks and the pooling: give forward_head what "
            "forward_features returned, unchanged, or call ltmp.detach(model)"
        )
    return x.ltmp_size


def carry_sizes(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the norm between blocks and pooling: sizes go on with the tokens."""
    if hasattr(inputs[0], "ltmp_size"):
        with_sizes(output, inputs[0].ltmp_size)
