"""The objective of learning: the loss of the task, by labels or by the dense model's answers, and of the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import dense, record
from ..distributed import gather, mean, total
from ..errors import LTMPError
from ..hosts.attach import thresholds_of
from ..hosts.outputs import logits_of
from .budget import budget_loss

Distribution = Literal["categorical", "bernoulli"]
"""How logits are read: one answer of several, by a softmax, or independent yes-or-no answers, each by a sigmoid."""


def answers_in(output: Any) -> Tensor:
    """Logits [B, K] in what a classifier returned; [B] of a binary one become [B, 1].

    Raises:
        LTMPError: there are none, or not one row an image.
    """
    logits = logits_of(output)
    if logits.ndim == 1:
        return logits[:, None]
    if logits.ndim != 2:
        raise LTMPError(f"the model's logits are {list(logits.shape)}: expected one row an image, [B, K]")
    return logits


def distribution_of(model: nn.Module, logits: Tensor, labels: Tensor | None = None) -> Distribution:
    """Whether a model's outputs exclude each other or are independent of each other.

    Independent are a single logit, the outputs of a transformers model whose `problem_type` is
    "multi_label_classification", and outputs of which labels mark several in an image, or none.

    Args:
        logits: [B, K], see `answers_in`.
        labels: some of the data set's, or None.
    """
    several = False
    if labels is not None and labels.ndim == 2 and labels.shape[1] == logits.shape[1]:
        several = bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) != 1).any())
    told = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return "bernoulli" if logits.shape[1] == 1 or told or several else "categorical"


@torch.no_grad()
def teacher(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, K] of the same model with nothing removed."""
    with dense():
        return answers_in(model(images))


def task_loss(
    logits: Tensor, labels: Tensor | None, taught: Tensor | None, part: float = 0.0,
    distribution: Distribution = "categorical", smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Loss of each image: divergence from the dense model's answer, cross-entropy with its label, or a mixture.

    Args:
        logits: [B, K].
        labels: [B], numbers of classes, or for a single logit 0 or 1; [B, K], probabilities; or None.
        taught: [B, K] logits of the dense model, or None.
        part: weight of the cross-entropy, in [0, 1].
        distribution: of the answers; losses of independent outputs are summed.
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
        loss = loss + (1 - part) * _divergence(logits, taught.float(), distribution)
    if part > 0:
        if labels is None:
            raise LTMPError(
                "the batches have no labels to learn from: give (images, labels), or a dict with labels, or learn from "
                "the dense model's answers (distill=True, --distill)"
            )
        loss = loss + part * _cross_entropy(logits, labels, distribution, smoothing)
    return loss


def _divergence(logits: Tensor, taught: Tensor, distribution: Distribution) -> Tensor:
    """[B], Kullback-Leibler divergence of the answers `logits` from `taught`."""
    if distribution == "categorical":
        ours, theirs = logits.log_softmax(-1), taught.log_softmax(-1)
        return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    found = torch.zeros_like(logits)
    for sign in (1, -1):
        ours, theirs = F.logsigmoid(sign * logits), F.logsigmoid(sign * taught)
        found = found + F.kl_div(ours, theirs, log_target=True, reduction="none")
    return found.sum(-1)


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
        distribution: of the model's answers.
        smoothing: of labels that are class numbers.
    """

    model: nn.Module
    target: float
    budget_weight: float
    labels: float
    taught_by: nn.Module
    cast: AbstractContextManager[Any]
    distribution: Distribution = "categorical"
    smoothing: float = 0.0

    def gradients(
        self, batches: Iterator[tuple[Tensor, Tensor | None]], count: int
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
            images, labels = (None if t is None else t.to(place, non_blocking=True) for t in next(batches))
            assert images is not None
            with self.cast:
                taught = teacher(self.taught_by, images) if self.labels < 1 else None
                with record() as calls:
                    logits = answers_in(self.model(images))
            share = mean(calls.share())
            task = mean(task_loss(logits, labels, taught, self.labels, self.distribution, self.smoothing))
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
