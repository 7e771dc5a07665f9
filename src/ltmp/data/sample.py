"""A representative sample of a dataset."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .dataset import Images, log


def subsample(
    images: Images | IterableDataset, limit: int, seed: int = 0, *, evenly: bool = True
) -> Images | IterableDataset:
    """Return a dataset of at most `limit` images, in their original order.

    The choice depends on the seed alone. The first `limit` images of a folder would all be of its first classes; from
    a streaming source the first ones are taken nevertheless, with a warning.

    Args:
        evenly: sample as evenly across classes as their sizes allow; otherwise every image is equally likely.
    """
    if isinstance(images, IterableDataset):
        log.warning("streaming source: the first %d images are taken, which may not cover all classes", limit)
        return _First(images, limit)
    if limit >= len(images):
        return images
    labels = _labels(images.source) if evenly else [0] * len(images)
    sample = copy.copy(images)
    sample.source = _Subset(images.source, _choose(labels, limit, seed))
    return sample


def _labels(source: Any) -> Sequence[int]:
    """Return the label of each image without reading it, or all zeros if the source does not list labels."""
    for name in ("labels", "targets"):
        if getattr(source, name, None) is not None:
            return [int(label) for label in getattr(source, name)]
    samples = getattr(source, "samples", None)
    return [0] * len(source) if samples is None else [int(sample[1]) for sample in samples]


def _choose(labels: Sequence[int], limit: int, seed: int) -> list[int]:
    """Choose `limit` positions round-robin over the classes, at random within each class; return them sorted."""
    draw = random.Random(seed)
    classes: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        classes[label].append(position)
    groups = list(classes.values())
    draw.shuffle(groups)
    for positions in groups:
        draw.shuffle(positions)
    # Sorted by round first: the i-th image of every class comes before the next image of any class.
    rounds = sorted((i, k, position) for k, group in enumerate(groups) for i, position in enumerate(group))
    return sorted(position for _, _, position in rounds[:limit])


class _Subset:
    """Some images of a timm reader or torchvision dataset."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]

    def filename(self, index: int, **kwargs: Any) -> str | None:
        """Return the source's name of an image, if it has one."""
        filename = getattr(self.source, "filename", None)
        return filename(self.indices[index], **kwargs) if filename else None


class _First(IterableDataset):
    """The first images of each pass over a streaming dataset; other attributes are those of the dataset."""

    def __init__(self, source: IterableDataset, limit: int) -> None:
        self.source = source
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        rank, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(iter(self.source), self.limit // count + (rank < self.limit % count))

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # not set yet while a copy is being restored
            raise AttributeError(name)
        return getattr(self.source, name)
