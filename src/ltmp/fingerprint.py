"""Fingerprints: whether tensors are the same, and whether an image has been seen before."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_KEYS = 4096
"""Images that are remembered one by one: 32 KB."""

_BINS, _STEPS = 64, 32
_SPAN = float(2**63)


def of_tensors(named: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that say names, types, shapes and every bit of some tensors, in whatever order."""
    digest = blake2b(digest_size=16)
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_keys(images: Tensor) -> Tensor:
    """int64 [B] in [0, 2^63), a key for each image [B, ...] as the model takes it.

    Made of 64 means over the image in steps of 1/32, so that the last bits, which differ between machines and types, do
    not matter. Two photographs have the same key only where they are the same.
    """
    means = F.adaptive_avg_pool1d(images.detach().cpu().float().flatten(1)[:, None], _BINS)[:, 0]
    rows = (means * _STEPS).round().clamp(-32768, 32767).to(torch.int16).numpy()
    keys = [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "big") >> 1 for row in rows]
    return torch.tensor(keys, dtype=torch.int64)


class Seen:
    """Which images were looked at, in 32 KB at most: all keys of up to 4,096 images, of more the smallest.

    The smallest keys are a sample of all images that is the same wherever it is drawn: to look up others among them
    needs only those others whose keys are small, too (bottom-k sketch: Cohen & Kaplan, PODC 2007).

    Args:
        keys: int64 [K], distinct; see `image_keys`.
    """

    def __init__(self, keys: Tensor | None = None) -> None:
        self.keys = torch.empty(0, dtype=torch.int64) if keys is None else keys.to("cpu", torch.int64)

    def add(self, images: Tensor) -> None:
        """Remember images [B, ...] as the model takes them."""
        self.add_keys(image_keys(images))

    def add_keys(self, keys: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys]).unique()[:MAX_KEYS]

    @property
    def images(self) -> int:
        """How many different images there were; beyond 4,096 an estimate, to within 5 % mostly."""
        full = len(self.keys) == MAX_KEYS
        return round((MAX_KEYS - 1) * _SPAN / float(self.keys[-1])) if full else len(self.keys)

    def count(self, keys: Tensor) -> int:
        """How many of these images were among them; beyond 4,096 an estimate, but 0 only where none is known."""
        found = int(torch.isin(keys, self.keys).sum())
        return round(found * max(1.0, self.images / max(1, len(self.keys))))
