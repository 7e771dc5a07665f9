"""Calibration: set thresholds block by block, in forward passes only, so that a batch follows a schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import dense, record
from ..engines.body import running
from ..hosts.attach import attachment, thresholds_of
from ..method.flops import Geometry
from ..method.thresholds import Thresholds
from .answers import Judge
from .inputs import Images, call
from .probe import learn_probe
from .randomness import preserved_random_state
from .schedule import Schedule, Shape, check_every, default_shape


@preserved_random_state()
def calibrate(model: nn.Module, images: Images, target: float, every: int = 1) -> None:
    """Set an attached model's thresholds so that `images` cost about `target`, block by block in one pass.

    If the model's scores need a probe and it has none, one is learned from these images first.

    Args:
        images: [B, 3, H, W] on the model's device, or keyword inputs; 128 or more give stable thresholds.
        target: FLOPs share.
        every: remove tokens in one of this many blocks, see `ltmp.learn_dial`.

    Raises:
        UsageError: `every` is out of range for this model.
    """
    thresholds = thresholds_of(model)
    check_every(every, thresholds.depth)
    if thresholds.config.needs_probe and thresholds.probe is None:
        learn_probe(model, images)
    shape = default_shape(target, thresholds.config.scores.matching)
    follow(model, images, shape, target, geometry_of(model, images), every=every)


@torch.inference_mode()
def geometry_of(model: nn.Module, images: Images) -> Geometry:
    """Geometry of the first of these images for an attached model."""
    with record() as calls, dense():
        call(model, images[:1])
    geometry = calls.geometry[0]
    # images of different sizes are represented by their mean
    return replace(geometry, tokens=round(fmean(geometry.each)), each=None) if geometry.each else geometry


@torch.inference_mode()
def follow(
    model: nn.Module,
    images: Images,
    shape: Shape,
    target: float,
    geometry: Geometry,
    judge: Judge | None = None,
    every: int = 1,
) -> Any:
    """Set an attached model's thresholds so that `images` follow a schedule of `shape` that costs about `target`.

    Args:
        images: [B, 3, H, W] on the model's device, or keyword inputs.
        geometry: geometry of these images, see `geometry_of`.
        judge: how answers are read; None returns the model's output unread.
        every: remove tokens in one of this many blocks.

    Returns:
        The model's answers in that pass, which are those it gives when deployed with these thresholds.
    """
    attached = attachment(model)
    body, thresholds = attached.body, attached.thresholds
    # if the head reads the prefix tokens alone, emptying the last block costs no accuracy
    last_free = body.prefix_only and "prune" in thresholds.config.steps
    schedule = shape.schedule(thresholds.depth, thresholds.config.steps, last_free, every)
    schedule = schedule.scaled_to(target, geometry, body.protected)
    calibrating = Calibrating(thresholds, schedule).to(images.device)
    with running(body=replace(body, policy=calibrating)):
        answers = call(model, images) if judge is None else judge.answers(model, images)
    thresholds.set(calibrating.merge.clamp(max=1), calibrating.prune.clamp(min=0))
    return answers


class Calibrating(Thresholds):
    """Thresholds that, as a batch reaches each block, set themselves to remove the scheduled part of its tokens."""

    def __init__(self, like: Thresholds, schedule: Schedule) -> None:
        super().__init__(like.depth, like.config)
        self.live = 0
        self.probe = like.probe
        self.rates = {"merge": schedule.merge.tolist(), "prune": schedule.prune.tolist()}
        self.eval()

    def active(self) -> tuple[tuple[bool, bool], ...]:
        return tuple((m > 0, p > 0) for m, p in zip(self.rates["merge"], self.rates["prune"], strict=True))

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        self.live = int(tokens.sum())
        return super().select(step, block, score, free, tokens)

    @torch.no_grad()
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        rate = self.rates[step][block]
        if math.isinf(rate):
            # no mean of attention weights exceeds 1
            self.prune[block] = 1.0
            return super().decide(step, block, score, free)
        scores = score[free].sort(descending=step == "merge").values
        count = scores.numel()
        if step == "merge":
            # the rate is a part of all tokens, of which only some may merge
            count = self.live if self.config.scores.mutual else 2 * count
        removed = min(round(count * (1 - math.exp(-rate))), scores.numel() - 1)
        if removed > 0:
            # halfway between the last token removed and the first one kept
            getattr(self, step)[block] = (scores[removed - 1] + scores[removed]) / 2
        return super().decide(step, block, score, free)
