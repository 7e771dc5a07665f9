"""Follow patches through a reduced model: which token each one is part of after each block."""

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
        groups: int32 [L, rows, columns]: the token that each patch is part of after each block, or -1 - l if block l
            pruned the patch. A token's number identifies it only within its block.
        kept: number of tokens after each block, prefix tokens included.
        tokens: number of tokens before the first block.
        share: fraction of the dense model's FLOPs.
        answers: the predictions of the dense and the reduced model, as text; may be empty.
    """

    groups: Tensor
    kept: list[int]
    tokens: int
    share: float
    answers: str = ""

    @property
    def left(self) -> int:
        """Number of tokens after the last block that leaves patches."""
        shown = self.shown_blocks()
        return self.kept[shown[-1] if shown else -1]

    def shown_blocks(self) -> list[int]:
        """Indices of the blocks after which patches are left.

        The last block can drop all of them if the head reads only the class token.
        """
        return [i for i, groups in enumerate(self.groups) if (groups >= 0).any()]


@torch.inference_mode()
def see(model: nn.Module, images: Tensor) -> list[ReducedView]:
    """Run an attached model and follow every patch.

    Args:
        model: attached, in evaluation mode.
        images: [B, C, H, W], as the model takes them.

    Returns:
        The reduction of each image.

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
    """Return `ReducedView.groups` for all tokens of `images` [B, C, H, W]: int32 [B, L, N], prefix tokens first.

    Raises:
        LTMPError: nothing is attached.
    """
    attachment(model)  # raises if nothing is attached
    with trace(every_block=True) as calls:
        _encode(model, images)
    return torch.cat(calls.blocks)


def _encode(model: nn.Module, images: Tensor) -> None:
    """Run the image tower of a model of images and text (transformers or open_clip), which needs no text then."""
    towers = (getattr(model, name, None) for name in ("get_image_features", "encode_image"))
    next((tower for tower in towers if tower is not None), model)(images)


def patch_grid(model: nn.Module, size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Return the rows and columns of the patch grid of an image of `size` (height, width) in pixels.

    Tries the patch sizes that modules of the model state, then square patches.

    Raises:
        LTMPError: no patch size gives `patches` patches.
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
        size: Any = getattr(module, "patch_size", None)
        pair = size if isinstance(size, tuple | list) else (size, size)
        if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair):
            yield pair[0], pair[1]
