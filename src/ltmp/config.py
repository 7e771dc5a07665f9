"""Settings of one attachment: a frozen, checked value that travels with the model and with the thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

Rate = int | float
"""Tokens that a step removes from an image in a block: how many (int), or which part of the free ones (float)."""


@dataclass(frozen=True)
class Method:
    """What a variant does to the tokens of a block.

    Attributes:
        steps: "merge", "prune" or "fuse" (prune, and fold what is dropped into one token), in order.
        fixed: whether a fixed rate decides how many tokens go, or else a learned threshold.
        importance: what pruning goes by: mean attention "received", the "class" token's attention, or "random" numbers.
    """

    steps: tuple[str, ...]
    fixed: bool = False
    importance: str = "received"


VARIANTS: dict[str, Method] = {
    "ltmp": Method(("merge", "prune")),
    "ltpm": Method(("prune", "merge")),
    "ltm": Method(("merge",)),
    "ltp": Method(("prune",)),
    "m": Method(("merge",), fixed=True),
    "p": Method(("prune",), fixed=True),
    "mp": Method(("merge", "prune"), fixed=True),
    "pm": Method(("prune", "merge"), fixed=True),
    "topk": Method(("prune",), fixed=True, importance="class"),
    "evit": Method(("fuse",), fixed=True, importance="class"),
    "random": Method(("prune",), fixed=True, importance="random"),
}
"""The learned thresholds (paper, section 3) and what they are compared with.

