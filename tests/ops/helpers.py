"""Batches of images of different lengths, packed and padded, to compare kernels with references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ltmp.config import LTMPConfig, Scores
from ltmp.method.thresholds import Thresholds
from ltmp.method.tokens import Tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Batch:
    """`counts` tokens per image, packed into more rows than needed; the spare rows are NaN, or invalid integers."""

    counts: list[int]
    qkv: Tensor
    size: Tensor
    origin: Tensor
    cu: Tensor

    @classmethod
    def random(
        cls, counts: list[int], heads: int = 2, width: int = 16, spare: int = 5, seed: int = 0, dtype=torch.float32
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        rows = sum(counts)
        qkv = torch.randn(rows, 3, heads, width, generator=generator)
        size = torch.randint(1, 5, (rows,), generator=generator).float()
        origin = torch.cat([torch.randperm(2 * n, generator=generator)[:n] for n in counts])
        # prefix tokens are always present, at any position
        for first, n in zip(torch.tensor([0, *counts]).cumsum(0).tolist(), counts, strict=False):
            present = min(n, 5)
            places = torch.randperm(n, generator=generator)[:present]
            origin[first : first + n] += 5
            origin[first + places] = torch.arange(present)
        cu = torch.tensor([0, *counts]).cumsum(0).int()

        def poisoned(values: Tensor, fill: float) -> Tensor:
            return torch.cat([values, values.new_full((spare, *values.shape[1:]), fill)]).to(DEVICE)

        nan = float("nan")
        return cls(
            counts, poisoned(qkv, nan).to(dtype), poisoned(size, nan), poisoned(origin.int(), -(2**30)), cu.to(DEVICE)
        )

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv.unbind(1)
        return q, k, v

    @property
    def live(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def pad(self, values: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] rows to [B, longest, ...]."""
        out = values.new_full((len(self.counts), self.longest, *values.shape[1:]), fill)
        for image, rows in enumerate(values[: self.live].split(self.counts)):
            out[image, : len(rows)] = rows
        return out

    def rows(self, values: Tensor) -> Tensor:
        """[B, longest, ...] to the live rows."""
        return torch.cat([image[:n] for image, n in zip(values, self.counts, strict=True)])

    def tokens(self) -> Tokens:
        keep = self.pad(torch.ones_like(self.size))
        return Tokens(self.pad(self.size, 1), keep, self.pad(self.origin.long(), 2**30))


def random_received(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch.qkv.shape[2], batch.qkv.shape[0], generator=generator).to(DEVICE)


def importance_of(batch: Batch, received: Tensor) -> Tensor:
    counts = torch.tensor([n for n in batch.counts for _ in range(n)], device=DEVICE)
    return received[:, : batch.live].sum(0) / (counts * received.shape[0])


def thresholds(variant: str, merge: float, prune: float, **scores: Any) -> Thresholds:
    found = Thresholds(1, LTMPConfig(variant, Scores(**scores))).to(DEVICE)
    found.set(merge=[merge], prune=[prune])
    return found.requires_grad_(False)


def gpu(test):
    """Mark a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")(test))
