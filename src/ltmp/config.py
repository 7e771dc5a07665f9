"""The settings of an attached model: frozen, validated, and stored with the model and in thresholds files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .errors import LTMPError

Rate = int | float
"""Tokens that a step removes per image and block: a count (int), or a fraction of the unprotected tokens (float)."""


@dataclass(frozen=True)
class Method:
    """The reduction that a variant applies to the tokens of a block.

    Attributes:
        steps: "merge", "prune" or "fuse" (prune, and merge the pruned tokens into one), in order.
        fixed: whether tokens are removed at fixed rates instead of by learned thresholds.
        importance: the importance that a fixed-rate variant prunes by; None if `Scores.importance` decides.
    """

    steps: tuple[str, ...]
    fixed: bool = False
    importance: str | None = None


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
"""Learned thresholds (paper, section 3) and the fixed-rate methods they are compared with.

`m`, `p`, `mp` and `pm` run the same steps at fixed rates; `m` is Token Merging (Bolya et al., ICLR 2023). `topk` keeps
the tokens that the class token attends to most, and `evit` also fuses the rest into one token (Liang et al., ICLR 2022,
section 3). `random` is the lower bound of every comparison.
"""

LEARNED = tuple(name for name, method in VARIANTS.items() if not method.fixed)
FIXED = tuple(name for name, method in VARIANTS.items() if method.fixed)

ENGINES = ("auto", "packed", "triton", "graph")
SCHEDULES = ("constant", "decreasing")
FORMS = ("reduced", "grid", "fewer")
"""What the host receives after its last block.

