"""Batches in an order that depends on the seed and the position alone, so that a killed run can go on exactly."""

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
from .workers import handed_over, naming_lost_workers, received, start_worker


class ViewOrder(Sampler[int]):
    """Dataset indices of the views `start` to `stop`; view v is image v % N of epoch v // N.

    Each epoch has its own shuffle, a function of (seed, epoch).
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
    """Iterates over (images [B, C, H, W], labels [B]); `skipped` says afterwards which images could not be read.

    Iterating goes once through the dataset; `stream` gives any range of views of the endless sequence of epochs.
    A batch that had broken images is smaller by them.
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
        """Batches in one pass."""
        return -(-self.images // self.batch_size)

    @property
    def images(self) -> int:
        """Images in one pass, broken ones included; 0 where a streaming source does not say."""
        return len(self.dataset) if hasattr(self.dataset, "__len__") else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset, IterableDataset):
            return self._take(self._batches(self.dataset))
        return self.stream(0, self.images)

    def stream(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the views `start` to `stop`, whatever was iterated before; of `world` turns, those of `rank`.

        A streaming source is read from its beginning and the batches before `start` are dropped; a short last batch
        of an epoch counts as a whole one, so that batch b begins at view b * batch_size there, too.
        """
        if isinstance(self.dataset, IterableDataset):
            batches: Iterable[_Batch] = islice(self._stream(self.dataset, start, stop), rank, None, world)
        else:
            order = ViewOrder(self.images, start, stop, shuffle=self.shuffle, seed=self.seed)
            turns = islice(BatchSampler(order, self.batch_size, drop_last=False), rank, None, world)
            batches = self._batches(self.dataset, turns)
        return self._take(batches, whole=world == 1)

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
                raise LTMPError("the streaming dataset gave no images: check its name and split")
            epoch += 1

    def _batches(self, dataset: Dataset, batches: Iterable[list[int]] | None = None) -> DataLoader:
        return DataLoader(
            dataset,
            1 if batches else self.batch_size,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: starting the workers must not move the global random state of the run.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _take(self, batches: Iterable[_Batch], whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Hand on what could be read; refuse or count the rest. `whole`: nobody else has more of these images."""
        found = False
        for batch in _unless_lost(batches):
            for broken in batch.broken:
                if self.strict:
                    raise LTMPError(
                        f"{broken.name} cannot be read ({broken.reason}): repair or remove it, or run without strict"
                    )
                self.skipped[broken.name] = broken.reason
            if len(batch.broken) < batch.size:
                found = True
                yield received(batch.images), received(batch.labels)
        if whole and not found and self.skipped:
            name, why = next(iter(self.skipped.items()))
            raise LTMPError(f"none of the {len(self.skipped)} images could be read; the first was {name} ({why})")


def _unless_lost(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches; only what goes wrong in getting them is a lost worker, not what is done with them."""
    with naming_lost_workers():
        waiting = iter(batches)
    while True:
        with naming_lost_workers():
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch


class _Batch(NamedTuple):
    images: Tensor | np.ndarray
    labels: Tensor | np.ndarray
    broken: list[Broken]
    size: int


def _collate(samples: list[Any]) -> _Batch:
    """Runs in the worker: broken images travel beside the batch, because a worker's counters stay there."""
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    readable = [sample for sample in samples if not isinstance(sample, Broken)]
    if readable and all(isinstance(image, Tensor) for image, _ in readable):
        # default_collate would take shared memory without asking whether there is any
        images, labels = (
            torch.stack([image for image, _ in readable]),
            torch.as_tensor([label for _, label in readable]),
        )
    else:
        images, labels = default_collate(readable) if readable else (torch.empty(0), torch.empty(0))
    return _Batch(handed_over(images), handed_over(labels), broken, len(samples))


make_loader = Loader
"""Broken images are skipped and counted, or with `strict` refused by name (LTMPError)."""
