"""Which method: the order of its steps, and what tokens are scored by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from ...config import SCORES, LTMPConfig, Scores
from ...errors import UsageError
from .groups import METHOD, option


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options for the reduction that is learned."""

    variant: Annotated[
        str, option("ltmp: merge, then prune; ltpm: the other way round; ltm: merge only; ltp: prune only.", METHOD)
    ] = "ltmp"
    scores: Annotated[
        str,
        option(
            "Scores to merge and prune by: paper; attention (all heads, mutual pairs; forward passes only); or "
            "best (a probe learned from gradients, about half a megabyte in the file). The options below override it.",
            METHOD,
        ),
    ] = "paper"
    similarity: Annotated[
        str | None,
        option(
            "Similarity of tokens: keys averaged over heads (mean, the paper's), all heads (heads), or a learned "
            "probe (probe).",
            METHOD,
        ),
    ] = None
    matching: Annotated[
        str | None,
        option(
            "Tokens that may merge: even ones into odd ones (bipartite, the paper's), or mutually nearest pairs "
            "(mutual).",
            METHOD,
        ),
    ] = None
    importance: Annotated[
        str | None,
        option(
            "Importance for pruning: attention received (received, the paper's), or a learned probe (probe).", METHOD
        ),
    ] = None
    size_power: Annotated[
        float | None,
        option(
            "Exponent of a merged token's size in the first block's attention, rising linearly to 1 in the last. "
            "The paper's is 1.",
            METHOD,
        ),
    ] = None
    class_power: Annotated[
        float | None,
        option(
            "Weight of class-token attention, rising linearly to this value in the last block: tokens it attends "
            "to are merged and pruned later. 0, the paper's, disables it.",
            METHOD,
        ),
    ] = None

    def config(self) -> LTMPConfig:
        """The settings that the options ask for."""
        names = ("similarity", "matching", "importance", "size_power", "class_power")
        return config_of(self.scores, variant=self.variant, **{name: getattr(self, name) for name in names})


def scores_of(name: str) -> Scores:
    """The scores of a name; another is a usage error."""
    if name not in SCORES:
        raise UsageError(f"unknown scores {name!r}: expected one of {', '.join(SCORES)}")
    return SCORES[name]


def config_of(scores: str = "paper", variant: str = "ltmp", **settings: Any) -> LTMPConfig:
    """Named scores, changed by each setting that is not None; a wrong one is a usage error."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return LTMPConfig(variant, replace(scores_of(scores), **given))
    except ValueError as error:
        raise UsageError(str(error)) from error
