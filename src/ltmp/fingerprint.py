"""Fingerprints of tensors, and a compact record of the images that were seen."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_KEYS = 4096
"""Number of images remembered individually: 32 KB."""

_BINS, _STEPS = 64, 32
_SPAN = float(2**63)


def of_tensors(named: Mapping[str, Tensor]) -> str:
    """Return a hash, 32 hexadecimal digits, of the names, dtypes, shapes and bits of tensors, whatever their order."""
    digest = blake2b(digest_size=16)
    for name in sorted(named):
        value = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_keys(images: Tensor) -> Tensor:
    """Return a key for each image: int64 [B] in [0, 2^63), from images [B, ...] as the model takes them.

    A key hashes 64 means over the image, rounded to steps of 1/32, so that differences in the last bits between
    machines and dtypes rarely matter. Two photographs have the same key only if they are the same photograph.
    """
    means = F.adaptive_avg_pool1d(images.detach().cpu().float().flatten(1)[:, None], _BINS)[:, 0]
    rows = (means * _STEPS).round().clamp(-32768, 32767).to(torch.int16).numpy()
    keys = [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "big") >> 1 for row in rows]
    return torch.tensor(keys, dtype=torch.int64)


class Seen:
    """Remembers which images were seen, in at most 32 KB: the keys of up to 4,096 images, or the smallest of more.

    The smallest keys are a random sample of the images that is consistent between sets, so the overlap of two sets can
    be estimated from them (bottom-k sketch: Cohen & Kaplan, PODC 2007).

    Args:
        keys: int64 [K], distinct; see `image_keys`.
    """

    def __init__(self, keys: Tensor | None = None) -> None:
        self.keys = torch.empty(0, dtype=torch.int64) if keys is None else keys.to("cpu", torch.int64)

    def add(self, images: Tensor) -> None:
        """Remember images [B, ...] as the model takes them."""
        self.add_keys(image_keys(images))

    def add_keys(self, keys: Tensor) -> None:
        """Remember images by their keys, int64 [B]; see `image_keys`."""
        self.keys = torch.cat([self.keys, keys]).unique()[:MAX_KEYS]

    @property
    def images(self) -> int:
        """Number of different images; beyond 4,096 an estimate, mostly within 5 %."""
        full = len(self.keys) == MAX_KEYS
        return round((MAX_KEYS - 1) * _SPAN / float(self.keys[-1])) if full else len(self.keys)

    def count(self, keys: Tensor) -> int:
        """Count how many images of these keys were seen; beyond 4,096 an estimate, but 0 only if no key is known."""
        matches = int(torch.isin(keys, self.keys).sum())
        return round(matches * max(1.0, self.images / max(1, len(self.keys))))
