"""Synthetic weights and images for measuring speed without real ones."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def randomize_weights(model: Model) -> Model:
    """Give the model random weights whose attention is not flat, so that importance and similarity vary by token."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=(1.5 if "qkv" in name else 1.0) / parameter.shape[1] ** 0.5)
        elif name.endswith("gamma"):
            parameter.fill_(0.5)
    return model


def smooth(count: int, size: int | tuple[int, int], channels: int = 3, seed: int = 0) -> Tensor:
    """[count, channels, height, width], noise whose neighbouring patches are similar, as in photographs.

    Some images are plain and some busy, so that token counts differ.
    """
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, max(1, height // 16), max(1, width // 16), generator=generator)
    busy = torch.rand(count, 1, 1, 1, generator=generator)
    images = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return images + 0.5 * busy * torch.randn(images.shape, generator=generator)
