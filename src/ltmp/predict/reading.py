"""From shards to batches: processes decode ahead, and a batch never mixes shards, so that it is the same in any run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import Broken
from ..data.dataset import Transform
from ..data.images import decode, reason
from ..data.tars import open_content
from ..data.workers import handed_over, received, start_worker
from .shards import Item, Shard

AHEAD = 2**24
"""Bytes of encoded images in a batch, beyond which it ends early; those that lie in files of their own do not count."""


class Unreadable(NamedTuple):
    """An image that could not be read, as it is listed."""

    row: int
    key: str
    reason: str


@dataclass
class Batch:
    """Consecutive images of one shard.

    Attributes:
        handed: [B, C, H, W], as it left its process; `images` is the tensor, `rows` and `keys` say which.
        broken: those among them that could not be read.
        position: share of the shard that this batch ends at.
    """

    handed: Tensor | np.ndarray
    rows: list[int]
    keys: list[str]
    broken: list[Unreadable]
    position: float

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for an asynchronous copy to a GPU."""
        self.handed = self.images.pin_memory()
        return self

    @property
    def images(self) -> Tensor:
        return received(self.handed)


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
            with open_content(item.content) as file:
                return item, self.transform(decode(file, self.mode))
        # Decoders fail in many ways on damaged bytes; each means that this image cannot be read.
        except Exception as error:
            return item, Broken(item.key, reason(error))


class ShardBatches:
    """Batches of items, shard by shard, an `End` behind each shard; read while earlier batches are being decoded."""

    def __init__(self, shards: Iterable[Shard], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Item | End]]:
        for shard in self.shards:
            batch: list[Item | End] = []
            held = 0
            for item in shard.items():
                batch.append(item)
                held += len(item.content) if isinstance(item.content, bytes) else 0
                if len(batch) == self.batch_size or held > AHEAD:
                    yield batch
                    batch, held = [], 0
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
        batch_sampler=ShardBatches(shards, batch_size),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )


def _collate(samples: list[Any]) -> Batch | End:
    if isinstance(samples[0], End):
        return samples[0]
    good = [(item, image) for item, image in samples if not isinstance(image, Broken)]
    broken = [Unreadable(item.row, item.key, image.reason) for item, image in samples if isinstance(image, Broken)]
    return Batch(
        handed=handed_over(torch.stack([image for _, image in good])) if good else torch.empty(0),
        rows=[item.row for item, _ in good],
        keys=[item.key for item, _ in good],
        broken=broken,
        position=samples[-1][0].position,
    )


def default_workers(device: torch.device) -> int:
    """One where the model needs the processor itself; enough to feed it where it does not."""
    return 1 if device.type == "cpu" else min(8, os.cpu_count() or 1)
