"""Predictions that differ between the dense and the reduced model, by image and by class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluate import ImageRows


@dataclass(frozen=True)
class ClassChange:
    """A class, the number of its images, and how many of them each model classifies correctly."""

    label: int
    images: int
    dense: int
    reduced: int

    @property
    def gain(self) -> int:
        return self.reduced - self.dense


@dataclass(frozen=True)
class Changes:
    """How predictions change at a budget.

    Attributes:
        flipped: indices of the images whose prediction changed: first from right to wrong, then from wrong to right,
            then the others.
        repaired, broken, other: number of predictions that went from wrong to right, from right to wrong, or from wrong
            to wrong.
        lost, gained: classes with the largest losses and gains, largest first.
        moves: (label, dense prediction, reduced prediction) and their counts, most frequent first.
    """

    flipped: list[int]
    repaired: int
    broken: int
    other: int
    lost: list[ClassChange]
    gained: list[ClassChange]
    moves: list[tuple[tuple[int, int, int], int]]


def find_changes(rows: ImageRows, limit: int = 8) -> Changes:
    """Compare the predictions of the two models. Without labels, no prediction counts as right.

    Args:
        rows: one row per image.
        limit: maximum number of classes and of moves in each list.
    """
    dense_right, reduced_right = rows.dense == rows.label, rows.reduced == rows.label
    flipped = rows.dense != rows.reduced
    repaired, broken = flipped & reduced_right, flipped & dense_right
    order = torch.cat([part.nonzero()[:, 0] for part in (broken, repaired, flipped & ~broken & ~repaired)])
    classes = sorted(_class_changes(rows.label, dense_right, reduced_right), key=lambda change: change.gain)
    triples = torch.stack([rows.label, rows.dense, rows.reduced], 1)[flipped].tolist()
    moves = Counter((label, before, after) for label, before, after in triples)
    return Changes(
        flipped=order.tolist(),
        repaired=int(repaired.sum()),
        broken=int(broken.sum()),
        other=int(flipped.sum() - repaired.sum() - broken.sum()),
        lost=[change for change in classes if change.gain < 0][:limit],
        gained=[change for change in reversed(classes) if change.gain > 0][:limit],
        moves=moves.most_common(limit),
    )


def _class_changes(label: Tensor, dense_right: Tensor, reduced_right: Tensor) -> list[ClassChange]:
    """The changes of all classes that have images."""
    labelled = label >= 0
    label = label[labelled]
    images, dense, reduced = (
        torch.bincount(label, weights=right[labelled].double()).long().tolist()
        for right in (torch.ones_like(labelled), dense_right, reduced_right)
    )
    counts = zip(images, dense, reduced, strict=True)
    return [ClassChange(number, *values) for number, values in enumerate(counts) if values[0]]
