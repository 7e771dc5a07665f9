"""Images kept apart from optimisation, on which thresholds are moved onto the budget and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..calls import record
from ..distributed import mean
from ..hosts.attach import thresholds_of
from .answers import CLASSES, Judge, teacher
from .inputs import Images, call
from .objective import task_loss
from .progress import Progress

TOLERANCE = 1e-3
TRIES = 10


@dataclass(frozen=True)
class Candidate:
    """Thresholds that meet the budget on the images kept apart.

    Attributes:
        merge, prune: float32 [L].
        share: deployed; loss: what they are judged by, see `HeldOut`.
        looks: how often the images were looked at.
    """

    merge: Tensor
    prune: Tensor
    share: float
    loss: float
    looks: int


class HeldOut:
    """An attached model and images that it is not optimised on; every rank has its own images.

    Args:
        images: [N, 3, H, W] on the model's device; batch: how many to run at once.
        taught_by: the model whose answers with nothing removed are the right ones; None is `model` itself.
        labels: [N, ...] or None, and `part`: the weight of their cross-entropy in the loss; the rest is the divergence
            from the dense model's answers.
        progress: called for each batch while a candidate is made.
        judge: how answers are read.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        batch: int,
        progress: Progress | None = None,
        taught_by: nn.Module | None = None,
        labels: Tensor | None = None,
        part: float = 0.0,
        judge: Judge = CLASSES,
    ) -> None:
        self.model = model
        self.taught_by = taught_by or model
        self.count = len(images)
        self.parts = images.split(batch)
        self.labels = [None] * len(self.parts) if labels is None else labels.split(batch)
        self.part = part
        self.judge = judge
        self.progress = progress
        self._done = 0

    def candidate(self, target: float, text: str = "meeting the budget") -> Candidate:
        """Move the model's thresholds onto the budget and judge them as deployed."""
        self._done = 0
        found = self.judged(*self.meet_budget(target))
        if self.progress is not None:
            self.progress(self._most, self._most, text)
        return found

    def judged(self, share: float | None = None, looks: int = 1) -> Candidate:
        """The model's thresholds as they are, whose share is looked at unless it is known."""
        share = self.share() if share is None else share
        thresholds = thresholds_of(self.model)
        values = (thresholds.merge.detach().cpu().clone(), thresholds.prune.detach().cpu().clone())
        return Candidate(*values, share, self.loss(), looks + 1)

    @torch.inference_mode()
    def share(self) -> float:
        """Mean deployed FLOPs share."""
        with record() as calls:
            for part in self.parts:
                call(self.model, part)
                self._tick(part)
        return float(mean(calls.share().double()))

    @torch.inference_mode()
    def loss(self) -> float:
        """Mean loss of the deployed model's answers."""
        losses = []
        for part, labels, answer in zip(self.parts, self.labels, self._answers, strict=True):
            logits = self.judge(self.model, part)
            losses.append(task_loss(logits, labels, answer, self.part, self.judge).double())
            self._tick(part)
        return float(mean(torch.cat(losses)))

    def meet_budget(self, target: float, tolerance: float = TOLERANCE, tries: int = TRIES) -> tuple[float, int]:
        """Move all thresholds together until the deployed share is `target`: bisection on one scalar.

        Returns:
            The share reached and how often the images were looked at.
        """
        thresholds = thresholds_of(self.model)
        merge, prune = thresholds.merge.detach().clone(), thresholds.prune.detach().clone()
        merges = merge < 1

        def move(shift: float) -> None:
            # one unit: 0.1 of cosine, and a factor e on importance
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
            # a small first step: learning ends near the budget
            shift = (low + high) / 2 if len(looks) > 1 else math.copysign(0.1, share - target)
        _, shift, share = min(looks)
        move(shift)
        return share, len(looks)

    @cached_property
    def _answers(self) -> list[Tensor]:
        """The dense model's, kept: they are the same for every candidate."""
        found = []
        for part in self.parts:
            found.append(teacher(self.taught_by, part, self.judge))
            self._tick(part)
        return found

    @property
    def _most(self) -> int:
        """Images that a candidate may take: every try, the dense answers and the loss."""
        return (TRIES + 2) * self.count

    def _tick(self, part: Images) -> None:
        self._done += len(part)
        if self.progress is not None:
            self.progress(self._done, self._most, "meeting the budget")
