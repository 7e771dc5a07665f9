"""Batches to learn from: the first images, which are kept apart, then endless ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.describe import classes_of
from ..data import Loader
from ..data.names import folder_names
from ..distributed import rank, world
from ..errors import LTMPError
from ..fingerprint import Seen
from .inputs import Images, joined, pixels_of, processed
from .progress import Progress

Batch = Sequence[Any] | Mapping[str, Any] | Tensor
"""A batch of a loader: (images, labels, ...), a mapping with images and labels, or images alone; see `pair`."""

_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")


def pair(batch: Batch) -> tuple[Images, Tensor | None]:
    """Images [B, 3, H, W] and labels of a batch, None where it has no tensor of labels.

    Args:
        batch: (images, labels), of which more is ignored; images alone; or a mapping, as transformers and datasets have
            them, with images under `pixel_values`, `images` or `image` and labels under `labels` or `label`; or what a
            processor returned, whose tensors go to the model under their names.

    Raises:
        LTMPError: there are no images in it, or not as floating-point numbers.
    """
    images: Any = batch
    labels: Any = None
    if isinstance(batch, Mapping):
        keywords = processed(batch)
        if keywords is not None:
            return keywords, None
        images, labels = (next((batch[n] for n in names if n in batch), None) for names in (_IMAGES, _LABELS))
    elif not isinstance(batch, Tensor) and isinstance(batch, Sequence):
        images, labels = (*batch, None, None)[:2]
    if not isinstance(images, Tensor):
        held = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise LTMPError(
            f"a batch of the loader is {held} without a tensor of images: expected (images, labels), images "
            f"[B, 3, H, W] alone, or a dict with {_IMAGES[0]} and {_LABELS[0]}"
        )
    if images.ndim < 4 or not images.is_floating_point():
        raise LTMPError(
            f"the images of a batch are {images.dtype} {list(images.shape)}: expected floating-point numbers "
            "[B, 3, H, W], resized and normalised for the model"
        )
    return images, labels if isinstance(labels, Tensor) else None


def batch_size(loader: Iterable[Batch]) -> int:
    """Images in a batch of the loader."""
    return getattr(loader, "batch_size", None) or len(pair(next(iter(loader)))[0])


def first(loader: Iterable[Batch], count: int, progress: Progress | None = None) -> tuple[Images, Tensor | None]:
    """The first `count` images of the loader and their labels, or all where there are fewer.

    Returns:
        [N, 3, H, W], and [N, ...], or None where the loader has no labels.

    Raises:
        LTMPError: there are none, or fewer than ranks, or one holds NaN or infinity.
    """
    found: list[Images] = []
    known: list[Tensor] = []
    have = 0
    expected = min(count, getattr(loader, "images", 0) or count)
    for images, labels in map(pair, loader):
        if not pixels_of(images).isfinite().all():
            raise LTMPError("an image holds NaN or infinity: check the data and its normalisation")
        found.append(images)
        if labels is not None:
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
    return joined(found)[:count], torch.cat(known)[:count] if len(known) == len(found) else None


def described(model: nn.Module, loader: Any) -> dict[str, Any]:
    """A loader's class names and preprocessing, as `ltmp.save` keeps them."""
    dataset = getattr(loader, "dataset", None)
    # also where their labels are not looked at
    names = folder_names(dataset)
    settings = getattr(getattr(dataset, "transform", None), "settings", None)
    return {"class_names": names if len(names) == classes_of(model) else None, "preprocessing": settings}


def count(loader: Iterable[Batch]) -> int:
    """Images in one pass; 0 for a streaming source of unknown length."""
    if isinstance(loader, Loader):
        return loader.images
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else sum(len(images) for images, _ in map(pair, loader))


def apart(loader: Iterable[Batch], kept: int) -> int:
    """Images at the beginning that are only judged on: `kept`, or 0 if less than half of all would be left."""
    return kept if count(loader) >= 2 * kept else 0


def stream(loader: Iterable[Batch], done: int, batch: int) -> Iterator[tuple[Images, Tensor | None]]:
    """This rank's endless batches, from those after the first `done` of all ranks."""
    if isinstance(loader, Loader):
        return map(pair, loader.stream(done * batch, 1 << 62, rank(), world()))
    return map(pair, islice(_again(loader), done + rank(), None, world()))


def watched(seen: Seen, batches: Iterable[tuple[Images, Tensor | None]]) -> Iterator[tuple[Images, Tensor | None]]:
    """The batches (images, labels), remembered when they are handed on."""
    for images, labels in batches:
        seen.add(pixels_of(images))
        yield images, labels


def _again(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise LTMPError("the loader is used up after one pass: give one that can be iterated again and again")
