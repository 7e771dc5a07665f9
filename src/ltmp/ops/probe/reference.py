"""A learned probe of a block's tokens: a metric for similarity, and how much the output depends on each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 64
"""Columns of a probe that similarity is measured on; two more predict the saliency of a token."""

LIFT = 64.0
"""Square of the constant coordinate of a probe's metric, relative to the mean squared length without it.

It makes cosines a function of distance: all are close to 1, and 1 - cosine is scaled up by 1 + LIFT.
"""

EPS = 1e-6
"""Epsilon of the layer norm."""


@torch.no_grad()
def probe(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a block's probe: a layer norm of each token's features, without weight and bias, then a linear map.

    Args:
        x: [..., C], features after the block's attention and its residual.
        weight: float32 [C + 1, WIDTH + 2]; the last row is the bias.

    Returns:
        float32 [..., WIDTH + 2]: WIDTH columns that similarity is measured on, then two log saliencies: how much the
        output depends on a patch of the token being moved, and being dropped, relative to other patches of the image.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), x.shape[-1:], eps=EPS) @ weight[:-1] + weight[-1]
