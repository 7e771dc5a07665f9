"""Labelled pictures of the tokens of an image, block by block, at one or more budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import UsageError
from .curves import new_figure
from .groups import ReducedView
from .overlay import paint_groups

Budgets = Mapping[str, ReducedView]
"""The reduction of one image at each budget, by the name of the budget."""

_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def panel(image: Tensor, seen: ReducedView, block: int | None, width: int = 224) -> Image.Image:
    """Return a picture of the image after a block, with the block's number and token count above.

    Args:
        image: [3, H, W] in [0, 1], what the model saw, at any resolution.
        seen: the reduction of the image.
        block: from 0; None for the image itself.
        width: of the picture in pixels; the height follows from the image's shape.
    """
    return _titled(_to_pil(_painted(image, seen, block, width)), _label(seen, block), _text_size(width))


def paint_last(image: Tensor, seen: ReducedView, width: int = 224) -> Image.Image:
    """Return a picture of the image after the last block that leaves patches, without a label."""
    shown = seen.shown_blocks()
    return _to_pil(_painted(image, seen, shown[-1] if shown else None, width))


def strip(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 224) -> Image.Image:
    """Return one row of pictures per budget: the image, and the image after some blocks.

    Args:
        image: [3, H, W] in [0, 1], what the model saw, at any resolution.
        budgets: the reduction of the image at each budget.
        blocks: which blocks, from 0; by default five, up to the last that leaves patches.
        width: of each picture in pixels.

    Raises:
        UsageError: there is no budget, or no such block.
    """
    chosen = choose_blocks(budgets, blocks)
    rows = []
    for name, view in budgets.items():
        row = _joined([panel(image, view, block, width) for block in (None, *chosen)], across=True)
        rows.append(_titled(row, _summary(name, view), _text_size(width)))
    return _framed(_joined(rows, across=False))


def frames(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 448) -> list[Image.Image]:
    """Return the frames of an animation, budgets side by side: the image, then the image after each block.

    Args:
        image, budgets, width: as for `strip`.
        blocks: which blocks, from 0; by default all that leave patches.

    Raises:
        UsageError: there is no budget, or no such block.
    """
    film = []
    for block in (None, *choose_blocks(budgets, blocks, limit=None)):
        panels = [
            _titled(panel(image, view, block, width), _summary(name, view), _text_size(width))
            for name, view in budgets.items()
        ]
        film.append(_framed(_joined(panels, across=True)))
    return film


def figure(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 224) -> Any:
    """Return `strip` as a matplotlib figure.

    Raises:
        UsageError: there is no budget, or no such block.
        MissingExtraError: matplotlib is not installed.
    """
    chosen = (None, *choose_blocks(budgets, blocks))
    # in inches, with room for the titles
    row_height = 1.8 * _height(image, width) / width + 0.35
    drawn, axes = new_figure(len(budgets), len(chosen), (1.8 * len(chosen), row_height * len(budgets)))
    for row, (name, view) in zip(axes, budgets.items(), strict=True):
        for axis, block in zip(row, chosen, strict=True):
            axis.imshow(_painted(image, view, block, width).permute(1, 2, 0).numpy())
            axis.set_axis_off()
            axis.set_title(_summary(name, view) if block is None else _label(view, block), fontsize=7)
    return drawn


def choose_blocks(budgets: Budgets, requested: Sequence[int] | None, limit: int | None = 5) -> list[int]:
    """Return the blocks to show, from 0: the requested ones, or at most `limit`, evenly spaced up to the last.

    Blocks that leave patches at no budget are shown only on request.

    Raises:
        UsageError: there is no budget, or no such block.
    """
    if not budgets:
        raise UsageError("nothing to draw: give at least one budget")
    depth = min(len(view.kept) for view in budgets.values())
    if requested is not None:
        for block in requested:
            if not 0 <= block < depth:
                raise UsageError(f"no block {block + 1} to show: the model has blocks 1 to {depth}")
        return list(requested)
    shown = sorted({block for view in budgets.values() for block in view.shown_blocks()})
    if limit is None or len(shown) <= limit:
        return shown
    # counted back from the last block: the first ones change little
    return shown[:: -(len(shown) // limit)][:limit][::-1]


def _painted(image: Tensor, view: ReducedView, block: int | None, width: int) -> Tensor:
    """[3, height, width], the image after a block; None is the image itself."""
    rows, columns = view.groups.shape[1:]
    unmerged = torch.arange(rows * columns).view(rows, columns)
    return paint_groups(image, unmerged if block is None else view.groups[block], (_height(image, width), width))


def _height(image: Tensor, width: int) -> int:
    return max(1, round(width * image.shape[1] / image.shape[2]))


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _label(view: ReducedView, block: int | None) -> str:
    return f"{view.tokens} tokens" if block is None else f"block {block + 1}: {view.kept[block]} tokens"


def _summary(name: str, view: ReducedView) -> str:
    return f"{name}: {view.share:.2f} of the FLOPs" + (f", {view.answers}" if view.answers else "")


def _text_size(width: int) -> float:
    """Font size in pixels for pictures of this width."""
    return max(10, width / 15)


def _titled(picture: Image.Image, text: str, size: float) -> Image.Image:
    """Add a line of text above a picture, in a smaller font if it would not fit."""
    line_height, font = round(1.5 * size), ImageFont.load_default(size)
    while font.getlength(text) > picture.width - 2 and size > 4:
        size -= 0.5
        font = ImageFont.load_default(size)
    canvas = Image.new("RGB", (picture.width, picture.height + line_height), _PAPER)
    canvas.paste(picture, (0, line_height))
    ImageDraw.Draw(canvas).text((1, line_height // 2), text, _INK, font, anchor="lm")
    return canvas


def _joined(pictures: list[Image.Image], across: bool) -> Image.Image:
    """Join pictures side by side, or below each other."""
    gap = max(4, pictures[0].width // 40) if across else 8
    widths, heights = [picture.width for picture in pictures], [picture.height for picture in pictures]
    gaps = gap * (len(pictures) - 1)
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    canvas, offset = Image.new("RGB", size, _PAPER), 0
    for picture in pictures:
        canvas.paste(picture, (offset, 0) if across else (0, offset))
        offset += gap + (picture.width if across else picture.height)
    return canvas


def _framed(picture: Image.Image, margin: int = 8) -> Image.Image:
    canvas = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), _PAPER)
    canvas.paste(picture, (margin, margin))
    return canvas
