"""Which method: the order of its steps, and what tokens are scored by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from ...config import SCORES, LTMPConfig, Scores
from ...errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What is learned."""

    variant: Annotated[
        str,
        typer.Option(help="ltmp: merge, then prune; ltpm: the other way round; ltm: merge only; ltp: prune only."),
    ] = "ltmp"
    scores: Annotated[
        str,
        typer.Option(
            help="What tokens are scored by: as in the paper; attention: {similarity}, {matching}, size power "
            "{size_power} and class power {class_power}, by forward passes alone; or best: a probe learned from "
            "gradients, which adds half a megabyte or so to the file. What is given below goes before it.".format(
                **asdict(SCORES["attention"])
            )
        ),
    ] = "paper"
    similarity: Annotated[
        str | None,
        typer.Option(
            help="Tokens are alike by the mean of their keys (mean, the paper's), by all heads, or by a learned probe."
        ),
    ] = None
    matching: Annotated[
        str | None,
        typer.Option(
            help="Even tokens merge into odd ones (bipartite, the paper's), or the mutually nearest (mutual)."
        ),
    ] = None
    importance: Annotated[
        str | None,
        typer.Option(
            help="Importance that tokens are pruned by: received (attention, the paper's), or a learned probe."
        ),
    ] = None
    size_power: Annotated[
        float | None,
        typer.Option(
            help="A token of s patches counts as s to this power in the first block's attention, rising to 1 in the "
            "last; the paper's is 1."
        ),
    ] = None
    class_power: Annotated[
        float | None,
        typer.Option(
            help="Merge and prune less what the class token attends to: in the last block 1 - cosine counts times that "
            "attention to this power, and importance has this part of it; both rise evenly to that. The paper's is 0."
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
