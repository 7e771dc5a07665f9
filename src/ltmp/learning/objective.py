"""What the thresholds are learned for: the task, from labels or from the dense model's own answers, and the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import dense, record
from ..distributed import gather, mean, total
from ..errors import LTMPError
from ..hosts.attach import thresholds_of
from ..hosts.outputs import logits_of
from .budget import budget_loss


@torch.no_grad()
def teacher(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, K] of the same model with nothing removed."""
    with dense():
        return logits_of(model(images))


def task_loss(logits: Tensor, labels: Tensor | None, taught: Tensor | None, part: float = 0.0) -> Tensor:
    """Of each image the divergence from the dense model's probabilities, the cross-entropy to its label, or a mixture.

    Args:
        logits: [B, K].
        labels: int64 [B], or None.
        taught: [B, K] logits of the dense model, or None.
        part: how much of the loss is from labels, in [0, 1].

    Returns:
        float32 [B].
    """
    loss = torch.zeros(len(logits), device=logits.device)
    if part < 1:
        if taught is None:
            raise LTMPError("the dense model's answers are part of the loss, and there are none")
        ours, theirs = logits.float().log_softmax(-1), taught.float().log_softmax(-1)
        loss = loss + (1 - part) * F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    if part > 0:
        if labels is None:
            raise LTMPError("there is nothing to learn from: give labels, or learn from the dense model (distill)")
        loss = loss + part * F.cross_entropy(logits.float(), labels, reduction="none")
    return loss


@dataclass(frozen=True)
class Objective:
    """What a step descends: task loss and budget loss of an attached model.

    Attributes:
        labels: part of the task loss that comes from labels; the rest comes from the dense model's answers.
        taught_by: whose answers with nothing removed those are.
        cast: autocast of the forward passes.
    """

    model: nn.Module
    target: float
    budget_weight: float
    labels: float
    taught_by: nn.Module
    cast: AbstractContextManager[Any]

    def gradients(self, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[float, float, list[float]]:
        """Leave in what trains the mean gradients of the next `count` batches, of all ranks' as of one large batch.

        Returns:
            Mean task loss, mean share and mean tokens after each block [L].

        Raises:
            LTMPError: the loss is not finite.
        """
        losses, shares, kept = [], [], []
        place = thresholds_of(self.model).merge.device
        for _ in range(count):
            images, labels = (t.to(place, non_blocking=True) for t in next(batches))
            with self.cast:
                taught = teacher(self.taught_by, images) if self.labels < 1 else None
                with record() as calls:
                    logits = logits_of(self.model(images))
            share = mean(calls.share())
            task = mean(task_loss(logits, labels, taught, self.labels))
            loss = task + budget_loss(share, self.target, self.budget_weight)
            if not loss.isfinite():
                raise LTMPError(
                    "the loss is not finite: look for NaN or infinity in the images and the model's weights, "
                    "or learn without amp"
                )
            (loss / count).backward()
            losses.append(task.detach())
            shares.append(share.detach())
            kept.append(calls.kept[0].detach().mean(0))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad = total(parameter.grad)
        tokens = gather(torch.stack(kept)).flatten(0, 1).mean(0).tolist()
        return float(torch.stack(losses).mean()), float(torch.stack(shares).mean()), tokens
