"""What a caller above the host asks of the engine below it, and learns from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..calls import held
from .capacity import Capacity

if TYPE_CHECKING:
    from ..hosts.stack import ReducedStack
    from .positions import Positions
    from .state import Reduced

Active = tuple[tuple[bool, bool], ...]
"""For each block whether its merge and its prune threshold can select anything."""

Run = Callable[["ReducedStack", Tensor, Active, "Positions | None"], "Reduced"]
"""An engine: all blocks on [B, N, C]."""


@dataclass
class Request:
    """One call's terms.

    Attributes:
        active: which thresholds count as on, where the caller has read them already.
        capacity: sizes to run at without reading anything back; None for exact sizes.
        stats: filled by the engine, int32 [L, 3] on the device: tokens of the batch and of its longest image after each
            block that reduces, zero after the others.
        run: the engine itself, where the caller brings one; None is the one of the model's settings.
        always: take the engine where no threshold is on, too, instead of the host's own blocks.
    """

    active: Active | None = None
    capacity: Capacity | None = None
    stats: Tensor | None = None
    run: Run | None = None
    always: bool = False


REQUEST: ContextVar[Request | None] = ContextVar("ltmp_request", default=None)


def requested(request: Request) -> AbstractContextManager[Request]:
    """Run the engine on these terms inside, in this thread only."""
    return held(REQUEST, request)
