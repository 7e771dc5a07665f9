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


def answers_alone(model: nn.Module) -> bool:
    """Whether a model says of itself that each of its logits answers a question of its own (transformers' configs)."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "problem_type", None) == "multi_label_classification" for config in configs)


def task_loss(
    logits: Tensor, labels: Tensor | None, taught: Tensor | None, part: float = 0.0, alone: bool = False
) -> Tensor:
    """Of each image the divergence from the dense model's probabilities, the cross-entropy to its label, or a mixture.

    Probabilities are those of a softmax over the classes. Of heads with one logit, with labels [B, K], and where
    `alone` says so, each logit is a question of its own: the divergence is that of Bernoulli distributions, summed over
    the logits, and the cross-entropy is the binary one.

    Args:
        logits: [B, K].
        labels: int64 [B], or [B, K] between 0 and 1, or None.
        taught: [B, K] logits of the dense model, or None.
        part: how much of the loss is from labels, in [0, 1].
        alone: see `answers_alone`.

    Returns:
        float32 [B].
    """
    logits = logits.float()
    alone = alone or logits.shape[1] == 1 or (labels is not None and labels.shape == logits.shape)
    loss = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    if part < 1:
        if taught is None:
            raise LTMPError("the dense model's answers are part of the loss, and there are none")
        loss = loss + (1 - part) * (_bernoulli if alone else _softmax)(logits, taught.float())
    if part > 0:
        if labels is None:
            raise LTMPError("there is nothing to learn from: give labels, or learn from the dense model (distill)")
        if alone:
            wanted = labels.float().view_as(logits)
            found = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1)
        else:
            found = F.cross_entropy(logits, labels, reduction="none")
        loss = loss + part * found
    return loss


def _softmax(logits: Tensor, taught: Tensor) -> Tensor:
    """[B], the divergence between the probabilities of classes that exclude each other."""
    ours, theirs = logits.log_softmax(-1), taught.log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


def _bernoulli(logits: Tensor, taught: Tensor) -> Tensor:
    """[B], the divergence between the probabilities of answers that stand alone, summed over them."""
    chance = taught.sigmoid()
    yes = F.logsigmoid(taught) - F.logsigmoid(logits)
    no = F.logsigmoid(-taught) - F.logsigmoid(-logits)
    return (chance * yes + (1 - chance) * no).sum(-1)


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

    def gradients(self, batches: Iterator[tuple[Tensor, Any]], count: int) -> tuple[float, float, list[float]]:
        """Leave in what trains the mean gradients of the next `count` batches, of all ranks' as of one large batch.

        Returns:
            Mean task loss, mean share and mean tokens after each block [L].

        Raises:
            LTMPError: the loss is not finite.
        """
        losses, shares, kept = [], [], []
        alone = answers_alone(self.model)
        place = thresholds_of(self.model).merge.device
        for _ in range(count):
            images, labels = next(batches)
            images = images.to(place, non_blocking=True)
            labels = labels.to(place, non_blocking=True) if isinstance(labels, Tensor) else None
            with self.cast:
                taught = teacher(self.taught_by, images) if self.labels < 1 else None
                with record() as calls:
                    logits = logits_of(self.model(images))
            share = mean(calls.share())
            task = mean(task_loss(logits, labels, taught, self.labels, alone))
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