`reduced`: the remaining tokens. `grid`: all patches in place, each with the features of the token that it was merged
into. `fewer`: a grid for the host's own code, of which its language model receives one feature per remaining token.
"""
SIMILARITIES = ("mean", "heads", "probe")
MATCHINGS = ("bipartite", "mutual")
IMPORTANCES = ("received", "probe")
"""What learned thresholds can prune by; some fixed-rate variants have an importance of their own, see `VARIANTS`."""

_FIXED_IMPORTANCES = tuple(method.importance for method in VARIANTS.values() if method.importance is not None)


def _check_name(setting: str, value: object, known: Iterable[str]) -> None:
    names = tuple(known)
    if value not in names:
        raise ValueError(f"unknown {setting} {value!r}: expected one of {', '.join(names)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, repr=False)
class Scores:
    """How tokens are scored: how similar two tokens are, which pairs may merge, and how important each token is.

    The defaults are the paper's. `SCORES` names the combinations that were measured (docs/method.md).

    Args:
        similarity: `mean`, the cosine of two tokens' keys averaged over heads (paper, section 3.2); `heads`, the mean
            of the cosines of the individual heads; or `probe`, the cosine of a learned linear map of the features
            (`ltmp.learning.probe`), which also adds a merge penalty to tokens that the model's output depends on.
        matching: `bipartite`, even tokens merge into odd ones (paper, section 3.2); or, for learned variants, `mutual`:
            tokens that are each other's most similar token merge, in three rounds.
        importance: `received`, the mean attention that a token receives (paper, section 3.3); or `probe`, which
            combines it with a learned prediction of how much the output depends on the token.
        size_power: a token of s patches enters the attention with weight s ** power (paper, section 3.1: 1). The power
            rises linearly from this value in the first block to 1 in the last.
        class_power: weight of class-token attention, which rises linearly to this value in the last block. Tokens that
            the class token attends to are merged and pruned later. 0 disables it.

    Raises:
        ValueError: a setting is unknown or out of range; the message lists the known ones.
    """

    similarity: str = "mean"
    matching: str = "bipartite"
    importance: str = "received"
    size_power: float = 1.0
    class_power: float = 0.0

    def __post_init__(self) -> None:
        _check_name("similarity", self.similarity, SIMILARITIES)
        _check_name("matching", self.matching, MATCHINGS)
        if self.importance not in _FIXED_IMPORTANCES:
            _check_name("importance", self.importance, IMPORTANCES)
        for name in ("size_power", "class_power"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}")

    @classmethod
    def of(cls, value: str | Scores) -> Scores:
        """Return the scores with this name, or `value` itself if it is a `Scores` already.

        Raises:
            ValueError: no scores have this name.
        """
        if isinstance(value, Scores):
            return value
        if not isinstance(value, str) or value not in SCORES:
            raise ValueError(f"unknown scores {value!r}: expected one of {', '.join(SCORES)}, or a Scores value")
        return SCORES[value]

    @property
    def name(self) -> str | None:
        """The name of this combination in `SCORES`, or None."""
        return next((name for name, scores in SCORES.items() if scores == self), None)

    def __repr__(self) -> str:
        changed = (setting.name for setting in fields(self) if getattr(self, setting.name) != setting.default)
        return f"Scores({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    def __str__(self) -> str:
        named = {replace(scores, size_power=self.size_power): name for name, scores in SCORES.items()}
        return self.name or (f"{named[self]}, size_power={self.size_power:g}" if self in named else repr(self))

    @property
    def choices(self) -> tuple[Scores, ...]:
        """The scores that learning or a dial may choose between, these first.

        Scores given by name leave `size_power` open: 1 may do better on the images at hand.
        """
        proportional = replace(self, size_power=1.0)
        return (self, proportional) if self.name is not None and self != proportional else (self,)

    @property
    def averages_keys(self) -> bool:
        """Whether similarity is measured on the mean of the keys over heads."""
        return self.similarity == "mean"

    @property
    def probes_similarity(self) -> bool:
        """Whether similarity is measured on the output of a probe."""
        return self.similarity == "probe"

    @property
    def probes_importance(self) -> bool:
        """Whether a probe's prediction is part of the importance."""
        return self.importance == "probe"

    @property
    def mutual(self) -> bool:
        """Whether mutual pairs merge, which keeps the order of the tokens, rather than even tokens into odd ones."""
        return self.matching == "mutual"

    @property
    def blends_class_attention(self) -> bool:
        """Whether `class_power` mixes class-token attention into the importance."""
        return self.importance == "received"

    def needs_received(self, steps: tuple[str, ...]) -> bool:
        """Whether a block with these steps needs the attention that each token receives."""
        return "prune" in steps and self.importance in IMPORTANCES

    def needs_class_attention(self, steps: tuple[str, ...]) -> bool:
        """Whether these steps need the attention of a class token, which the model must then have."""
        if self.class_power > 0 and ("merge" in steps or self.blends_class_attention):
            return True
        return self.importance == "class" and steps != ("merge",)

    def needs_probe(self, steps: tuple[str, ...]) -> bool:
        """Whether these steps need a learned probe."""
        return (self.probes_similarity and "merge" in steps) or (self.probes_importance and "prune" in steps)


SCORES: dict[str, Scores] = {
    "paper": Scores(),
    "attention": Scores("heads", "mutual", size_power=0.3, class_power=0.5),
    "best": Scores("probe", "mutual", "probe", size_power=0.3),
}
"""Scores by name: the paper's; the best that need forward passes only; and the best, with a probe learned from
gradients (docs/accuracy.md)."""


