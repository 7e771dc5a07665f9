"""Layout of a batch of tokens in an exported graph, and how each form compacts it; `forms` is what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Mapping between packed rows [T, ...], one image after the other, and a padded batch [B, N, ...].

    Attributes:
        images, length: B and N.
        live: bool [B, N], which places hold a token; None if all do.
        fill: int64 [B * N], the row to copy to each place; places without a token get one of the same image. None if
            T = B * N and row i belongs to place i.
        place, image: int64 [T], the place in [B * N] and the image of each row; None as for `fill`.
    """

    images: int
    length: int
    live: Tensor | None = None
    fill: Tensor | None = None
    place: Tensor | None = None
    image: Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether the batch is statically a single image."""
        return isinstance(self.images, int) and self.images == 1

    def pad(self, rows: Tensor) -> Tensor:
        """From [T, ...] to [B, N, ...]. Values of places without a token are meaningless, but finite."""
        rows = rows if self.fill is None else rows.index_select(0, self.fill)
        return rows.unflatten(0, (self.images, self.length))

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def heads(self, rows: Tensor) -> Tensor:
        """From [T, H, D] to the padded [B, H, N, D] in one gather; of one image a view, [H, N, D]."""
        if self.fill is None:
            # ONNX Runtime reads the transposed view without a copy
            return rows.transpose(0, 1) if self.alone else self.pad(rows).transpose(1, 2)
        heads = rows.shape[1]
        at = self.fill.view(self.images, 1, self.length) * heads + torch.arange(heads, device=rows.device)[:, None]
        return rows.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)

    def from_heads(self, y: Tensor) -> Tensor:
        """The inverse of `heads`, with the heads of a row concatenated: [T, H * D]."""
        if self.place is None or self.image is None:
            return y.transpose(-3, -2).flatten(-2).flatten(0, -2)
        heads = y.shape[1]
        first = self.place + self.image * ((heads - 1) * self.length)
        at = first[:, None] + torch.arange(heads, device=y.device) * self.length
        return y.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape).flatten(1)


Compact = Callable[[Tensor, int], tuple[Tensor, PackedLayout]]
"""From (keep bool [B, M], N before) to the places [T] in [B * M] that stay, in order, and their new layout."""


def single(keep: Tensor, _length: int) -> tuple[Tensor, PackedLayout]:
    """One image: its kept tokens, without padding."""
    source = keep.flatten().nonzero().flatten()
    return source, PackedLayout(1, source.shape[0])


_PLACES = 3
"""Least length that the batch form pads to: with one place, or half of two, matrix products would be with vectors."""


def batch(keep: Tensor, _length: int) -> tuple[Tensor, PackedLayout]:
    """Any number of images: linear layers run on the kept rows only, attention is padded to the longest image."""
    images, places = keep.shape
    source = keep.flatten().nonzero().flatten()
    counts = keep.sum(1)
    # AOTInductor must be able to rule out products with vectors
    longest: Any = counts.max().clamp(min=_PLACES).item()
    torch._check(longest >= _PLACES)
    first = counts.cumsum(0) - counts
    place = torch.arange(longest, device=keep.device)
    fill = (first[:, None] + torch.minimum(place, counts[:, None] - 1)).flatten()
    image = source // places
    at = torch.arange(source.shape[0], device=keep.device) + (image * longest - first.index_select(0, image))
    return source, PackedLayout(images, longest, place < counts[:, None], fill, at, image)


def static(keep: Tensor, length: int) -> tuple[Tensor, PackedLayout]:
    """Constant size: places after the live tokens are masked. The sort keys are unique, so any sort is a stable one."""
    images, places = keep.shape
    place = torch.arange(places, device=keep.device)
    order = (keep * places - place).to(torch.float32).topk(length, dim=1).indices
    live = place[:length] < keep.sum(1, keepdim=True)
    order = torch.where(live, order, order[:, :1])
    source = (order + places * torch.arange(images, device=keep.device)[:, None]).flatten()
    return source, PackedLayout(images, length, live)


FORMS: dict[str, Compact] = {"single": single, "batch": batch, "static": static}
