"""From shards to batches: processes decode ahead, and a batch never mixes shards, so that it is the same in any run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from time import sleep
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import Broken
from ..data.dataset import Transform
from ..data.images import decode, reason
from ..data.tars import read_content
from ..errors import LTMPError
from .shards import Item, Shard

SIGNAL_WITHIN = 1.0
"""Seconds in which the signal of a killed process comes after whatever else shows that it is gone."""


class LostWorkerError(LTMPError):
    """A process that decodes was killed; nothing is wrong with the images."""


class Unreadable(NamedTuple):
    """An image that could not be read, as it is listed."""

    row: int
    key: str
    reason: str


@dataclass
class Batch:
    """Consecutive images of one shard.

    Attributes:
        images: [B, C, H, W]; `rows` and `keys` say which.
        broken: those among them that could not be read.
        position: share of the shard that this batch ends at.
    """

    images: Tensor
    rows: list[int]
    keys: list[str]
    broken: list[Unreadable]
    position: float

    def pin_memory(self) -> Batch:
        """What torch's DataLoader calls for a copy to a GPU that waits for nothing."""
        self.images = self.images.pin_memory()
        return self


@dataclass(frozen=True)
class End:
    """Stands behind the last batch of a shard."""

    shard: Shard


@dataclass
class Decoder(Dataset):
    """Images by their `Item`; gives (item, transformed image), or (item, `Broken`)."""

    transform: Transform
    mode: str

    def __getitem__(self, item: Item | End) -> tuple[Item, Any] | End:
        if isinstance(item, End) or isinstance(item.content, Broken):
            return item if isinstance(item, End) else (item, item.content)
        try:
            return item, self.transform(decode(BytesIO(read_content(item.content)), self.mode))
        # Decoders fail in many ways on damaged bytes; each means that this image cannot be read.
        except Exception as error:
            return item, Broken(item.key, reason(error))


class Plan:
    """Batches of items, shard by shard, an `End` behind each shard; read while earlier batches are being decoded."""

    def __init__(self, shards: Iterable[Shard], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Item | End]]:
        for shard in self.shards:
            batch: list[Item | End] = []
            for item in shard.items():
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
            yield [End(shard)]


def read_batches(
    shards: Iterable[Shard], transform: Transform, *, mode: str, batch_size: int, workers: int, pin_memory: bool = False
) -> Iterable[Batch | End]:
    """Batches of all shards in order, each shard's followed by its `End`.

    Args:
        transform: from the decoded image to [C, H, W].
        mode: "RGB" or "L".
        workers: processes that decode ahead; 0 decodes in this one.
    """
    return DataLoader(
        Decoder(transform, mode),
        batch_sampler=Plan(shards, batch_size),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_quiet,
    )


def _quiet(_worker: int) -> None:
    """Torch hands errors of a decoding process on itself; what this hook would print is that a stopped run is gone."""
    sys.excepthook = lambda *_: None


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Around the use of `read_batches`: torch tells of a killed process by a signal, wherever this one just is.

    Or a tensor that is being handed over ends in the middle, or the socket that it should come through is gone.

    Raises:
        LostWorkerError: one was killed.
    """
    try:
        try:
            yield
        except (EOFError, ConnectionError, FileNotFoundError):
            # What a death breaks may show before its signal: left to come later, that would raise in code elsewhere.
            sleep(SIGNAL_WITHIN)
            raise
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise LostWorkerError(
            "a process that decodes images was killed, for lack of memory perhaps: the same command goes on, if it "
            "happens again with fewer --workers or a smaller --batch-size"
        ) from error


def _collate(samples: list[Any]) -> Batch | End:
    if isinstance(samples[0], End):
        return samples[0]
    good = [(item, image) for item, image in samples if not isinstance(image, Broken)]
    broken = [Unreadable(item.row, item.key, image.reason) for item, image in samples if isinstance(image, Broken)]
    return Batch(
        images=torch.stack([image for _, image in good]) if good else torch.empty(0),
        rows=[item.row for item, _ in good],
        keys=[item.key for item, _ in good],
        broken=broken,
        position=samples[-1][0].position,
    )


def default_workers(device: torch.device) -> int:
    """One where the model needs the processor itself; enough to feed it where it does not."""
    return 1 if device.type == "cpu" else min(8, os.cpu_count() or 1)
