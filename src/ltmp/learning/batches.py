"""Batches to learn from: the first images, which are held out, then an endless stream."""

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
"""A loader's batch: (images, labels, ...), a mapping with images and labels, or images alone; see `unpack`."""

_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")


def unpack(batch: Batch) -> tuple[Images, Tensor | None]:
    """Images [B, 3, H, W] and labels of a batch; labels are None if the batch has no tensor of them.

    Args:
        batch: (images, labels, ...), of which the rest is ignored; images alone; a mapping, as in transformers and
            datasets, with images under `pixel_values`, `images` or `image` and labels under `labels` or `label`; or the
            output of a processor, whose tensors become keyword inputs of the model.

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
    return getattr(loader, "batch_size", None) or len(unpack(next(iter(loader)))[0])


def first_images(loader: Iterable[Batch], count: int, progress: Progress | None = None) -> tuple[Images, Tensor | None]:
    """The first `count` images of the loader, or all if there are fewer, and their labels.

    Returns:
        Images [N, 3, H, W], and labels [N, ...], or None if the loader has none.

    Raises:
        LTMPError: there are no images, fewer than ranks, or one that holds NaN or infinity.
    """
    parts: list[Images] = []
    label_parts: list[Tensor] = []
    read = 0
    expected = min(count, getattr(loader, "images", 0) or count)
    for images, labels in map(unpack, loader):
        if not pixels_of(images).isfinite().all():
            raise LTMPError("an image holds NaN or infinity: check the data and its normalisation")
        parts.append(images)
        if labels is not None:
            label_parts.append(labels)
        read += len(images)
        if progress is not None:
            progress(min(read, expected), expected, "reading images to calibrate on")
        if read >= count:
            break
    if not parts:
        raise LTMPError("there are no images to learn from: the loader is empty")
    if read < world():
        raise LTMPError(f"{read} images are too few to share among {world()} ranks: start fewer")
    return joined(parts)[:count], torch.cat(label_parts)[:count] if len(label_parts) == len(parts) else None


def loader_metadata(model: nn.Module, loader: Any) -> dict[str, Any]:
    """A loader's class names and preprocessing, as `ltmp.save` stores them."""
    dataset = getattr(loader, "dataset", None)
    # even if the run ignores labels
    names = folder_names(dataset)
    settings = getattr(getattr(dataset, "transform", None), "settings", None)
    return {"class_names": names if len(names) == classes_of(model) else None, "preprocessing": settings}


def image_count(loader: Iterable[Batch]) -> int:
    """Images in one pass; 0 for a streaming source of unknown length."""
    if isinstance(loader, Loader):
        return loader.images
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else sum(len(images) for images, _ in map(unpack, loader))


def held_out_count(loader: Iterable[Batch], count: int) -> int:
    """How many images at the beginning are not learned from: `count`, or 0 if that would leave less than half."""
    return count if image_count(loader) >= 2 * count else 0


def stream(loader: Iterable[Batch], done: int, batch: int) -> Iterator[tuple[Images, Tensor | None]]:
    """This rank's endless batches of `batch` images, after the first `done` batches of all ranks."""
    if isinstance(loader, Loader):
        return map(unpack, loader.stream(done * batch, 1 << 62, rank(), world()))
    return map(unpack, islice(_repeated(loader), done + rank(), None, world()))


def _repeated(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise LTMPError("the loader is used up after one pass: give one that can be iterated again and again")


def watched(seen: Seen, batches: Iterable[tuple[Images, Tensor | None]]) -> Iterator[tuple[Images, Tensor | None]]:
    """The batches (images, labels); the images of each are added to `seen` as it is handed on."""
    for images, labels in batches:
        seen.add(pixels_of(images))
        yield images, labels
