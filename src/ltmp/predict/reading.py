"""Batches of images from shards, decoded ahead; a batch never mixes shards, so that it is the same in every run."""

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
from ..data.workers import pack_batch, start_worker, unpack_batch
from .shards import Item, Shard

AHEAD = 2**24
"""Bytes of encoded images in memory after which a batch ends early; images in files or tars do not count."""


class Unreadable(NamedTuple):
    """An image that could not be read, as listed in the side file."""

    row: int
    key: str
    reason: str


@dataclass
class Batch:
    """Consecutive images of one shard.

    Attributes:
        pixels: [B, C, H, W], as handed over by the worker; `images` is the tensor.
        rows, keys: row and key of each image in `pixels`.
        broken: the images of the batch that could not be read.
        position: share of the shard up to the end of this batch, in [0, 1].
    """

    pixels: Tensor | np.ndarray
    rows: list[int]
    keys: list[str]
    broken: list[Unreadable]
    position: float

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for an asynchronous copy to a GPU."""
        self.pixels = self.images.pin_memory()
        return self

    @property
    def images(self) -> Tensor:
        return unpack_batch(self.pixels)


@dataclass(frozen=True)
class End:
    """Follows the last batch of a shard."""

    shard: Shard


def read_batches(
    shards: Iterable[Shard], transform: Transform, *, mode: str, batch_size: int, workers: int, pin_memory: bool = False
) -> Iterable[Batch | End]:
    """Return the batches of all shards in order, with an `End` after each shard.

    Args:
        transform: maps a decoded image to [C, H, W].
        mode: "RGB" or "L".
        workers: processes that decode ahead; 0 decodes in this process.
    """
    return DataLoader(
        Decoder(transform, mode),
        batch_sampler=ShardBatches(shards, batch_size),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )


class ShardBatches:
    """Batch sampler of items, shard by shard, with an `End` after each shard.

    Runs in the main process, while workers decode earlier batches.
    """

    def __init__(self, shards: Iterable[Shard], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Item | End]]:
        for shard in self.shards:
            batch: list[Item | End] = []
            size = 0
            for item in shard.items():
                batch.append(item)
                size += len(item.content) if isinstance(item.content, bytes) else 0
                if len(batch) == self.batch_size or size > AHEAD:
                    yield batch
                    batch, size = [], 0
            if batch:
                yield batch
            yield [End(shard)]


@dataclass
class Decoder(Dataset):
    """Dataset indexed by `Item`; returns (item, transformed image), or (item, `Broken`)."""

    transform: Transform
    mode: str

    def __getitem__(self, item: Item | End) -> tuple[Item, Any] | End:
        if isinstance(item, End):
            return item
        if isinstance(item.content, Broken):
            return item, item.content
        try:
            with open_content(item.content) as file:
                return item, self.transform(decode(file, self.mode))
        # Decoders raise all kinds of errors on damaged bytes; any of them means that this image cannot be read.
        except Exception as error:
            return item, Broken(item.key, reason(error))


def _collate(samples: list[Any]) -> Batch | End:
    if isinstance(samples[0], End):
        return samples[0]
    readable = [(item, image) for item, image in samples if not isinstance(image, Broken)]
    broken = [Unreadable(item.row, item.key, image.reason) for item, image in samples if isinstance(image, Broken)]
    return Batch(
        pixels=pack_batch(torch.stack([image for _, image in readable])) if readable else torch.empty(0),
        rows=[item.row for item, _ in readable],
        keys=[item.key for item, _ in readable],
        broken=broken,
        position=samples[-1][0].position,
    )


def default_workers(device: torch.device) -> int:
    """Return one worker if the model itself runs on the CPU, or else up to eight to keep the device busy."""
    return 1 if device.type == "cpu" else min(8, os.cpu_count() or 1)
