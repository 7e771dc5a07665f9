"""Lower resolution as a dial: the same model at smaller images, to certify and to time beside a budget."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import record
from ..hosts.attach import detach
from ..method.flops import Geometry, block_costs

MOST = 6
"""Resolutions to try."""


class AtResolution(nn.Module):
    """A model that takes images of its own size and looks at them smaller.

    Args:
        model: of timm, with `set_input_size`; it is changed to the size.
        size: pixels a side.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        resized: Any = model
        resized.set_input_size((size, size))
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Any:
        return self.model(F.interpolate(images, self.size, mode="bicubic", antialias=True))

    def forward_features(self, images: Tensor) -> Any:
        """For embeddings."""
        model: Any = self.model
        return model.forward_features(F.interpolate(images, self.size, mode="bicubic", antialias=True))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """For embeddings."""
        model: Any = self.model
        return model.forward_head(features, pre_logits=pre_logits)


@torch.no_grad()
def lower_resolutions(model: nn.Module, images: Tensor) -> list[tuple[float, AtResolution]]:
    """(FLOPs share, model) for sizes below the model's own, a patch a step, largest first; none where it is fixed.

    Args:
        model: attached; it is copied, and stays as it is.
        images: [B, C, H, W] on its device, one is enough.
    """
    embed: Any = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    side = images.shape[-1]
    if not hasattr(model, "set_input_size") or patch is None or images.shape[-2] != side:
        return []
    with record() as calls:
        model(images[:1])
    whole = calls.geometry[0]
    prefix = whole.tokens - (side // patch[0]) ** 2
    found = []
    for size in range(side - patch[0], side // 2, -patch[0])[:MOST]:
        # hosts with fixed positions refuse in their own ways
        try:
            smaller = AtResolution(detach(copy.deepcopy(model)), size)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            return []
        found.append((share_of(prefix + (size // patch[0]) ** 2, whole), smaller))
    return found


def share_of(tokens: int, whole: Geometry) -> float:
    """FLOPs share of a model that begins with fewer tokens and keeps them."""
    few, all_of_them = (torch.full((whole.depth,), float(count)) for count in (tokens, whole.tokens))
    return float(block_costs(few, few, whole).sum() / block_costs(all_of_them, all_of_them, whole).sum())
