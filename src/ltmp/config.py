"""Settings of one attachment: a frozen, checked value that travels with the model and with the thresholds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

VARIANTS: dict[str, tuple[str, ...]] = {
    "ltmp": ("merge", "prune"),
    "ltpm": ("prune", "merge"),
    "ltm": ("merge",),
    "ltp": ("prune",),
}
"""The order in which each variant reduces the tokens of a block (paper, section 3)."""

ENGINES = ("auto", "packed", "triton", "graph")


@dataclass(frozen=True)
class LTMPConfig:
    """How a model is reduced.

    Args:
        variant: `ltmp` (merge then prune), `ltpm` (prune then merge), `ltm` (merge only) or `ltp` (prune only).
        tau: temperature of the merge decision's gradient, in units of cosine similarity.
        prune_tau: temperature of the prune decision's gradient, in units of log importance.
        engine: what runs the deployed model. `auto` picks; a named engine works or raises.

    Raises:
        ValueError: a setting is out of range or unknown; the message lists what is known.
    """

    variant: str = "ltmp"
    tau: float = 0.1
    prune_tau: float = 0.5
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: expected one of {', '.join(VARIANTS)}")
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}: expected one of {', '.join(ENGINES)}")
        for name in ("tau", "prune_tau"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")

    @property
    def steps(self) -> tuple[str, ...]:
        """The reduction steps of a block, in order."""
        return VARIANTS[self.variant]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LTMPConfig:
        """The config in `values`; names that this version does not know are an error."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}: written by a newer version of ltmp?")
        return cls(**values)
