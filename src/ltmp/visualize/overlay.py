"""Paint an image by what became of its patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def paint_groups(image: Tensor, groups: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The image as a block leaves it.

    A patch that stands alone stays as it is; patches merged into one token take their mean colour, with a thin border
    around them; pruned patches are grey, dark and hatched. Everything is drawn at the size that is asked for: borders
    are as thin on a small image.

    Args:
        image: [3, H, W] in [0, 1], of any size and shape.
        groups: [rows, columns], the token that each patch is part of; negative is pruned.
        size: height and width of the result; the image's own by default.

    Returns:
        [3, height, width] in [0, 1].
    """
    height, width = size or (image.shape[1], image.shape[2])
    if (height, width) != tuple(image.shape[1:]):
        image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
    rows, columns = groups.shape
    down, right = torch.arange(height), torch.arange(width)
    cell = torch.arange(rows * columns).view(rows, columns)[down * rows // height][:, right * columns // width]
    # tokens numbered without gaps, the pruned patches together last
    names, group = groups.masked_fill(groups < 0, torch.iinfo(groups.dtype).max).flatten().unique(return_inverse=True)
    members = group.bincount(minlength=len(names))
    pruned = (groups < 0).flatten()
    merged = (members[group] > 1) & ~pruned
    painted = torch.where(merged[cell], _means(image, group[cell], len(names)), image)
    stroke = max(1, round(min(height, width, 32 * height / rows, 32 * width / columns) / 250))
    painted = torch.where(_borders(group[cell], merged[cell], stroke), _contrast(painted), painted)
    return torch.where(pruned[cell], _hatched(image, stroke), painted)


def _means(image: Tensor, group: Tensor, groups: int) -> Tensor:
    """[3, H, W], every pixel with the mean colour of its group [H, W]."""
    at = group.flatten()
    total = image.new_zeros(3, groups).index_add(1, at, image.flatten(1))
    return (total / at.bincount(minlength=groups).clamp_min(1))[:, group]


def _borders(group: Tensor, merged: Tensor, stroke: int) -> Tensor:
    """bool [H, W], the pixels of merged groups within a stroke of another group; between two of them on one side."""
    near = torch.zeros_like(merged)
    for g, m, n in ((group, merged, near), (group.T, merged.T, near.T)):
        differ = g[stroke:] != g[:-stroke]
        n[stroke:] |= differ & m[stroke:]
        n[:-stroke] |= differ & m[:-stroke] & ~m[stroke:]
    return near


def _contrast(image: Tensor) -> Tensor:
    """Every pixel a good deal darker where it is light, and lighter where it is dark."""
    light = image.mean(0, keepdim=True) > 0.4
    return torch.where(light, 0.55 * image, 0.55 * image + 0.45)


def _hatched(image: Tensor, stroke: int) -> Tensor:
    """A pruned patch as it is drawn: a dark grey shadow under thin diagonal lines."""
    down, right = torch.arange(image.shape[1])[:, None], torch.arange(image.shape[2])
    line = (down + right) % (7 * stroke) < stroke
    return (0.06 + 0.3 * image.mean(0, keepdim=True) + 0.2 * line).expand(3, -1, -1)
