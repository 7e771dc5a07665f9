"""What a caller above the host asks of the engine below it, and learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..context import held

if TYPE_CHECKING:
    from ..stack import ReducedStack
    from .positions import Positions
    from .state import Reduced

Active = tuple[tuple[bool, bool], ...]
"""For each block whether its merge and its prune threshold can select anything."""

Run = Callable[["ReducedStack", Tensor, Active, "Positions | None"], "Reduced"]
"""An engine: all blocks on [B, N, C]."""


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes of a batch after each block, so that nothing needs to be read back while it runs.

    Attributes:
        rows: tokens of the whole batch.
        longest: tokens of its longest image.
    """

    rows: tuple[int, ...]
    longest: tuple[int, ...]

    def holds(self, stats: Sequence[Sequence[int]]) -> bool:
        """Whether a batch with these `stats` (tokens, longest image, ...) after each block fitted."""
        return all(
            total <= rows and most <= longest
            for (total, most, *_), rows, longest in zip(stats, self.rows, self.longest, strict=True)
        )


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
