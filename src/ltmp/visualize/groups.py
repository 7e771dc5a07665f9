"""Which patch became which token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import record, trace
from ..errors import LTMPError
from ..hosts.attach import attachment


@dataclass(frozen=True)
class ReducedView:
    """The reduction of one image.

    Attributes:
        groups: int32 [L, rows, columns]: after each block, the number of the token that each patch is part of, which
            names that token in its block alone, or -1 - l where block l pruned the patch.
        kept: tokens after each block, prefix tokens included.
        tokens: how many there were.
        share: of the dense model's FLOPs.
        answers: what the dense and the reduced model say, in words; empty where nobody asked.
    """

    groups: Tensor
    kept: list[int]
    tokens: int
    share: float
    answers: str = ""

    @property
    def left(self) -> int:
        """Tokens after the last block that leaves patches."""
        shown = self.shown_blocks()
        return self.kept[shown[-1] if shown else -1]

    def shown_blocks(self) -> list[int]:
        """Numbers of the blocks after which patches are left: a class-token head lets the last block drop them all."""
        return [i for i, groups in enumerate(self.groups) if (groups >= 0).any()]


@torch.inference_mode()
def see(model: nn.Module, images: Tensor) -> list[ReducedView]:
    """Run an attached model and follow every patch.

    Args:
        model: attached, in evaluation mode.
        images: [B, C, H, W], as the model takes them.

    Returns:
        One for each image.

    Raises:
        LTMPError: nothing is attached, or the patches do not form a grid.
    """
    protected = attachment(model).body.protected
    with record() as calls:
        groups = patch_groups(model, images)[:, :, protected:].cpu()
    rows, columns = patch_grid(model, (images.shape[-2], images.shape[-1]), groups.shape[-1])
    grids = groups.unflatten(2, (rows, columns))
    kept = torch.cat(calls.kept).int().tolist()
    tokens, shares = calls.geometry[0].tokens, calls.share().tolist()
    return [ReducedView(grid, left, tokens, share) for grid, left, share in zip(grids, kept, shares, strict=True)]


@torch.inference_mode()
def patch_groups(model: nn.Module, images: Tensor) -> Tensor:
    """int32 [B, L, N], the groups of `ReducedView` for every token of `images` [B, C, H, W], prefix tokens first.

    Raises:
        LTMPError: nothing is attached.
    """
    attachment(model)
    with trace(every_block=True) as calls:
        _encode(model, images)
    return torch.cat(calls.blocks)


def _encode(model: nn.Module, images: Tensor) -> None:
    """Run what reads images: a model of images and text, by transformers or open_clip, is not asked about a text."""
    towers = (getattr(model, name, None) for name in ("get_image_features", "encode_image"))
    next((tower for tower in towers if tower is not None), model)(images)


def patch_grid(model: nn.Module, size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image of `size` (height, width) in pixels.

    By the patch size that a part of the model states, or else by square patches.

    Raises:
        LTMPError: neither gives as many as there are.
    """
    height, width = size
    square = (height * width / patches) ** 0.5
    for tall, wide in [*_patch_sizes(model), (square, square)]:
        rows, columns = round(height / tall), round(width / wide)
        if rows * columns == patches:
            return rows, columns
    raise LTMPError(
        f"{patches} patches of an image of {height} x {width} pixels form no grid that is known: "
        "use patch_groups, which needs none"
    )


def _patch_sizes(model: nn.Module) -> Iterator[tuple[float, float]]:
    for module in model.modules():
        stated: Any = getattr(module, "patch_size", None)
        pair = stated if isinstance(stated, tuple | list) else (stated, stated)
        if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair):
            yield pair[0], pair[1]
