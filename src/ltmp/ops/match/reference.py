"""The best partner of every even token, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def match(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """For each even token its most similar odd token (paper, section 3.2: bipartite matching by parity).

    Args:
        metric: float32 [B, N, D] unit vectors in the current order.
        free: bool [B, N]; False for tokens that are gone or protected: they neither merge nor receive.

    Returns:
        best: float32 [B, ceil(N/2)], cosine to the best partner, -inf where there is none.
        partner: int64 [B, ceil(N/2)], which odd token: 0 is the token at place 1.
    """
    # no .contiguous() copies: matmul takes the strided halves as they are
    with torch.autocast(metric.device.type, enabled=False):
        cosine = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    possible = free[:, ::2, None] & free[:, None, 1::2]
    best, partner = cosine.masked_fill_(~possible, float("-inf")).max(-1)
    return best, partner
