"""Paint an image by how its patches were merged and pruned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def paint_groups(image: Tensor, groups: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Paint the tokens after a block onto the image.

    A patch that is a token of its own stays as it is; patches merged into one token get their mean colour, with a thin
    border around them; pruned patches become dark grey and hatched. Borders are drawn at the size of the result, so
    they are equally thin on images of any size.

    Args:
        image: [3, H, W] in [0, 1], of any size and shape.
        groups: [rows, columns], the token that each patch is part of; negative means pruned.
        size: height and width of the result; the image's own by default.

    Returns:
        [3, height, width] in [0, 1].
    """
    height, width = size or (image.shape[1], image.shape[2])
    if (height, width) != tuple(image.shape[1:]):
        image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
    rows, columns = groups.shape
    y, x = torch.arange(height), torch.arange(width)
    patch = torch.arange(rows * columns).view(rows, columns)[y * rows // height][:, x * columns // width]
    # number the tokens without gaps; all pruned patches form the last group
    tokens, group = groups.masked_fill(groups < 0, torch.iinfo(groups.dtype).max).flatten().unique(return_inverse=True)
    patches = group.bincount(minlength=len(tokens))
    pruned = (groups < 0).flatten()
    merged = (patches[group] > 1) & ~pruned
    painted = torch.where(merged[patch], _group_means(image, group[patch], len(tokens)), image)
    stroke = max(1, round(min(height, width, 32 * height / rows, 32 * width / columns) / 250))
    painted = torch.where(_borders(group[patch], merged[patch], stroke), _contrast(painted), painted)
    return torch.where(pruned[patch], _hatched(image, stroke), painted)


def _group_means(image: Tensor, group: Tensor, groups: int) -> Tensor:
    """[3, H, W], each pixel replaced by the mean colour of its group [H, W]."""
    index = group.flatten()
    total = image.new_zeros(3, groups).index_add(1, index, image.flatten(1))
    return (total / index.bincount(minlength=groups).clamp_min(1))[:, group]


def _borders(group: Tensor, merged: Tensor, stroke: int) -> Tensor:
    """bool [H, W], the pixels of merged groups within a stroke of another group.

    Between two merged groups only one side is drawn, so the border has the same width everywhere.
    """
    border = torch.zeros_like(merged)
    # rows, then columns, through transposed views
    for g, m, b in ((group, merged, border), (group.T, merged.T, border.T)):
        differ = g[stroke:] != g[:-stroke]
        b[stroke:] |= differ & m[stroke:]
        b[:-stroke] |= differ & m[:-stroke] & ~m[stroke:]
    return border


def _contrast(image: Tensor) -> Tensor:
    """Darken light pixels and lighten dark ones, clearly."""
    light = image.mean(0, keepdim=True) > 0.4
    return torch.where(light, 0.55 * image, 0.55 * image + 0.45)


def _hatched(image: Tensor, stroke: int) -> Tensor:
    """The image in dark grey under thin diagonal lines, for pruned patches."""
    y, x = torch.arange(image.shape[1])[:, None], torch.arange(image.shape[2])
    line = (y + x) % (7 * stroke) < stroke
    return (0.06 + 0.3 * image.mean(0, keepdim=True) + 0.2 * line).expand(3, -1, -1)
