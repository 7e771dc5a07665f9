"""What learning looks at: some images to keep apart, then endless batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import LTMPError
from .heldout import Progress

Batch = tuple[Tensor, Tensor]


def first_images(loader: Iterable[Batch], count: int, progress: Progress | None = None) -> Tensor:
    """The first `count` images of the loader, or all where there are fewer.

    Raises:
        LTMPError: there are none, or one holds NaN or infinity.
    """
    found: list[Tensor] = []
    have = 0
    for images, _ in loader:
        if not images.isfinite().all():
            raise LTMPError("an image holds NaN or infinity: check the data and its normalisation")
        found.append(images)
        have += len(images)
        if progress is not None:
            progress(min(have, count), count, "reading images to calibrate on")
        if have >= count:
            break
    if not found:
        raise LTMPError("there are no images to learn from: the loader is empty")
    return torch.cat(found)[:count]


def stream(loader: Iterable[Batch], done: int, batch: int) -> Iterator[Batch]:
    """Endless batches, from the one after `done`."""
    endless = getattr(loader, "stream", None)
    if endless is not None:
        return endless(done * batch, 1 << 62)

    def again() -> Iterator[Batch]:
        skip = done
        while True:
            for item in loader:
                if skip:
                    skip -= 1
                else:
                    yield item

    return again()
