"""Valid ranges of numbers, defined once for command-line options and for keyword arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from .errors import UsageError

MAX_BLOCKS = 1024
MAX_CLASSES = 1 << 20
MAX_PIXELS = 16_384
"""Longest side of an image."""


@dataclass(frozen=True)
class Range:
    """Finite numbers from `min` to `max`, greater than `above` and less than `below`; None means no limit."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Real) or not math.isfinite(number := float(value)):
            return False
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        text = " and ".join(f"{word} {_short(limit)}" for word, limit in limits.items() if limit is not None)
        return f"a number {text}" if text else "a finite number"

    def check(self, name: str, value: float) -> None:
        """Refuse a number outside the range.

        Raises:
            UsageError: gives the name, the value and the range.
        """
        if value not in self:
            raise UsageError(f"{name} is {_short(value)}: expected {self}")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


ANY = Range()
SHARE = Range(above=0, below=1)
"""Fraction of the dense model's FLOPs; see `BUDGET`."""
BUDGET = Range(above=0, max=1)
"""FLOPs share that a dial is set to: 1 turns reduction off."""
PART = Range(min=0, max=1)
RATE = Range(above=0, max=1)
"""Learning rate of weights."""
FACTOR = Range(above=0, max=1000)
"""Factor of a learning rate."""
TEMPERATURE = Range(above=0, max=100)
SECONDS = Range(min=0.01, max=86_400)

SEED = Range(min=0, max=2**32 - 1)
"""What NumPy accepts; torch generators, which accept more, are seeded with multiples of it."""
IMAGES = Range(min=1, max=10**9)
VIEWS = Range(min=0, max=10**9)
CALIBRATION = Range(min=2, max=10**6)
BATCH = Range(min=1, max=1 << 16)
KNOTS = Range(min=2, max=64)
RANK = Range(min=1, max=1024)
SPACING = Range(min=1, max=1024)
WORKERS = Range(min=0, max=256)
PIXELS = Range(min=1, max=MAX_PIXELS)
CLASSES = Range(min=0, max=MAX_CLASSES)
