"""Options for the method: the order of merging and pruning, and the scores of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from ...config import SCORES, LTMPConfig, Scores
from ...errors import UsageError
from .groups import METHOD, option


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options for the reduction that thresholds are learned for."""

    variant: Annotated[
        str,
        option(
            "What each block does: ltmp (merge, then prune), ltpm (prune, then merge), ltm (merge only) or ltp "
            "(prune only).",
            METHOD,
        ),
    ] = "ltmp"
    scores: Annotated[
        str,
        option(
            "Preset of scores to merge and prune by: paper, attention (all heads, mutual pairs; needs forward passes "
            "only) or best (a probe learned from gradients, which adds about half a megabyte to the file). The options "
            "below override parts of it.",
            METHOD,
        ),
    ] = "paper"
    similarity: Annotated[
        str | None,
        option(
            "Similarity of tokens: mean (keys averaged over heads, as in the paper), heads (keys of all heads) or "
            "probe (learned).",
            METHOD,
        ),
    ] = None
    matching: Annotated[
        str | None,
        option(
            "Which tokens may merge: bipartite (even ones into odd ones, as in the paper) or mutual (mutually nearest "
            "pairs).",
            METHOD,
        ),
    ] = None
    importance: Annotated[
        str | None,
        option("Importance for pruning: received (attention received, as in the paper) or probe (learned).", METHOD),
    ] = None
    size_power: Annotated[
        float | None,
        option(
            "Exponent of a merged token's size in the attention of the first block; it rises linearly to 1 in the "
            "last. The paper uses 1.",
            METHOD,
        ),
    ] = None
    class_power: Annotated[
        float | None,
        option(
            "Weight of the class token's attention, which delays merging and pruning of the tokens it attends to. It "
            "rises linearly to this value in the last block; 0, as in the paper, disables it.",
            METHOD,
        ),
    ] = None

    def config(self) -> LTMPConfig:
        """The configuration that the options describe."""
        names = ("similarity", "matching", "importance", "size_power", "class_power")
        return config_of(self.scores, variant=self.variant, **{name: getattr(self, name) for name in names})


def scores_of(name: str) -> Scores:
    """Return the preset of that name.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in SCORES:
        raise UsageError(f"unknown scores {name!r}: expected one of {', '.join(SCORES)}")
    return SCORES[name]


def config_of(scores: str = "paper", variant: str = "ltmp", **settings: Any) -> LTMPConfig:
    """Return a configuration with a preset of scores, overridden by each setting that is not None.

    Raises:
        UsageError: a name or a value is not valid.
    """
    overrides = {name: value for name, value in settings.items() if value is not None}
    try:
        return LTMPConfig(variant, replace(scores_of(scores), **overrides))
    except ValueError as error:
        raise UsageError(str(error)) from error
