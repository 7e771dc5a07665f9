"""What a learned probe reads from a token: where it stands in a space of what matters, and how much it matters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 64
"""Columns of a probe that similarity is measured on; two more say how much a token matters."""


LIFT = 64.0
"""How far a probe lifts tokens off the plane that it maps them to, in mean squares of their length there: so cosines go
by distance. They are near 1, and count this much more."""

EPS = 1e-6
"""Of the norm."""


@torch.no_grad()
def probe(x: Tensor, weight: Tensor) -> Tensor:
    """Read tokens through a block's probe: an affine map of their features, each token's normed by itself.

    Args:
        x: [..., C], the features that a block's attention left.
        weight: float32 [C + 1, WIDTH + 2], the last row is added.

    Returns:
        float32 [..., WIDTH + 2]: the columns that similarity is measured on, then the logarithms of how much it matters
        that a patch of the token is moved and that it is dropped, against others of the same image.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), x.shape[-1:], eps=EPS) @ weight[:-1] + weight[-1]
