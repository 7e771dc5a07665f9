"""The objective of learning: the loss of the task, by labels or by the dense model's answers, and of the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import record
from ..distributed import gather, mean, total
from ..errors import LTMPError
from ..hosts.attach import thresholds_of
from .answers import CLASSES, NO_GRADIENTS, Distribution, Judge, teacher
from .budget import budget_loss
from .inputs import Images


def task_loss(
    logits: Tensor, labels: Tensor | None, taught: Tensor | None, part: float = 0.0,
    judge: Judge = CLASSES, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Loss of each image: divergence from the dense model's answer, cross-entropy with its label, or a mixture.

    Args:
        logits: [B, K]; with part 0, answers of any kind [B, ...].
        labels: [B], numbers of classes, or for a single logit 0 or 1; [B, K], probabilities; or None.
        taught: the dense model's, or None.
        part: weight of the cross-entropy, in [0, 1].
        judge: how answers are read; losses of independent outputs are summed.
        smoothing: share of a label that is spread over all classes.

    Returns:
        float32 [B].

    Raises:
        LTMPError: the labels or the dense model's answers are missing, or the labels do not fit the outputs.
    """
    logits, loss = logits.float(), torch.zeros(len(logits), device=logits.device)
    if part < 1:
        if taught is None:
            raise LTMPError("the dense model's answers are part of the loss, and there are none")
        loss = loss + (1 - part) * judge.divergence(logits, taught)
    if part > 0:
        if labels is None:
            raise LTMPError(
                "the batches have no labels to learn from: give (images, labels), or a dict with labels, or learn from "
                "the dense model's answers (distill=True, --distill)"
            )
        loss = loss + part * _cross_entropy(logits, labels, judge.distribution, smoothing)
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, distribution: Distribution, smoothing: float) -> Tensor:
    """[B], cross-entropy of the answers `logits` with the labels."""
    if distribution == "bernoulli":
        wanted = labels[:, None] if labels.ndim == 1 and logits.shape[1] == 1 else labels
        if wanted.shape != logits.shape or not ((wanted >= 0) & (wanted <= 1)).all():
            raise LTMPError(
                f"labels {list(labels.shape)} for {logits.shape[1]} independent outputs: expected a number from 0 to 1 "
                "for each output of each image"
            )
        return F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none").sum(-1)
    if labels.shape not in ((len(logits),), logits.shape):
        raise LTMPError(
            f"labels {list(labels.shape)} for {logits.shape[1]} classes: expected the number of a class for each "
            "image, or a probability for each class"
        )
    wanted = labels.long() if labels.ndim == 1 else labels.float()
    return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True)
class Objective:
    """Task loss and budget loss of an attached model, and their gradients.

    Attributes:
        labels: part of the task loss that comes from labels; the rest comes from the dense model's answers.
        taught_by: the model that gives those, with nothing removed.
        cast: autocast of the forward passes.
        judge: how answers are read.
        smoothing: of labels that are class numbers.
    """

    model: nn.Module
    target: float
    budget_weight: float
    labels: float
    taught_by: nn.Module
    cast: AbstractContextManager[Any]
    judge: Judge = CLASSES
    smoothing: float = 0.0

    def gradients(
        self, batches: Iterator[tuple[Images, Tensor | None]], count: int
    ) -> tuple[float, float, list[float]]:
        """Add to what trains the mean gradients of the next `count` batches, over all ranks as of one large batch.

        Returns:
            Mean task loss, mean share and mean tokens after each block [L].

        Raises:
            LTMPError: the loss is not finite.
        """
        losses, shares, kept = [], [], []
        place = thresholds_of(self.model).merge.device
        for _ in range(count):
            images, labels = next(batches)
            images = images.to(place, non_blocking=True)
            labels = None if labels is None else labels.to(place, non_blocking=True)
            with self.cast:
                taught = teacher(self.taught_by, images, self.judge) if self.labels < 1 else None
                with record() as calls:
                    logits = self.judge(self.model, images)
            share = mean(calls.share())
            task = mean(task_loss(logits, labels, taught, self.labels, self.judge, self.smoothing))
            loss = task + budget_loss(share, self.target, self.budget_weight)
            if not loss.requires_grad:
                raise LTMPError(NO_GRADIENTS.format("learn with views=0, or a dial"))
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
