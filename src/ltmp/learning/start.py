"""Calibrated schedules judged by the dense model's answers; and what a model's own images settle before any search.

Two things that were found on one model differ between models (docs/dial.md). Where patches repeat one another, as plain
backgrounds do, a merged token must count as all its patches (the paper's proportional attention), or merging equal
patches would change answers; elsewhere answers stay closer where large tokens count for less. And where merging alone
meets a budget, pruning may only harm. Both show on a hundred images without labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import record
from ..config import Scores
from ..distributed import exchange
from ..hosts.attach import thresholds_of
from ..method.thresholds import Thresholds
from .answers import Judge, teacher
from .calibrate import follow, geometry_of
from .inputs import Images
from .schedule import Shape, usual

JUDGED = 128
"""Images that a schedule is judged on."""

PASSES = 4
"""How often `fit` looks at each of them at most, for one share."""

CLOSE = 7.0
"""How much the logarithm of the divergence's root falls when the share grows by 1, about: corrects what schedules that
cost a little more or less than asked are judged by."""

CLEARLY = 0.1
"""By how much a score has to be lower to be no accident: a tenth less divergence."""


@dataclass(frozen=True)
class Calibrated:
    """Calibrated thresholds [L] and what they did to the images that they were calibrated on.

    Attributes:
        share: mean; kept: mean tokens after each block [L].
        divergence: its root on average, which single images sway less than the divergence itself.
    """

    share: float
    divergence: float
    merge: Tensor
    prune: Tensor
    kept: Tensor


class Calibrator:
    """Calibrates an attached model on images, and says how far its answers to them are from the dense model's.

    Args:
        images: [N, 3, H, W] on the model's device, or keywords.
        judge: how answers are read.
        every: of how many blocks one removes tokens.
    """

    def __init__(self, model: nn.Module, images: Images, judge: Judge, every: int = 1) -> None:
        self.model, self.images, self.judge, self.every, self.views = model, images, judge, every, 0
        self.geometry = geometry_of(model, images)
        self.usual = partial(usual, matching=thresholds_of(model).config.scores.matching)
        self.answers = torch.cat([teacher(model, part, judge) for part in images.split(JUDGED)])
        self.looked(len(images), "reading the dense model's answers")

    def looked(self, images: int, text: str) -> None:
        """Count images that were looked at; `text` says why."""
        self.views += images

    @torch.inference_mode()
    def run(self, shape: Shape, share: float, part: slice, text: str) -> Calibrated:
        """Calibrate on some of the images."""
        own = thresholds_of(self.model)
        with record() as calls:
            answers = follow(self.model, self.images[part], shape, share, self.geometry, self.judge, self.every)
        self.looked(len(answers), text)
        divergence = self.judge.divergence(answers, self.answers[part]).clamp_min(0).sqrt().mean()
        values = (own.merge.detach().clone(), own.prune.detach().clone())
        return Calibrated(float(calls.share().mean()), float(divergence), *values, calls.kept[0].mean(0))

    def score(self, shape: Shape, share: float, part: slice) -> float:
        """The lower the better: the divergence, corrected for what the shape cost more or less than asked."""
        row = self.run(shape, share, part, f"searching at {share:.2f}")
        return math.log(max(row.divergence, 1e-9)) + CLOSE * (row.share - share)

    def starts(self, share: float) -> tuple[Shape, ...]:
        """Shapes to begin with: the usual one, and the same without pruning."""
        merges_and_prunes = {"merge", "prune"} <= {*thresholds_of(self.model).config.steps}
        found = self.usual(share)
        return (found, found.without_pruning()) if merges_and_prunes else (found,)

    def passes(self, shares: int) -> int:
        """How often `fit` looks at an image."""
        return shares * len(thresholds_of(self.model).config.scores.choices) * len(self.starts(0.5))

    def fit(self, shares: list[float]) -> dict[float, Shape]:
        """Set what merged tokens count as, and return the start at each share; the usual ones need no proof."""
        thresholds = thresholds_of(self.model)
        given, *others = (self._judged(scores, shares) for scores in thresholds.config.scores.choices)
        better = next((other for other in others if other.beats(given)), given)
        # ranks on unlike hardware may round unlike
        scores, starts = exchange((better.scores, better.starts()))[0]
        thresholds.config = replace(thresholds.config, scores=scores)
        return {share: self.starts(share)[start] for share, start in zip(shares, starts, strict=True)}

    def _judged(self, scores: Scores, shares: list[float]) -> _Judged:
        thresholds, few = thresholds_of(self.model), slice(0, JUDGED)
        thresholds.config = replace(thresholds.config, scores=scores)
        found = [[self.score(shape, share, few) for shape in self.starts(share)] for share in shares]
        return _Judged(scores, found)


def settled(thresholds: Thresholds, views: int) -> dict[str, Any]:
    """What a run's images settled before anything was learned, for its checkpoint; `views` images were looked at."""
    return {"size_power": thresholds.config.scores.size_power, "probe": thresholds.probe, "views": views}


def settle_as(thresholds: Thresholds, saved: dict[str, Any]) -> int:
    """Set what `settled` saved, and return how many images that took.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    choices = {choice.size_power: choice for choice in thresholds.config.scores.choices}
    if (saved["probe"] is None) == thresholds.config.needs_probe:
        raise ValueError("probe")
    thresholds.config = replace(thresholds.config, scores=choices[saved["size_power"]])
    thresholds.set_probe(saved["probe"])
    return int(saved["views"])


@dataclass(frozen=True)
class _Judged:
    """The score of each start at each share, the usual start first."""

    scores: Scores
    found: list[list[float]]

    def starts(self) -> list[int]:
        """Which start to take at each share."""
        return [int(min(others, default=first) < first - CLEARLY) for first, *others in self.found]

    def beats(self, other: _Judged) -> bool:
        """Whether it is clearly better at every share."""
        return all(min(mine) < min(theirs) - CLEARLY for mine, theirs in zip(self.found, other.found, strict=True))
