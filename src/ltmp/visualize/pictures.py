"""Pictures with words on them: what is left of an image, block by block, at one or more budgets."""

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
"""What became of one image at each budget, by the budget's name."""

_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def panel(image: Tensor, seen: ReducedView, block: int | None, width: int = 224) -> Image.Image:
    """The image as `block` (from 0) leaves it, with its name and token count above; None is the image itself.

    Args:
        image: [3, H, W] in [0, 1], what the model saw, of any size.
        width: of the picture in pixels; the height follows.
    """
    text = f"{seen.tokens} tokens" if block is None else f"block {block + 1}: {seen.kept[block]} tokens"
    return _titled(_to_pil(_painted(image, seen, block, width)), text, _text_size(width))


def paint_last(image: Tensor, seen: ReducedView, width: int = 224) -> Image.Image:
    """The image as the last block with patches leaves it, without words."""
    shown = seen.shown_blocks()
    return _to_pil(_painted(image, seen, shown[-1] if shown else None, width))


def strip(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 224) -> Image.Image:
    """One row of pictures a budget: the image, and what some blocks leave of it.

    Args:
        image: [3, H, W] in [0, 1], what the model saw, of any size.
        blocks: which blocks, from 0; by default five, up to the last that leaves patches.
        width: of each picture in pixels.

    Raises:
        UsageError: no budget, or no such block.
    """
    chosen = choose_blocks(budgets, blocks)
    rows = []
    for name, seen in budgets.items():
        row = _joined([panel(image, seen, block, width) for block in (None, *chosen)], across=True)
        rows.append(_titled(row, _summary(name, seen), _text_size(width)))
    return _framed(_joined(rows, across=False))


def frames(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 448) -> list[Image.Image]:
    """The same as a film, the budgets side by side: first the image, then what each block leaves of it.

    Args:
        blocks: by default all that leave patches.
    """
    film = []
    for block in (None, *choose_blocks(budgets, blocks, most=None)):
        views = [
            _titled(panel(image, seen, block, width), _summary(name, seen), _text_size(width))
            for name, seen in budgets.items()
        ]
        film.append(_framed(_joined(views, across=True)))
    return film


def figure(image: Tensor, budgets: Budgets, blocks: Sequence[int] | None = None, width: int = 224) -> Any:
    """`strip` as a matplotlib figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    chosen = (None, *choose_blocks(budgets, blocks))
    tall = 1.8 * _height(image, width) / width + 0.35
    drawn, axes = new_figure(len(budgets), len(chosen), (1.8 * len(chosen), tall * len(budgets)))
    for row, (name, seen) in zip(axes, budgets.items(), strict=True):
        for axis, block in zip(row, chosen, strict=True):
            axis.imshow(_painted(image, seen, block, width).permute(1, 2, 0).numpy())
            axis.set_axis_off()
            axis.set_title(
                _summary(name, seen) if block is None else f"block {block + 1}: {seen.kept[block]} tokens", fontsize=7
            )
    return drawn


def choose_blocks(budgets: Budgets, wanted: Sequence[int] | None, most: int | None = 5) -> list[int]:
    """The blocks to show, from 0: those that are wanted, or else up to `most`, in equal steps to the last with patches.

    Raises:
        UsageError: no budget, or no such block.
    """
    if not budgets:
        raise UsageError("nothing to draw: give at least one budget")
    depth = min(len(seen.kept) for seen in budgets.values())
    if wanted is not None:
        for block in wanted:
            if not 0 <= block < depth:
                raise UsageError(f"no block {block + 1} to show: the model has blocks 1 to {depth}")
        return list(wanted)
    shown = sorted({block for seen in budgets.values() for block in seen.shown_blocks()})
    if most is None or len(shown) <= most:
        return shown
    # the last one and equal steps back: little happens in the first blocks
    return shown[:: -(len(shown) // most)][:most][::-1]


def _painted(image: Tensor, seen: ReducedView, block: int | None, width: int) -> Tensor:
    """[3, height, width], the image as a block leaves it."""
    rows, columns = seen.groups.shape[1:]
    alone = torch.arange(rows * columns).view(rows, columns)
    return paint_groups(image, alone if block is None else seen.groups[block], (_height(image, width), width))


def _height(image: Tensor, width: int) -> int:
    return max(1, round(width * image.shape[1] / image.shape[2]))


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _summary(name: str, seen: ReducedView) -> str:
    return f"{name}: {seen.share:.2f} of the FLOPs" + (f", {seen.answers}" if seen.answers else "")


def _text_size(width: int) -> float:
    """Of letters, in pixels, beside pictures of this width."""
    return max(10, width / 15)


def _titled(picture: Image.Image, text: str, size: float) -> Image.Image:
    """A line of text above a picture, made smaller where it would not fit."""
    room, font = round(1.5 * size), ImageFont.load_default(size)
    while font.getlength(text) > picture.width - 2 and size > 4:
        size -= 0.5
        font = ImageFont.load_default(size)
    whole = Image.new("RGB", (picture.width, picture.height + room), _PAPER)
    whole.paste(picture, (0, room))
    ImageDraw.Draw(whole).text((1, room // 2), text, _INK, font, anchor="lm")
    return whole


def _joined(pictures: list[Image.Image], across: bool) -> Image.Image:
    """Pictures side by side or below each other."""
    gap = max(4, pictures[0].width // 40) if across else 8
    wide, tall = [picture.width for picture in pictures], [picture.height for picture in pictures]
    gaps = gap * (len(pictures) - 1)
    size = (sum(wide) + gaps, max(tall)) if across else (max(wide), sum(tall) + gaps)
    whole, at = Image.new("RGB", size, _PAPER), 0
    for picture in pictures:
        whole.paste(picture, (at, 0) if across else (0, at))
        at += gap + (picture.width if across else picture.height)
    return whole


def _framed(picture: Image.Image, margin: int = 8) -> Image.Image:
    whole = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), _PAPER)
    whole.paste(picture, (margin, margin))
    return whole
