"""What the thresholds are learned for: the task, from labels or from the dense model's own answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LTMPError
from ..stack import dense


@torch.no_grad()
def teacher(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, K] of the same model with nothing removed."""
    with dense():
        return model(images)


def task_loss(logits: Tensor, labels: Tensor | None, taught: Tensor | None) -> Tensor:
    """Cross-entropy to the labels, or to the dense model's probabilities where those are given.

    Args:
        logits: [B, K].
        labels: int64 [B], or None.
        taught: [B, K] logits of the dense model, or None.
    """
    if taught is not None:
        return F.kl_div(
            logits.float().log_softmax(-1), taught.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )
    if labels is None:
        raise LTMPError("there is nothing to learn from: give labels, or learn from the dense model (distill)")
    return F.cross_entropy(logits.float(), labels)
