"""Paint an image by what became of its patches."""

from __future__ import annotations

from torch import Tensor

PRUNED = (0.45, 0.08, 0.08)
MERGED = (0.1, 0.55, 0.25)


def paint_groups(image: Tensor, groups: Tensor, grid: tuple[int, int], tint: float = 0.35) -> Tensor:
    """The image as the last block sees it.

    A patch that stands alone stays as it is; patches merged into one token take their mean colour and a green tint;
    pruned patches turn dark red.

    Args:
        image: [3, H, W] in [0, 1].
        groups: int64 [N], one row of `patch_groups` without the prefix tokens, numbered as there; negative is gone.
        grid: patches in a column and in a row; their product is N.
        tint: how much of the green goes into merged patches, in [0, 1].

    Returns:
        [3, H, W] in [0, 1].
    """
    rows, columns = grid
    height, width = image.shape[1] // rows, image.shape[2] // columns
    patches = image.unfold(1, height, height).unfold(2, width, width).flatten(1, 2).clone()  # [3, N, h, w]
    green, red = (image.new_tensor(colour)[:, None, None, None] for colour in (MERGED, PRUNED))
    for group in groups.unique():
        members = groups == group
        if group < 0:
            patches[:, members] = red
        elif members.sum() > 1:
            mean = patches[:, members].mean((1, 2, 3), keepdim=True)
            patches[:, members] = (1 - tint) * mean + tint * green
    blocks = patches.unflatten(1, (rows, columns)).permute(0, 1, 3, 2, 4)
    return blocks.reshape(3, rows * height, columns * width)
