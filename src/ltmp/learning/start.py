"""Choose where a run starts: what merged tokens count as, and whether to prune, on the model's own images.

Models differ in both (docs/dial.md). If patches repeat one another, as plain backgrounds do, a merged token must count
as all its patches (the paper's proportional attention), or merging equal patches would change answers; elsewhere
answers stay closer if large tokens count for less. And if merging alone meets a budget, pruning can only do harm. A
hundred unlabelled images show both: calibrated schedules are compared by how far answers are from the dense model's.
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
from .answers import Judge, dense_answers
from .calibrate import follow, geometry_of
from .inputs import Images
from .schedule import Shape, default_shape

SCORED = 128
"""Images that a schedule is scored on."""

MAX_PASSES = 4
"""Most passes over these images that `Calibrator.choose_starts` takes per share."""

DIVERGENCE_SLOPE = 7.0
"""Roughly how much the log of the root divergence falls as the share grows by 1; corrects the scores of schedules that
cost a little more or less than requested."""

MARGIN = 0.1
"""How much lower a score must be to replace the default: about a tenth less root divergence."""


@dataclass(frozen=True)
class Calibrated:
    """Calibrated thresholds and what they do to the images that they were calibrated on.

    Attributes:
        share: mean FLOPs share.
        divergence: mean of the images' root divergence, which outliers affect less than the mean divergence.
        merge, prune: thresholds [L].
        kept: mean tokens after each block [L].
    """

    share: float
    divergence: float
    merge: Tensor
    prune: Tensor
    kept: Tensor


class Calibrator:
    """Calibrates an attached model on images and measures how far its answers are from the dense model's.

    Args:
        images: [N, 3, H, W] on the model's device, or keyword inputs.
        judge: how answers are read.
        every: remove tokens in one of this many blocks.

    Attributes:
        views: images processed so far.
    """

    def __init__(self, model: nn.Module, images: Images, judge: Judge, every: int = 1) -> None:
        self.model, self.images, self.judge, self.every, self.views = model, images, judge, every, 0
        self.geometry = geometry_of(model, images)
        self.default_shape = partial(default_shape, matching=thresholds_of(model).config.scores.matching)
        self.answers = torch.cat([dense_answers(model, part, judge) for part in images.split(SCORED)])
        self.count_views(len(images), "reading the dense model's answers")

    def count_views(self, images: int, text: str) -> None:
        """Count processed images; `text` describes the work, for progress."""
        self.views += images

    @torch.inference_mode()
    def run(self, shape: Shape, share: float, part: slice, text: str) -> Calibrated:
        """Calibrate on a slice of the images."""
        thresholds = thresholds_of(self.model)
        with record() as calls:
            answers = follow(self.model, self.images[part], shape, share, self.geometry, self.judge, self.every)
        self.count_views(len(answers), text)
        divergence = self.judge.divergence(answers, self.answers[part]).clamp_min(0).sqrt().mean()
        merge, prune = thresholds.merge.detach().clone(), thresholds.prune.detach().clone()
        return Calibrated(float(calls.share().mean()), float(divergence), merge, prune, calls.kept[0].mean(0))

    def score(self, shape: Shape, share: float, part: slice) -> float:
        """Log root divergence, corrected for a cost other than requested; lower is better."""
        row = self.run(shape, share, part, f"searching at {share:.2f}")
        return math.log(max(row.divergence, 1e-9)) + DIVERGENCE_SLOPE * (row.share - share)

    def candidates(self, share: float) -> tuple[Shape, ...]:
        """Shapes to start from: the default, and the same without pruning."""
        merges_and_prunes = {"merge", "prune"} <= {*thresholds_of(self.model).config.steps}
        default = self.default_shape(share)
        return (default, default.without_pruning()) if merges_and_prunes else (default,)

    def passes(self, shares: int) -> int:
        """Passes over the scored images that `choose_starts` takes for this many shares."""
        return shares * len(thresholds_of(self.model).config.scores.choices) * len(self.candidates(0.5))

    def choose_starts(self, shares: list[float]) -> dict[float, Shape]:
        """Choose what merged tokens count as, set it, and return the shape to start from at each share.

        Anything but the default must score better by `MARGIN`.
        """
        thresholds = thresholds_of(self.model)
        default, *alternatives = (self._comparison(scores, shares) for scores in thresholds.config.scores.choices)
        chosen = next((other for other in alternatives if other.beats(default)), default)
        # rank 0's, because different hardware may round differently
        scores, starts = exchange((chosen.scores, chosen.starts()))[0]
        thresholds.config = replace(thresholds.config, scores=scores)
        return {share: self.candidates(share)[start] for share, start in zip(shares, starts, strict=True)}

    def _comparison(self, scores: Scores, shares: list[float]) -> _Comparison:
        thresholds, part = thresholds_of(self.model), slice(0, SCORED)
        thresholds.config = replace(thresholds.config, scores=scores)
        return _Comparison(
            scores, [[self.score(shape, share, part) for shape in self.candidates(share)] for share in shares]
        )


@dataclass(frozen=True)
class _Comparison:
    """The candidates at each share, compared with one setting of what merged tokens count as.

    Attributes:
        scores: the setting.
        values: for each share the score of each candidate, the default first.
    """

    scores: Scores
    values: list[list[float]]

    def starts(self) -> list[int]:
        """Index of the candidate to take at each share."""
        return [int(min(others, default=default) < default - MARGIN) for default, *others in self.values]

    def beats(self, other: _Comparison) -> bool:
        """Whether this setting is clearly better at every share."""
        return all(min(ours) < min(theirs) - MARGIN for ours, theirs in zip(self.values, other.values, strict=True))


def start_state(thresholds: Thresholds, views: int) -> dict[str, Any]:
    """What the images settled before learning began, for the run's checkpoint; it took `views` images."""
    return {"size_power": thresholds.config.scores.size_power, "probe": thresholds.probe, "views": views}


def restore_start(thresholds: Thresholds, saved: dict[str, Any]) -> int:
    """Set what `start_state` saved, and return the number of images it took.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    choices = {choice.size_power: choice for choice in thresholds.config.scores.choices}
    if (saved["probe"] is None) == thresholds.config.needs_probe:
        raise ValueError("probe")
    thresholds.config = replace(thresholds.config, scores=choices[saved["size_power"]])
    thresholds.set_probe(saved["probe"])
    return int(saved["views"])
