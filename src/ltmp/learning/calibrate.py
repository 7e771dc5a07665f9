"""A start from forward passes only: thresholds set block by block so that the batch follows a schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import stack_of, thresholds_of
from ..stack import dense, record
from ..thresholds import Thresholds
from .budget import schedule

MERGE_FIRST = 0.9
"""Share of the tokens to remove that the calibrated start merges; the rest it prunes."""


class _Calibrating(Thresholds):
    """Thresholds that set themselves, at each block, to what selects the wanted number of tokens of this batch."""

    def __init__(self, model: Thresholds, kept: list[float], tokens: int, last_free: bool) -> None:
        super().__init__(model.depth, model.config)
        self.last_free = last_free
        before = [float(tokens), *kept[:-1]]
        self.removed = [b - k for b, k in zip(before, kept, strict=True)]
        steps = model.config.steps
        self.part = {
            step: 1.0 if len(steps) == 1 else MERGE_FIRST if step == "merge" else 1 - MERGE_FIRST for step in steps
        }
        self.eval()

    def active(self) -> tuple[tuple[bool, bool], ...]:
        return ((True, True),) * self.depth

    @torch.no_grad()
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        if self.last_free and block == self.depth - 1:
            # nothing reads these tokens any more: no mean of attention weights is above 1
            self.prune[block] = 1.0
            return super().decide(step, block, score, free)
        scores = score[free].sort(descending=step == "merge").values
        wanted = round(self.removed[block] * self.part[step] * score.shape[0])
        wanted = min(wanted, scores.numel() - 1)
        if wanted > 0:
            # halfway between the last that goes and the first that stays
            getattr(self, step)[block] = (scores[wanted - 1] + scores[wanted]) / 2
        return super().decide(step, block, score, free)


@torch.inference_mode()
def calibrate(model: nn.Module, images: Tensor, target: float) -> None:
    """Set an attached model's thresholds so that `images` cost about `target`, block after block in one pass.

    Args:
        images: [B, 3, H, W] on the model's device; 128 or more give stable thresholds.
        target: FLOPs share.
    """
    stack = stack_of(model)
    thresholds = thresholds_of(model)
    with record() as calls, dense():
        model(images[:1])
    geometry = calls.geometry[0]
    last_free = stack.prefix_only and "prune" in thresholds.config.steps
    kept = schedule(target, geometry, stack.protected, last_free)
    calibrating = _Calibrating(thresholds, kept, geometry.tokens, last_free).to(images.device)
    with stack.using(calibrating):
        model(images)
    thresholds.set(calibrating.merge.clamp(max=1), calibrating.prune.clamp(min=0))
