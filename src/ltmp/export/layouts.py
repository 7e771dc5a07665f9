"""Where the rows of a batch lie in an exported graph, and how each form compacts them: the rest is alike (`forms`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Where the rows of a batch, [T] one image after the other, lie in a padded batch [B, N].

    Attributes:
        images, length: B and N.
        live: bool [B, N], or None where every place holds a token.
        fill: int64 [B * N], the row that each place shows, one of the same image where there is none; None where rows
            are places.
        place, image: int64 [T], the place in [B * N] and the image of each row, or None likewise.
    """

    images: int
    length: int
    live: Tensor | None = None
    fill: Tensor | None = None
    place: Tensor | None = None
    image: Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether there is one image, and never more."""
        return isinstance(self.images, int) and self.images == 1

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] to [B, N, ...]; what places without a token hold means nothing, but is finite."""
        rows = rows if self.fill is None else rows.index_select(0, self.fill)
        return rows.unflatten(0, (self.images, self.length))

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def heads(self, rows: Tensor) -> Tensor:
        """[T, H, D] padded to [B, H, N, D] by one gather; of one image [H, N, D], a view, as ONNX Runtime reads it."""
        if self.fill is None:
            return rows.transpose(0, 1) if self.alone else self.pad(rows).transpose(1, 2)
        heads = rows.shape[1]
        at = self.fill.view(self.images, 1, self.length) * heads + torch.arange(heads, device=rows.device)[:, None]
        return rows.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)

    def from_heads(self, y: Tensor) -> Tensor:
        """The inverse of `heads`, with the heads of a row side by side: [T, H * D]."""
        if self.place is None or self.image is None:
            return y.transpose(-3, -2).flatten(-2).flatten(0, -2)
        heads = y.shape[1]
        first = self.place + self.image * ((heads - 1) * self.length)
        at = first[:, None] + torch.arange(heads, device=y.device) * self.length
        return y.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape).flatten(1)


Compact = Callable[[Tensor, int], tuple[Tensor, PackedLayout]]
"""(keep bool [B, M], N before) to the places [T] in [B * M] that stay, in order, and the layout that they then have."""


def single(keep: Tensor, _length: int) -> tuple[Tensor, PackedLayout]:
    """One image: what is left is all there is."""
    source = keep.flatten().nonzero().flatten()
    return source, PackedLayout(1, source.shape[0])


_PLACES = 3
"""The fewest that the batch form pads an image to: a product of one place, or of half of two, is one of vectors."""


def batch(keep: Tensor, _length: int) -> tuple[Tensor, PackedLayout]:
    """Any number of images: linear layers over the rows that are left, attention padded to the longest image."""
    images, places = keep.shape
    source = keep.flatten().nonzero().flatten()
    counts = keep.sum(1)
    # AOTInductor has to know which products are of vectors
    longest: Any = counts.max().clamp(min=_PLACES).item()
    torch._check(longest >= _PLACES)
    first = counts.cumsum(0) - counts
    place = torch.arange(longest, device=keep.device)
    fill = (first[:, None] + torch.minimum(place, counts[:, None] - 1)).flatten()
    image = source // places
    at = torch.arange(source.shape[0], device=keep.device) + (image * longest - first.index_select(0, image))
    return source, PackedLayout(images, longest, place < counts[:, None], fill, at, image)


def static(keep: Tensor, length: int) -> tuple[Tensor, PackedLayout]:
    """Nothing shrinks: places behind the live tokens are masked. Unique keys make any sort a stable one."""
    images, places = keep.shape
    place = torch.arange(places, device=keep.device)
    order = (keep * places - place).to(torch.float32).topk(length, dim=1).indices
    live = place[:length] < keep.sum(1, keepdim=True)
    order = torch.where(live, order, order[:, :1])
    source = (order + places * torch.arange(images, device=keep.device)[:, None]).flatten()
    return source, PackedLayout(images, length, live)


FORMS: dict[str, Compact] = {"single": single, "batch": batch, "static": static}
