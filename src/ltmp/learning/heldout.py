"""Held-out images, on which thresholds are moved onto the budget and evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..calls import record
from ..distributed import mean
from ..hosts.attach import thresholds_of
from .answers import CLASSES, Judge, dense_answers
from .inputs import Images, call
from .objective import task_loss
from .progress import Progress

TOLERANCE = 1e-3
"""Accepted difference of the deployed share from the target."""
TRIES = 10
"""Most steps of the bisection."""


@dataclass(frozen=True)
class Candidate:
    """Thresholds and how they do on the held-out images.

    Attributes:
        merge, prune: float32 [L].
        share: deployed FLOPs share.
        loss: what candidates are compared by, see `HeldOut`.
        looks: passes over the images that it took.
    """

    merge: Tensor
    prune: Tensor
    share: float
    loss: float
    looks: int


class HeldOut:
    """Images that an attached model is not optimised on; each rank has its own.

    Args:
        images: [N, 3, H, W] on the model's device.
        batch: images per batch.
        progress: called for each batch while a candidate is made.
        teacher: model whose answers, with nothing removed, are the targets; None is `model` itself.
        labels: [N, ...] or None.
        label_weight: weight of the cross-entropy with labels in the loss; the divergence from the dense model's answers
            has the rest.
        judge: how answers are read.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        batch: int,
        progress: Progress | None = None,
        teacher: nn.Module | None = None,
        labels: Tensor | None = None,
        label_weight: float = 0.0,
        judge: Judge = CLASSES,
    ) -> None:
        self.model = model
        self.teacher = teacher or model
        self.count = len(images)
        self.batches = images.split(batch)
        self.labels = [None] * len(self.batches) if labels is None else labels.split(batch)
        self.label_weight = label_weight
        self.judge = judge
        self.progress = progress
        self._done = 0

    def candidate(self, target: float) -> Candidate:
        """Move the model's thresholds onto the budget and evaluate them as deployed."""
        self._done = 0
        found = self.evaluate(*self.meet_budget(target))
        if self.progress is not None:
            self.progress(self._most, self._most, "meeting the budget")
        return found

    def evaluate(self, share: float | None = None, looks: int = 1) -> Candidate:
        """Evaluate the model's thresholds as they are.

        Args:
            share: their deployed share, if it is known; None measures it.
            looks: passes over the images that finding the share took.
        """
        share = self.share() if share is None else share
        thresholds = thresholds_of(self.model)
        merge, prune = thresholds.merge.detach().cpu().clone(), thresholds.prune.detach().cpu().clone()
        return Candidate(merge, prune, share, self.loss(), looks + 1)

    @torch.inference_mode()
    def share(self) -> float:
        """Mean deployed FLOPs share."""
        with record() as calls:
            for batch in self.batches:
                call(self.model, batch)
                self._tick(batch)
        return float(mean(calls.share().double()))

    @torch.inference_mode()
    def loss(self) -> float:
        """Mean loss of the deployed model's answers."""
        losses = []
        for batch, labels, dense in zip(self.batches, self.labels, self._dense_answers, strict=True):
            answers = self.judge.answers(self.model, batch)
            losses.append(task_loss(answers, labels, dense, self.label_weight, self.judge).double())
            self._tick(batch)
        return float(mean(torch.cat(losses)))

    def meet_budget(self, target: float, tolerance: float = TOLERANCE, tries: int = TRIES) -> tuple[float, int]:
        """Shift all thresholds together until the deployed share is `target`, by bisection on one scalar.

        Returns:
            The share reached and the number of passes over the images.
        """
        thresholds = thresholds_of(self.model)
        merge, prune = thresholds.merge.detach().clone(), thresholds.prune.detach().clone()
        merges = merge < 1

        def move(shift: float) -> None:
            # a shift of 1 is 0.1 in cosine similarity, and a factor of e in importance
            moved = torch.where(merges, (merge - 0.1 * shift).clamp(-1, 1 - 1e-6), merge)
            thresholds.set(moved, torch.where(prune < 1, (prune * math.exp(shift)).clamp(max=1 - 1e-6), prune))

        low, high, shift = -1.0, 1.0, 0.0
        looks: list[tuple[float, float, float]] = []
        while len(looks) < tries:
            move(shift)
            share = self.share()
            looks.append((abs(share - target), shift, share))
            if abs(share - target) <= tolerance:
                break
            low, high = (shift, high) if share > target else (low, shift)
            # the first step is small, because learning ends near the budget
            shift = (low + high) / 2 if len(looks) > 1 else math.copysign(0.1, share - target)
        _, shift, share = min(looks)
        move(shift)
        return share, len(looks)

    @cached_property
    def _dense_answers(self) -> list[Tensor]:
        """The dense model's answers, the same for every candidate."""
        answers = []
        for batch in self.batches:
            answers.append(dense_answers(self.teacher, batch, self.judge))
            self._tick(batch)
        return answers

    @property
    def _most(self) -> int:
        """Most images that a candidate processes: every try, the dense answers and the loss."""
        return (TRIES + 2) * self.count

    def _tick(self, batch: Images) -> None:
        self._done += len(batch)
        if self.progress is not None:
            self.progress(self._done, self._most, "meeting the budget")
