"""Which answers changed between the dense and the reduced model, and for which classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluate import ImageRows


@dataclass(frozen=True)
class ClassChange:
    """A class, its images, and how many of them each model names rightly."""

    label: int
    images: int
    dense: int
    reduced: int

    @property
    def gain(self) -> int:
        return self.reduced - self.dense


@dataclass(frozen=True)
class Changes:
    """The changes that a budget makes.

    Attributes:
        flipped: image indices whose answer is another one, those that were right before first.
        repaired, broken, other: how many of them went from wrong to right, from right to wrong, or stayed wrong.
        lost, gained: classes with the largest losses and gains, largest first.
        moves: (label, dense answer, reduced answer) and how often, most often first.
    """

    flipped: list[int]
    repaired: int
    broken: int
    other: int
    lost: list[ClassChange]
    gained: list[ClassChange]
    moves: list[tuple[tuple[int, int, int], int]]


def find_changes(rows: ImageRows, most: int = 8) -> Changes:
    """Compare the two models' answers; lists hold at most `most` classes or moves. Without labels nothing is right."""
    dense_right, reduced_right = rows.dense == rows.label, rows.reduced == rows.label
    flipped = rows.dense != rows.reduced
    repaired, broken = flipped & reduced_right, flipped & dense_right
    order = torch.cat([part.nonzero()[:, 0] for part in (broken, repaired, flipped & ~broken & ~repaired)])
    classes = sorted(_class_changes(rows.label, dense_right, reduced_right), key=lambda one: one.gain)
    triples = torch.stack([rows.label, rows.dense, rows.reduced], 1)[flipped].tolist()
    moves = Counter((label, before, after) for label, before, after in triples)
    return Changes(
        flipped=order.tolist(),
        repaired=int(repaired.sum()),
        broken=int(broken.sum()),
        other=int(flipped.sum() - repaired.sum() - broken.sum()),
        lost=[one for one in classes if one.gain < 0][:most],
        gained=[one for one in reversed(classes) if one.gain > 0][:most],
        moves=moves.most_common(most),
    )


def _class_changes(label: Tensor, dense_right: Tensor, reduced_right: Tensor) -> list[ClassChange]:
    there = label >= 0
    label = label[there]
    images, dense, reduced = (
        torch.bincount(label, weights=right[there].double()).long().tolist()
        for right in (torch.ones_like(there), dense_right, reduced_right)
    )
    counts = zip(images, dense, reduced, strict=True)
    return [ClassChange(number, *values) for number, values in enumerate(counts) if values[0]]
