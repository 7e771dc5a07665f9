"""A few images of a dataset that stand for all of it."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .dataset import Images


def sampled(images: Images, limit: int, seed: int = 0) -> Images:
    """At most `limit` images, as evenly over their classes as these allow, in the order that they had.

    Which ones depends on the seed alone. The first `limit` of a folder would be those of its first classes.
    """
    if limit >= len(images):
        return images
    few = copy.copy(images)
    few.source = _Few(images.source, _chosen(_labels(images.source), limit, seed))
    return few


def _chosen(labels: Sequence[int], limit: int, seed: int) -> list[int]:
    """Positions of `limit` labels: one of each class in turn, at random within a class."""
    draw = random.Random(seed)
    classes: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        classes[label].append(position)
    turns = list(classes.values())
    draw.shuffle(turns)
    for positions in turns:
        draw.shuffle(positions)
    # the i-th of every class comes before the next of any
    in_turn = sorted((i, k, position) for k, turn in enumerate(turns) for i, position in enumerate(turn))
    return sorted(position for _, _, position in in_turn[:limit])


def _labels(source: Any) -> Sequence[int]:
    """Of each image, without reading it; all the same where the source does not say."""
    for name in ("labels", "targets"):
        if getattr(source, name, None) is not None:
            return [int(label) for label in getattr(source, name)]
    samples = getattr(source, "samples", None)
    return [0] * len(source) if samples is None else [int(sample[1]) for sample in samples]


class _Few:
    """Some images of a reader or dataset, which says everything else itself."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]

    def filename(self, index: int, **how: Any) -> str | None:
        """Where an image comes from, if the source says so."""
        named = getattr(self.source, "filename", None)
        return named(self.indices[index], **how) if named else None
