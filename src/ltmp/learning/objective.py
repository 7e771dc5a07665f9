"""The learning objective: a task loss, from labels or from the dense model's answers, plus a budget loss."""

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
from .answers import CLASSES, NO_GRADIENTS, Distribution, Judge, dense_answers
from .budget import budget_loss
from .inputs import Images


def task_loss(
    answers: Tensor, labels: Tensor | None, dense: Tensor | None, label_weight: float = 0.0,
    judge: Judge = CLASSES, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Loss of each image: divergence from the dense model's answer, cross-entropy with its label, or a mixture.

    Args:
        answers: logits [B, K]; with label weight 0, answers of any kind [B, ...].
        labels: class indices [B], or for a single logit 0 or 1; probabilities [B, K]; or None.
        dense: the dense model's answers, or None.
        label_weight: weight of the cross-entropy, in [0, 1]; the divergence has the rest.
        judge: how answers are read; losses of independent outputs are summed.
        smoothing: share of a label that is spread over all classes.

    Returns:
        float32 [B].

    Raises:
        LTMPError: the labels or the dense model's answers are missing, or the labels do not fit the outputs.
    """
    answers, loss = answers.float(), torch.zeros(len(answers), device=answers.device)
    if label_weight < 1:
        if dense is None:
            raise LTMPError("the dense model's answers are part of the loss, and there are none")
        loss = loss + (1 - label_weight) * judge.divergence(answers, dense)
    if label_weight > 0:
        if labels is None:
            raise LTMPError(
                "the batches have no labels to learn from: give (images, labels), or a dict with labels, or learn from "
                "the dense model's answers (distill=True, --distill)"
            )
        loss = loss + label_weight * _cross_entropy(answers, labels, judge.distribution, smoothing)
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, distribution: Distribution, smoothing: float) -> Tensor:
    """[B], cross-entropy of logits [B, K] with the labels."""
    if distribution == "bernoulli":
        targets = labels[:, None] if labels.ndim == 1 and logits.shape[1] == 1 else labels
        if targets.shape != logits.shape or not ((targets >= 0) & (targets <= 1)).all():
            raise LTMPError(
                f"labels {list(labels.shape)} for {logits.shape[1]} independent outputs: expected a number from 0 to 1 "
                "for each output of each image"
            )
        return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").sum(-1)
    if labels.shape not in ((len(logits),), logits.shape):
        raise LTMPError(
            f"labels {list(labels.shape)} for {logits.shape[1]} classes: expected the number of a class for each "
            "image, or a probability for each class"
        )
    targets = labels.long() if labels.ndim == 1 else labels.float()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True)
class Objective:
    """Task loss and budget loss of an attached model, and their gradients.

    Attributes:
        label_weight: weight of the cross-entropy with labels in the task loss; the divergence from the teacher's
            answers has the rest.
        teacher: model whose answers, with nothing removed, are the targets; may be `model` itself.
        autocast: context of the forward passes.
        judge: how answers are read.
        smoothing: label smoothing.
    """

    model: nn.Module
    target: float
    budget_weight: float
    label_weight: float
    teacher: nn.Module
    autocast: AbstractContextManager[Any]
    judge: Judge = CLASSES
    smoothing: float = 0.0

    def gradients(
        self, batches: Iterator[tuple[Images, Tensor | None]], count: int
    ) -> tuple[float, float, list[float]]:
        """Add the mean gradients of the next `count` batches to all trainable parameters.

        Over all ranks, the gradients are those of one large batch.

        Returns:
            Mean task loss, mean share and mean tokens after each block [L].

        Raises:
            LTMPError: the loss is not finite, or the host computes no gradients.
        """
        losses, shares, kept = [], [], []
        device = thresholds_of(self.model).merge.device
        for _ in range(count):
            images, labels = next(batches)
            images = images.to(device, non_blocking=True)
            labels = None if labels is None else labels.to(device, non_blocking=True)
            with self.autocast:
                dense = dense_answers(self.teacher, images, self.judge) if self.label_weight < 1 else None
                with record() as calls:
                    answers = self.judge.answers(self.model, images)
            share = mean(calls.share())
            task = mean(task_loss(answers, labels, dense, self.label_weight, self.judge, self.smoothing))
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