@dataclass(frozen=True, init=False)
class LTMPConfig:
    """How a model is reduced.

    >>> ltmp.attach(model, ltmp.LTMPConfig(scores="best"))

    Args:
        variant: learned thresholds: `ltmp` (merge, then prune), `ltpm` (prune, then merge), `ltm` (merge only) or `ltp`
            (prune only). Fixed rates: `m`, `p`, `mp`, `pm`, `topk`, `evit` or `random`, see `VARIANTS`.
        scores: how tokens are scored: `paper`, `attention`, `best`, or a `Scores` value of your own.
        engine: the engine that runs the deployed model. `auto` picks one, and runs dense if that is faster
            (docs/speed.md); a named engine reduces or raises.
        tau: temperature of the merge decision's gradient, in units of cosine similarity.
        r: for fixed rates, the tokens that each step removes per image and block: a count (8), a fraction of the
            unprotected tokens (0.12), or a sequence with one of these per block.
        r_prune: the same for the prune step of `mp` and `pm`; None for r.
        schedule: `constant`, or `decreasing` linearly from 2 r in the first block to 0 in the last.
        seed: random seed of variant `random`.
        floor: minimum number of tokens that an image keeps, prefix tokens included, whatever the thresholds.
        ceiling: maximum number of tokens that an image keeps after each block, as far as the block's last step can
            remove them (merging removes at most half of them); None for no limit.
        tokens: what the host receives after its last block, see `FORMS`; None for the host's default (docs/hosts.md).

    Raises:
        ValueError: a setting is unknown or out of range; the message lists the known ones.
    """

    variant: str = "ltmp"
    scores: Scores = SCORES["paper"]
    engine: str = "auto"
    tau: float = 0.1
    r: Rate | tuple[Rate, ...] = 0
    r_prune: Rate | tuple[Rate, ...] | None = None
    schedule: str = "constant"
    seed: int = 0
    floor: int = 0
    ceiling: int | None = None
    tokens: str | None = None

    def __init__(
        self, variant: str = variant, scores: str | Scores = "paper", engine: str = engine, tau: float = tau,
        r: Rate | Sequence[Rate] = r, r_prune: Rate | Sequence[Rate] | None = r_prune, schedule: str = schedule,
        seed: int = seed, floor: int = floor, ceiling: int | None = ceiling, tokens: str | None = tokens, **former: Any,
    ) -> None:  # fmt: skip
        """See the class. `former` are deprecated settings from before there was `scores`."""
        _check_name("variant", variant, VARIANTS)
        scores = Scores.of(scores)
        if former:
            scores = _with_former(scores, former)
        settings = {"variant": variant, "scores": _for_variant(scores, variant), "engine": engine, "tau": tau,
                    "r": _as_tuple(r), "r_prune": _as_tuple(r_prune), "schedule": schedule, "seed": seed,
                    "floor": floor, "ceiling": ceiling, "tokens": tokens}  # fmt: skip
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        _check_name("engine", self.engine, ENGINES)
        _check_name("schedule", self.schedule, SCHEDULES)
        if self.tokens is not None:
            _check_name("tokens", self.tokens, FORMS)
        if not (_is_number(self.tau) and self.tau > 0):
            raise ValueError(f"tau must be a positive number, got {self.tau!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        for name in ("r", "r_prune"):
            self._check_rate(name, getattr(self, name))
        fits = _is_count(self.floor) and (self.ceiling is None or _is_count(self.ceiling))
        if not fits or (self.ceiling is not None and self.ceiling < max(1, self.floor)):
            raise ValueError(f"floor {self.floor}, ceiling {self.ceiling}: expected 0 <= floor <= ceiling, ceiling > 0")

    def _check_rate(self, name: str, value: Rate | tuple[Rate, ...] | None) -> None:
        per_block = isinstance(value, tuple)
        rates = value if isinstance(value, tuple) else () if value is None else (value,)
        for rate in rates:
            if not _is_count(rate) and not (isinstance(rate, float) and 0 <= rate < 1):
                raise ValueError(f"{name} must be a number of tokens (8) or a fraction below 1 (0.12), got {rate!r}")
        if rates and any(rates) and not self.method.fixed:
            raise ValueError(
                f"{name} is for fixed rates ({', '.join(FIXED)}), and {self.variant} learns its thresholds"
            )
        if per_block and self.schedule != "constant":
            raise ValueError(f"{name} already has a rate for each block: leave schedule={self.schedule!r} out")
        if name == "r_prune" and value is not None and not {"merge", "prune"} <= set(self.steps):
            raise ValueError(f"r_prune is for mp and pm; {self.variant} has one step, whose rate is r")

    @property
    def method(self) -> Method:
        return VARIANTS[self.variant]

    @property
    def steps(self) -> tuple[str, ...]:
        """The reduction steps of a block, in order."""
        return self.method.steps

    @property
    def needs_probe(self) -> bool:
        """Whether the scores of this variant need a learned probe."""
        return self.scores.needs_probe(self.steps)

    @property
    def needs_class_attention(self) -> bool:
        """Whether the scores of this variant need a class token's attention."""
        return self.scores.needs_class_attention(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, scores by name if they have one.

        Defaults are left out, so that earlier versions can read the rest; variant, tau and engine are always there.
        """
        defaults = type(self)(self.variant)
        values: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("variant", "tau", "engine") and value == getattr(defaults, setting.name):
                continue
            if isinstance(value, Scores):
                value = value.name or asdict(value)
            values[setting.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LTMPConfig:
        """Return the config that `to_dict` of this version or an earlier one wrote.

        Raises:
            ValueError: a setting is unknown or out of range.
            LTMPError: learned thresholds for importance "class", which is no longer supported.
        """
        former = {name: values[name] for name in _FORMER if values.get(name) is not None}
        current = {name: value for name, value in values.items() if name not in (*_FORMER, "prune_tau")}
        _check_known(current, cls)
        if former.get("importance") == "class" and not VARIANTS[current.get("variant", "ltmp")].fixed:
            raise LTMPError(
                "these thresholds were learned with importance='class', which is no longer supported: learn them again "
                "with scores='attention', which prunes by class-token attention, too, and does better"
            )
        scores: Any = current.pop("scores", "paper")
        if isinstance(scores, Mapping):
            _check_known(scores, Scores)
            scores = Scores(**scores)
        return cls(**current, scores=replace(Scores.of(scores), **former))

    @classmethod
    def best(cls, **settings: Any) -> LTMPConfig:
        """Deprecated: `LTMPConfig(scores="best", ...)`."""
        warnings.warn(
            'LTMPConfig.best() is deprecated: use LTMPConfig(scores="best")', DeprecationWarning, stacklevel=2
        )
        return cls(**{"scores": "best", **settings})

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Read a setting that is now part of `scores`. Deprecated."""
            if name not in _FORMER:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(f"config.{name} is deprecated: use config.scores.{name}", DeprecationWarning, stacklevel=2)
            return getattr(self.scores, name)


def _as_tuple(rate: Any) -> Any:
    """Turn a list of rates, as callers and JSON have them, into a tuple."""
    return tuple(rate) if isinstance(rate, Sequence) and not isinstance(rate, str) else rate


def _for_variant(scores: Scores, variant: str) -> Scores:
    """Return `scores` with the importance of a fixed-rate variant; check that a learned one can use them."""
    method = VARIANTS[variant]
    if not method.fixed:
        if scores.importance not in IMPORTANCES:
            raise ValueError(
                f"importance {scores.importance!r} is for variants of fixed rates: {variant} prunes by "
                f"{' or '.join(IMPORTANCES)}"
            )
        return scores
    importance = method.importance or "received"
    if scores.mutual or scores.importance not in ("received", importance):
        raise ValueError(f"matching and importance are for {', '.join(LEARNED)}; {variant} has its own")
    if scores.probes_similarity:
        raise ValueError(f"similarity by a probe is for {', '.join(LEARNED)}; {variant} has nothing learned")
    return replace(scores, importance=importance)


def _check_known(values: Mapping[str, Any], cls: type[LTMPConfig] | type[Scores]) -> None:
    unknown = sorted(set(values) - {setting.name for setting in fields(cls)})
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}: written by a newer version of ltmp?")


_FORMER = ("similarity", "matching", "importance", "size_power", "class_power")
"""Settings of `LTMPConfig` before it had `scores`, now those of `Scores`. `prune_tau` has no successor."""


def _with_former(scores: Scores, former: Mapping[str, Any]) -> Scores:
    """Return `scores` changed by former settings of `LTMPConfig`, with a warning that names their replacement.

    Raises:
        TypeError: `LTMPConfig` never had such a setting.
    """
    unknown = sorted(set(former) - {*_FORMER, "prune_tau"})
    if unknown:
        raise TypeError(f"LTMPConfig got an unexpected keyword argument {unknown[0]!r}")
    changed = replace(scores, **{name: former[name] for name in _FORMER if former.get(name) is not None})
    replacement = f"scores={changed.name or changed!r}"
    if "prune_tau" in former:
        replacement += ", and leave out prune_tau, which has no effect any more"
    warnings.warn(
        f"LTMPConfig({', '.join(f'{name}=...' for name in former)}) is deprecated: use {replacement}",
        DeprecationWarning,
        stacklevel=3,
    )
    return changed