`m`, `p`, `mp` and `pm` are their steps at fixed rates, `m` being Token Merging (Bolya et al., ICLR 2023); `topk` keeps
what the class token attends to most and `evit` also fuses the rest into one token (Liang et al., ICLR 2022, section 3);
`random` is the floor of every comparison.
"""

LEARNED = tuple(name for name, method in VARIANTS.items() if not method.fixed)
FIXED = tuple(name for name, method in VARIANTS.items() if method.fixed)

ENGINES = ("auto", "packed", "triton", "graph")
SCHEDULES = ("constant", "decreasing")
SIMILARITIES = ("mean", "heads", "probe")
MATCHINGS = ("bipartite", "mutual")
IMPORTANCES = ("received", "class", "probe")

BEST: dict[str, Any] = {"similarity": "probe", "matching": "mutual", "importance": "probe", "size_power": 0.3}
"""What tokens are scored by beyond the paper, where it was measured to help (docs/accuracy.md)."""

ATTENTION: dict[str, Any] = {"similarity": "heads", "matching": "mutual", "size_power": 0.3, "class_power": 0.5}
"""The same of what needs no probe: nothing but thresholds is learned, by forward passes alone."""

SCORES: dict[str, dict[str, Any]] = {"paper": {}, "attention": ATTENTION, "best": BEST}
"""Settings that `--scores` names, by that name."""


@dataclass(frozen=True)
class LTMPConfig:
    """How a model is reduced.

    Args:
        variant: by learned thresholds `ltmp` (merge then prune), `ltpm` (prune then merge), `ltm` (merge only) or `ltp`
            (prune only); `m`, `p`, `mp`, `pm`, `topk`, `evit` or `random` at fixed rates, see `VARIANTS`.
        tau: temperature of the merge decision's gradient, in units of cosine similarity.
        prune_tau: temperature of the prune decision's gradient, in units of log importance.
        engine: what runs the deployed model. `auto` picks; a named engine works or raises.
        r: for fixed rates, tokens that each step removes from an image in each block: a number (8), a part of the free
            tokens (0.12), or one of either a block.
        r_prune: the same for the prune step of `mp` and `pm`, where it is not r.
        schedule: `constant`, or `decreasing` for linearly from 2 r in the first block to 0 in the last.
        floor: tokens that an image keeps at least, prefix tokens included, whatever the thresholds say.
        ceiling: tokens that an image keeps at most after each block, as far as the block's last step can remove them
            (merging removes half of them at most); None for any number.
        seed: of `random`.
        similarity: tokens are alike by the cosine of their keys' `mean` over heads (paper, section 3.2), or by the mean
            of the cosines of all `heads`, which tells more apart and costs a little more, or by what a learned `probe`
            reads of them (`ltmp.learning.probe`), which also says which of them had better not merge.
        matching: which tokens may merge: even ones into odd ones by `bipartite` matching (paper, section 3.2), or, of
            learned variants, `mutual` pairs, each the other's most similar token, and then such pairs of the others.
        importance: what learned variants prune by: the mean attention `received` (paper, section 3.3), the `class`
            token's attention, or attention received and what a learned `probe` says; None is what the variant says.
        size_power: a token of s patches counts as s ** power in attention, with this power in the first block, rising
            to 1 in the last; 1 is proportional attention throughout (paper, section 3.1).
        class_power: what the class token attends to stays longer, the more so the later the block: to this power in the
            last one, to which it rises evenly, 1 - cosine counts times the pair's attention from it, relative to a
            patch's even share, and pruning goes by the attention received to 1 minus the power, times the attention
            from it to the power. 0 is the cosine and the attention received alone (paper, sections 3.2 and 3.3).

    Raises:
        ValueError: a setting is out of range or unknown; the message lists what is known.
    """

    variant: str = "ltmp"
    tau: float = 0.1
    prune_tau: float = 0.5
    engine: str = "auto"
    r: Rate | tuple[Rate, ...] = 0
    r_prune: Rate | tuple[Rate, ...] | None = None
    schedule: str = "constant"
    floor: int = 0
    ceiling: int | None = None
    seed: int = 0
    similarity: str = "mean"
    matching: str = "bipartite"
    importance: str | None = None
    size_power: float = 1.0
    class_power: float = 0.0

    def __post_init__(self) -> None:
        settings = {"variant": VARIANTS, "engine": ENGINES, "schedule": SCHEDULES, "similarity": SIMILARITIES,
                    "matching": MATCHINGS, "importance": (None, *IMPORTANCES)}  # fmt: skip
        for name, known in settings.items():
            if getattr(self, name) not in known:
                names = ", ".join(filter(None, known))
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {names}")
        if self.method.fixed and (self.matching != "bipartite" or self.importance is not None):
            raise ValueError(f"matching and importance are for {', '.join(LEARNED)}; {self.variant} has its own")
        if self.method.fixed and self.similarity == "probe":
            raise ValueError(f"similarity by a probe is for {', '.join(LEARNED)}; {self.variant} has nothing learned")
        for name in ("tau", "prune_tau"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("r", "r_prune"):
            value = getattr(self, name)
            if isinstance(value, Sequence):
                # JSON and callers bring lists
                object.__setattr__(self, name, tuple(value))
            self._check_rate(name, getattr(self, name))
        for name in ("size_power", "class_power"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.floor < 0 or (self.ceiling is not None and self.ceiling < max(1, self.floor)):
            raise ValueError(f"floor {self.floor} and ceiling {self.ceiling}: expected 0 <= floor <= ceiling tokens")

    def _check_rate(self, name: str, value: Rate | tuple[Rate, ...] | None) -> None:
        several = isinstance(value, tuple)
        rates = value if isinstance(value, tuple) else () if value is None else (value,)
        for rate in rates:
            whole = isinstance(rate, int) and not isinstance(rate, bool) and rate >= 0
            if not whole and not (isinstance(rate, float) and 0 <= rate < 1):
                raise ValueError(
                    f"{name} must be a number of tokens (8) or a part of them below 1 (0.12), got {rate!r}"
                )
        if rates and any(rates) and not self.method.fixed:
            raise ValueError(
                f"{name} is for fixed rates ({', '.join(FIXED)}), and {self.variant} learns its thresholds"
            )
        if several and self.schedule != "constant":
            raise ValueError(f"{name} says a rate for each block, so schedule={self.schedule!r} has nothing to say")
        if name == "r_prune" and value is not None and not {"merge", "prune"} <= set(self.steps):
            raise ValueError(f"r_prune is for mp and pm; {self.variant} has one step, whose rate is r")

    @property
    def method(self) -> Method:
        return VARIANTS[self.variant]

    @property
    def goes_by(self) -> str:
        """What pruning goes by: see `Method.importance`."""
        return self.importance or self.method.importance

    @property
    def by_received(self) -> bool:
        """Whether pruning goes by the mean attention received, alone or among others."""
        return self.goes_by in ("received", "probe")

    @property
    def asks_probe(self) -> bool:
        """Whether anything goes by a learned probe, so that there must be one."""
        return (self.similarity == "probe" and "merge" in self.steps) or self.goes_by == "probe"

    @property
    def asks_class(self) -> str | None:
        """What goes by the class token's attention, so that there must be one; None where nothing does."""
        if self.class_power > 0 and ("merge" in self.steps or self.goes_by == "received"):
            return f"class_power {self.class_power:g}"
        return f"variant {self.variant}" if self.goes_by == "class" and self.steps != ("merge",) else None

    @property
    def scores(self) -> dict[str, str | float]:
        """What thresholds mean: those that were learned by other scores say nothing here."""
        return {"similarity": self.similarity, "matching": self.matching, "importance": self.goes_by,
                "size_power": self.size_power, "class_power": self.class_power}  # fmt: skip

    @property
    def steps(self) -> tuple[str, ...]:
        """The reduction steps of a block, in order."""
        return self.method.steps

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON types; of those that came later only what is not the default, so that old readers read."""
        defaults = type(self)()
        first = ("variant", "tau", "prune_tau", "engine")
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name in first or value != getattr(defaults, name)
        }

    @classmethod
    def best(cls, **settings: Any) -> LTMPConfig:
        """All that is beyond the paper and helps; `settings` go before it.

        >>> ltmp.attach(model, ltmp.LTMPConfig.best())
        """
        return cls(**{**BEST, **settings})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LTMPConfig:
        """The config in `values`; names that this version does not know are an error."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}: written by a newer version of ltmp?")
        return cls(**values)
