"""Batches as packed rows, one per live token, and conversion between them and padded images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method.tokens import Tokens, take
from .segments import Segments
from .state import Dropped, Reduced, State

if TYPE_CHECKING:
    # importing the kernels needs Triton
    from ..ops.norm.triton import Norm


def first_rows(counts: list[int], device: torch.device) -> Tensor:
    """Return the row at which each image begins, int64 [B]."""
    number = torch.tensor(counts, device=device)
    return number.cumsum(0) - number


def _image_and_place(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each packed row its image and its place in that image, int64 [T] each."""
    number = torch.tensor(counts, device=device)
    image = torch.repeat_interleave(torch.arange(len(counts), device=device), number, output_size=sum(counts))
    return image, torch.arange(sum(counts), device=device) - first_rows(counts, device)[image]


def pad(values: Tensor, counts: list[int]) -> Tensor:
    """Pad rows [T] or [T, C] to images [B, max(counts)] or [B, max(counts), C], with zeros after each image."""
    if len(set(counts)) == 1:
        return values.unflatten(0, (len(counts), counts[0]))
    image, place = _image_and_place(counts, values.device)
    out = values.new_zeros(len(counts), max(counts), *values.shape[1:])
    return out.index_put((image, place), values)


def rows(values: Tensor, counts: list[int]) -> Tensor:
    """The inverse of `pad`."""
    if len(set(counts)) == 1:
        return values[:, : counts[0]].flatten(0, 1)
    return values[_image_and_place(counts, values.device)]


def by_image(function: Callable[[Tensor], Tensor], values: Tensor, counts: list[int]) -> Tensor:
    """Apply `function` to rows [T, C] as padded images [B, N, C], because stochastic depth drops images, not rows."""
    return rows(function(pad(values, counts)), counts)


@dataclass(frozen=True)
class Padding:
    """Location of the tokens of padded images among packed rows.

    Attributes:
        at: int64 [B, longest], the row of each token; an arbitrary valid row for padding.
        live: bool [B, longest], False for padding.
    """

    at: Tensor
    live: Tensor

    @classmethod
    def of(cls, cu: Tensor, longest: int, rows: int) -> Padding:
        """Padding for images in rows cu[b]:cu[b + 1] of `rows` rows."""
        place = torch.arange(longest, device=cu.device)
        live = place < cu.diff()[:, None]
        return cls((cu[:-1, None] + place).clamp(max=rows - 1).long(), live)

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Pad [T] or [T, C] to [B, longest] or [B, longest, C]; spare rows may hold anything, even NaN."""
        live = self.live if values.ndim == 1 else self.live[..., None]
        return torch.where(live, values[self.at], fill)


def tokens_of(rows: Rows, padding: Padding) -> Tokens:
    """Return the tokens as padded images, the form that `method.reduction` uses."""
    return Tokens(padding.pad(rows.size, 1.0), padding.live.float(), padding.pad(rows.origin, 0).long())


def locate_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return for each row its image and its place there, int64 [T] each; arbitrary but valid past the last image."""
    row = torch.arange(rows.x.shape[0], dtype=torch.int32, device=rows.cu.device)
    image = torch.searchsorted(rows.cu[1:], row, right=True).clamp(max=rows.cu.shape[0] - 2)
    return image, (row - rows.cu[image]).clamp(max=rows.longest - 1).long()


@dataclass(frozen=True)
class Rows:
    """A batch between two blocks.

    Attributes:
        x: [T, C], image b in rows cu[b]:cu[b + 1].
        normed: [T, C], `x` after the first norm of the next block, or None if that block applies its norm itself.
        size: float32 [T], number of patches in each token.
        origin: int32 [T], place of each token in the input of its image.
        cu: int32 [B + 1], cumulative token counts, on the device.
        longest: upper bound on the tokens of an image.
        whole: whether nothing was reduced yet: every image has `longest` tokens of size 1, and x has no spare rows.
        source: int32 [B, N], see `Tokens`; None unless the call is traced or will be unmerged.
        dropped: features of pruned patches if the call will be unmerged.
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
        """Pack all tokens of x [B, N, C].

        Args:
            norm: first norm of the next block, or None if that block applies it itself.
            traced: whether to track sources.
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
    def grid(cls, x: Tensor, norm: Norm | None, segments: Segments | None, has_positions: bool) -> Rows:
        """Pack the tokens of x [B, N, C] for a call that will be unmerged.

        Args:
            norm: as in `start`.
            segments: rows of each image among the host's features, None if every image has N tokens.
            has_positions: whether the host passes positions to its blocks. They differ between the images of
                `segments`, so that origins are then rows of the host's features.
        """
        rows, dropped = cls.start(x, None, traced=True), Dropped.start(x, segments)
        values, origin, size, cu, source = rows.x, rows.origin, rows.size, rows.cu, rows.source
        if segments is not None:
            live = segments.live.flatten()
            origin = segments.index.flatten().int() if has_positions else origin
            values, origin, size = values[live], origin[live], size[live]
            cu = F.pad(segments.live.sum(1).cumsum(0), (1, 0)).int()
            source = None if source is None else source.where(segments.live, -1)
        return cls(values, _norm(values, norm), size, origin, cu, x.shape[1], segments is None, source, dropped)


def _norm(x: Tensor, norm: Norm | None) -> Tensor | None:
    return None if norm is None else F.layer_norm(x, x.shape[-1:], *norm)


def unpack(rows: Rows, protected: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert packed rows to padded images, prefix tokens first.

    Returns:
        x [B, longest, C] and size float32 [B, longest], both 0 for padding, and the sources.
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


def finish(state: State, x: Tensor, kept: Tensor, protected: int) -> Reduced:
    """Move the prefix tokens back to the front, where the host's head reads them.

    Args:
        x: [B, N, C], the features of `state` as padded images.
        kept: float32 [B, L], tokens after each block.

    Returns:
        The result. Sizes are 0 for removed rows and carry the gradient of keeping a row, for heads that pool rows.
    """
    tokens = state.tokens
    size, source = tokens.size * tokens.keep, tokens.source
    if protected > 1:
        order = (tokens.origin - protected).clamp_(max=0).argsort(dim=1, stable=True)
        x, size = take(x, order), take(size, order)
        if source is not None:
            source = reordered(source, order)
    return Reduced(x, size, kept, source, state.trail)


def reordered(source: Tensor, order: Tensor) -> Tensor:
    """Return `Tokens.source` after a reordering of tokens: `order`, int64 [B, N'], lists the places they come from."""
    place = order.argsort(dim=1).int()
    return torch.where(source < 0, source, place.gather(1, source.clamp(0, order.shape[1] - 1).long()))
