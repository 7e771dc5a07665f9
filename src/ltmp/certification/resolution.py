"""Lower resolution as a dial: the same model on smaller images, certified and timed for comparison with a budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..evaluate.baselines import AtResolution, at_resolution, patch_size

MAX_SIZES = 6
"""Most resolutions to try."""


@torch.no_grad()
def lower_resolutions(model: nn.Module, images: Tensor) -> list[tuple[float, AtResolution]]:
    """(FLOPs share, model) pairs for image sizes below the model's own, in steps of one patch, largest first.

    Empty if the model's image size is fixed, or its images are not square.

    Args:
        model: attached; it is copied, and does not change.
        images: [B, C, H, W] on its device; one is enough.
    """
    patch = patch_size(model)
    side = images.shape[-1]
    if not hasattr(model, "set_input_size") or patch == 1 or images.shape[-2] != side:
        return []
    try:
        sizes = range(side - patch, side // 2, -patch)[:MAX_SIZES]
        runs = [at_resolution(model, size, images) for size in sizes]
    except UsageError:
        return []
    return [(run.share, run.model) for run in runs if isinstance(run.model, AtResolution)]
