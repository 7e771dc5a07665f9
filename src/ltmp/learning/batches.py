"""What learning looks at: some images to keep apart, then endless batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data import Loader
from ..distributed import rank, world
from ..errors import LTMPError
from .heldout import Progress

Batch = Any
"""Images [B, C, H, W] alone, or with labels and whatever else behind them, or a dictionary; see `split`."""

_IMAGES = ("pixel_values", "images", "image", "inputs")
_LABELS = ("labels", "label", "targets", "target")


def split(batch: Batch) -> tuple[Tensor, Any]:
    """The images of a batch and its labels, None where it has none.

    Args:
        batch: images, a tuple or list that begins with images and labels, or a dictionary (or what transformers'
            collators make) with `pixel_values` or `images`, and `labels`.

    Raises:
        LTMPError: it holds no images.
    """
    images: Any = None
    labels: Any = None
    if isinstance(batch, Mapping):
        images, labels = (next((batch[name] for name in names if name in batch), None) for names in (_IMAGES, _LABELS))
    elif isinstance(batch, tuple | list):
        images, labels = (*batch, None, None)[:2]
    else:
        images = batch
    if not isinstance(images, Tensor):
        raise LTMPError(
            f"a batch is a {type(batch).__name__} without images: expected images [B, C, H, W], a pair of images and "
            "labels, or a dictionary with pixel_values and labels"
        )
    return images, labels


def first(loader: Iterable[Batch], count: int, progress: Progress | None = None) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of the loader and their labels, or all where there are fewer.

    Returns:
        [N, 3, H, W], and labels [N] or [N, K], or None where the loader gives something else.

    Raises:
        LTMPError: there are none, or fewer than ranks, or one holds NaN or infinity.
    """
    found: list[Tensor] = []
    known: list[Tensor] = []
    have = 0
    expected = min(count, getattr(loader, "images", 0) or count)
    for images, labels in map(split, loader):
        if not images.isfinite().all():
            raise LTMPError("an image holds NaN or infinity: check the data and its normalisation")
        found.append(images)
        if isinstance(labels, Tensor):
            known.append(labels)
        have += len(images)
        if progress is not None:
            progress(min(have, expected), expected, "reading images to calibrate on")
        if have >= count:
            break
    if not found:
        raise LTMPError("there are no images to learn from: the loader is empty")
    if have < world():
        raise LTMPError(f"{have} images are too few to share among {world()} ranks: start fewer")
    return torch.cat(found)[:count], torch.cat(known)[:count] if len(known) == len(found) else None


def count(loader: Iterable[Batch]) -> int:
    """Images in one pass; 0 where a streaming source does not say."""
    if isinstance(loader, Loader):
        return loader.images
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else sum(len(split(batch)[0]) for batch in loader)


def apart(loader: Iterable[Batch], kept: int) -> int:
    """How many images at the loader's beginning nothing else learns from, where `kept` are judged on.

    None of them where less than half would be left: of so few, all are needed.
    """
    return kept if count(loader) >= 2 * kept else 0


def stream(loader: Iterable[Batch], done: int, batch: int) -> Iterator[tuple[Tensor, Any]]:
    """This rank's endless batches, from those after the first `done` of all ranks."""
    if isinstance(loader, Loader):
        return loader.stream(done * batch, 1 << 62, rank(), world())
    return map(split, islice(_again(loader), done + rank(), None, world()))


def _again(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise LTMPError("the loader is used up after one pass: give one that can be iterated again and again")
