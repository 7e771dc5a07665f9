"""Batches as packed rows, one a live token, and the way from padded images to them and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method.tokens import Tokens
from .segments import Segments
from .state import Dropped

if TYPE_CHECKING:
    # the kernels are imported by what runs them
    from ..ops.norm.triton import Norm


def first_rows(counts: list[int], device: torch.device) -> Tensor:
    """int64 [B], the row where each image begins."""
    number = torch.tensor(counts, device=device)
    return number.cumsum(0) - number


def _places(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each packed row its image and its place in that image, int64 [T] both."""
    number = torch.tensor(counts, device=device)
    image = torch.repeat_interleave(torch.arange(len(counts), device=device), number, output_size=sum(counts))
    return image, torch.arange(sum(counts), device=device) - first_rows(counts, device)[image]


def pad(values: Tensor, counts: list[int]) -> Tensor:
    """[T] or [T, C] rows to [B, max(counts)] or [B, max(counts), C], zeros behind each image."""
    if len(set(counts)) == 1:
        return values.unflatten(0, (len(counts), counts[0]))
    image, place = _places(counts, values.device)
    out = values.new_zeros(len(counts), max(counts), *values.shape[1:])
    return out.index_put((image, place), values)


def rows(values: Tensor, counts: list[int]) -> Tensor:
    """The inverse of `pad`."""
    if len(set(counts)) == 1:
        return values[:, : counts[0]].flatten(0, 1)
    return values[_places(counts, values.device)]


def by_image(function: Callable[[Tensor], Tensor], values: Tensor, counts: list[int]) -> Tensor:
    """A function of rows [T, C] that sees padded images [B, N, C]: stochastic depth drops those, and not rows."""
    return rows(function(pad(values, counts)), counts)


@dataclass(frozen=True)
class Padding:
    """Where the tokens of padded images lie among the rows.

    Attributes:
        at: int64 [B, longest], rows; some row that exists where there is no such token.
        live: bool [B, longest], whether there is one.
    """

    at: Tensor
    live: Tensor

    @classmethod
    def of(cls, cu: Tensor, longest: int, rows: int) -> Padding:
        """For images in rows cu[b]:cu[b + 1] of `rows`."""
        place = torch.arange(longest, device=cu.device)
        live = place < cu.diff()[:, None]
        return cls((cu[:-1, None] + place).clamp(max=rows - 1).long(), live)

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T] or [T, C] to [B, longest] or [B, longest, C]; rows past the end may hold anything, even NaN."""
        live = self.live if values.ndim == 1 else self.live[..., None]
        return torch.where(live, values[self.at], fill)


def tokens_of(rows: Rows, padding: Padding) -> Tokens:
    """The state as the definition knows it."""
    return Tokens(padding.pad(rows.size, 1.0), padding.live.float(), padding.pad(rows.origin, 0).long())


def _where(rows: Rows) -> tuple[Tensor, Tensor]:
    """Of each row its image and its place there, int64 [T]; of rows past the end any."""
    row = torch.arange(rows.x.shape[0], dtype=torch.int32, device=rows.cu.device)
    image = torch.searchsorted(rows.cu[1:], row, right=True).clamp(max=rows.cu.shape[0] - 2)
    return image, (row - rows.cu[image]).clamp(max=rows.longest - 1).long()


@dataclass(frozen=True)
class Rows:
    """A batch between two blocks.

    Attributes:
        x: [T, C], image b in rows cu[b]:cu[b + 1].
        normed: [T, C], `x` after the next block's first norm, or None where that block takes its norm itself.
        size: float32 [T], patches in each token.
        origin: int32 [T], each token's place in its image's input.
        cu: int32 [B + 1], on the device.
        longest: a bound on the tokens of an image.
        whole: nothing was reduced yet: every image has `longest` tokens of size 1, and x has no spare rows.
        source: int32 [B, N], see `Tokens`; None where nobody asks.
        dropped: what pruned patches were, where unmerging asks.
    """

    x: Tensor
    normed: Tensor | None
    size: Tensor
    origin: Tensor
    cu: Tensor
    longest: int
    whole: bool
    source: Tensor | None = None
    dropped: Dropped | None = None

    @classmethod
    def start(cls, x: Tensor, norm: Norm | None, traced: bool = False) -> Rows:
        """All tokens of [B, N, C].

        Args:
            traced: whether sources are asked for.
        """
        images, length, _ = x.shape
        device = x.device
        x = x.flatten(0, 1).contiguous()
        cu = torch.arange(0, (images + 1) * length, length, dtype=torch.int32, device=device)
        origin = torch.arange(length, dtype=torch.int32, device=device).repeat(images)
        size = torch.ones(images * length, device=device, dtype=torch.float32)
        source = origin.view(images, length) if traced else None
        return cls(x, _norm(x, norm), size, origin, cu, length, True, source)

    @classmethod
    def grid(cls, x: Tensor, norm: Norm | None, among: Segments | None, positioned: bool) -> Rows:
        """The tokens of [B, N, C], to be unmerged.

        Args:
            among: where images are among the host's features, if not of N tokens each.
            positioned: whether the host's positions differ between images, so that origins are rows of them.
        """
        rows, dropped = cls.start(x, None, traced=True), Dropped.start(x, among)
        values, origin, size, cu, source = rows.x, rows.origin, rows.size, rows.cu, rows.source
        if among is not None:
            live = among.live.flatten()
            origin = among.index.flatten().int() if positioned else origin
            values, origin, size = values[live], origin[live], size[live]
            cu = F.pad(among.live.sum(1).cumsum(0), (1, 0)).int()
            source = None if source is None else source.where(among.live, -1)
        return cls(values, _norm(values, norm), size, origin, cu, x.shape[1], among is None, source, dropped)


def _norm(x: Tensor, norm: Norm | None) -> Tensor | None:
    return None if norm is None else F.layer_norm(x, x.shape[-1:], *norm)


def unpack(rows: Rows, protected: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as padded images again, prefix tokens first.

    Returns:
        x [B, longest, C] and size float32 [B, longest], both 0 where an image has no such token, and the sources.
    """
    images, source = rows.cu.shape[0] - 1, rows.source
    if rows.whole:
        return rows.x.unflatten(0, (images, -1)), rows.size.unflatten(0, (images, -1)), source
    place = torch.arange(rows.longest, device=rows.x.device)
    live = place < rows.cu.diff()[:, None]
    at = (rows.cu[:-1, None] + place).clamp(max=rows.x.shape[0] - 1).long()
    if protected > 1:
        origin = torch.where(live, rows.origin[at], protected)
        order = (origin - protected).clamp(max=0).argsort(dim=1, stable=True)
        at, live = at.gather(1, order), live.gather(1, order)
        source = None if source is None else reordered(source, order)
    return torch.where(live[..., None], rows.x[at], 0), torch.where(live, rows.size[at], 0), source


def reordered(source: Tensor, order: Tensor) -> Tensor:
    """`Tokens.source` once tokens are moved to an order, int64 [B, N'], of places that they come from."""
    place = order.argsort(dim=1).int()
    return torch.where(source < 0, source, place.gather(1, source.clamp(0, order.shape[1] - 1).long()))
