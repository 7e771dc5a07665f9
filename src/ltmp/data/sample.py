"""A few images of a dataset that stand for all of it."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .dataset import Images, log


def sampled(
    images: Images | IterableDataset, limit: int, seed: int = 0, *, evenly: bool = True
) -> Images | IterableDataset:
    """At most `limit` images, in the order that they had.

    Which ones depends on the seed alone. The first `limit` of a folder would be those of its first classes; of a
    source that streams they are taken all the same, and a warning says so.

    Args:
        evenly: as evenly over the classes as these allow; otherwise all images are drawn alike.
    """
    if isinstance(images, IterableDataset):
        log.warning("the source streams, so the first %d images are taken: they need not be of all classes", limit)
        return _First(images, limit)
    if limit >= len(images):
        return images
    labels = _labels(images.source) if evenly else [0] * len(images)
    few = copy.copy(images)
    few.source = _Few(images.source, _chosen(labels, limit, seed))
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


class _First(IterableDataset):
    """The first images of each pass of a source that streams, which says everything else itself."""

    def __init__(self, source: IterableDataset, limit: int) -> None:
        self.source = source
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(iter(self.source), self.limit // count + (number < self.limit % count))

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # not there before a copy has its state
            raise AttributeError(name)
        return getattr(self.source, name)
