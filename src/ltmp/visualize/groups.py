"""Which patch became which token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import stack_of
from ..sources import trace


@torch.inference_mode()
def patch_groups(model: nn.Module, images: Tensor) -> Tensor:
    """Follow every token of `images` through the blocks of an attached model.

    Args:
        model: attached, in evaluation mode.
        images: [B, C, H, W].

    Returns:
        int32 [B, L, N]: after each block, the number of the token that each input token is part of, which names that
        token in its block alone, or -1 - l where block l pruned it. Prefix tokens come first.

    Raises:
        LTMPError: nothing is attached.
    """
    stack_of(model)
    with trace(every_block=True) as calls:
        model(images)
    return torch.cat(calls.blocks)
