"""How the sizes of merged tokens travel from the blocks to the pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ..calls import unmerging
from ..engines.body import Body, running_body
from ..errors import LTMPError


def with_sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """Return `x` with its sizes as an attribute; None if every row is one patch.

    Pooling happens in the host's own code, so the sizes have to travel with the tokens.
    """
    x.ltmp_size = size  # type: ignore[attr-defined]
    return x


def sizes_of(x: Tensor, body: Body | None = None) -> Tensor | None:
    """Return the sizes that `with_sizes` set; None if every row is one patch.

    Args:
        body: the body that computed `x`; if it removes no tokens or returns a grid, `x` needs no sizes.

    Raises:
        LTMPError: `x` has no sizes, so it is unknown which rows are tokens: `x` was sliced or copied on its way.
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
    """Forward hook of the norm between the blocks and the pooling: pass the sizes on with the tokens."""
    if _has_sizes(inputs[0]):
        with_sizes(output, inputs[0].ltmp_size)


def _has_sizes(x: Any) -> bool:
    # a torch.fx proxy has every attribute, and records the look-up
    return hasattr(x, "ltmp_size") and not isinstance(x, fx.Proxy)
