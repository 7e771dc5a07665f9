"""Batches in an order that depends on seed and position alone, so that a killed run can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, default_collate

from ..errors import LTMPError, UsageError
from .dataset import Broken
from .workers import detect_lost_workers, pack_batch, start_worker, unpack_batch


class ViewOrder(Sampler[int]):
    """Dataset indices of views `start` to `stop`; view v is image v % N of epoch v // N.

    Each epoch has its own permutation, a function of (seed, epoch).
    """

    def __init__(self, length: int, start: int, stop: int, *, shuffle: bool, seed: int) -> None:
        self.length = length
        self.views = range(start, stop)
        self.shuffle = shuffle
        self.seed = seed

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, range(0)
        for view in self.views:
            if view // self.length != epoch:
                epoch = view // self.length
                order = self._order(epoch)
            yield order[view % self.length]

    def _order(self, epoch: int) -> Any:
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.length, generator=generator).tolist()


class Loader:
    """Iterate over (images [B, C, H, W], labels [B]) of a dataset, skipping images that cannot be read.

    Iterating makes one pass over the dataset; `stream` returns any range of views of an endless sequence of epochs.
    Broken images are left out of their batches, which become smaller.

    Args:
        dataset: map-style or iterable dataset of (image, label) or `Broken`, such as `Images`.
        batch_size: images per batch.
        shuffle: whether to permute the images in each epoch; without effect on a streaming source.
        seed: seed of the permutations.
        workers: number of worker processes; 0 reads in the main process.
        strict: raise LTMPError with the name of a broken image instead of skipping it.

    Attributes:
        skipped: the images that could not be read so far, by name, with the reason.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        strict: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch size is {batch_size}: expected at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers
        self.strict = strict
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of batches in one pass."""
        return -(-self.images // self.batch_size)

    @property
    def images(self) -> int:
        """Number of images in one pass, including broken ones; 0 for a streaming source of unknown length."""
        return len(self.dataset) if hasattr(self.dataset, "__len__") else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset, IterableDataset):
            return self._take(self._batches(self.dataset))
        return self.stream(0, self.images)

    def stream(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of views `start` to `stop`, independently of earlier iteration.

        In distributed runs, each of `world` ranks gets every `world`-th batch, starting with batch `rank`.

        A streaming source is read from its beginning and the batches before `start` are dropped. The short last batch
        of its epochs counts as a full one, so that batch b always begins at view b * batch_size.
        """
        if isinstance(self.dataset, IterableDataset):
            batches: Iterable[_Batch] = islice(self._stream(self.dataset, start, stop), rank, None, world)
        else:
            order = ViewOrder(self.images, start, stop, shuffle=self.shuffle, seed=self.seed)
            indices = islice(BatchSampler(order, self.batch_size, drop_last=False), rank, None, world)
            batches = self._batches(self.dataset, indices)
        return self._take(batches, check_empty=world == 1)

    def _stream(self, dataset: IterableDataset, start: int, stop: int) -> Iterator[_Batch]:
        view, epoch = 0, 0
        while view < stop:
            before = view
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            for batch in self._batches(dataset):
                if view >= start:
                    yield batch
                view += self.batch_size
                if view >= stop:
                    return
            if view == before:
                raise LTMPError("the streaming dataset returned no images: check its name and split")
            epoch += 1

    def _batches(self, dataset: Dataset, indices: Iterable[list[int]] | None = None) -> DataLoader:
        return DataLoader(
            dataset,
            1 if indices else self.batch_size,
            batch_sampler=indices,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: starting workers must not advance the global random state of the run.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _take(self, batches: Iterable[_Batch], check_empty: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images that could be read; record broken ones in `skipped`, or raise with `strict`.

        Args:
            check_empty: raise LTMPError if no image at all could be read; not if other ranks have more of the images.
        """
        any_read = False
        for batch in _unless_lost(batches):
            for broken in batch.broken:
                if self.strict:
                    raise LTMPError(
                        f"{broken.name} cannot be read ({broken.reason}): repair or remove it, or run without strict"
                    )
                self.skipped[broken.name] = broken.reason
            if len(batch.broken) < batch.size:
                any_read = True
                yield unpack_batch(batch.images), unpack_batch(batch.labels)
        if check_empty and not any_read and self.skipped:
            name, reason = next(iter(self.skipped.items()))
            raise LTMPError(f"none of the {len(self.skipped)} images could be read; the first was {name} ({reason})")


def _unless_lost(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """Yield the batches; raise LostWorkerError for errors in reading them, but not for those of the caller's code."""
    with detect_lost_workers():
        iterator = iter(batches)
    while True:
        with detect_lost_workers():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class _Batch(NamedTuple):
    images: Tensor | np.ndarray
    labels: Tensor | np.ndarray
    broken: list[Broken]
    size: int


def _collate(samples: list[Any]) -> _Batch:
    """Collate in the worker; broken images are part of the batch, as counters in a worker never leave it."""
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    readable = [sample for sample in samples if not isinstance(sample, Broken)]
    if readable and all(isinstance(image, Tensor) for image, _ in readable):
        # default_collate would use shared memory without checking that there is enough.
        images = torch.stack([image for image, _ in readable])
        labels = torch.as_tensor([label for _, label in readable])
    elif readable:
        images, labels = default_collate(readable)
    else:
        images, labels = torch.empty(0), torch.empty(0)
    return _Batch(pack_batch(images), pack_batch(labels), broken, len(samples))


make_loader = Loader
"""Alias of `Loader`. Broken images are skipped and counted, or with `strict` raise LTMPError with their name."""
