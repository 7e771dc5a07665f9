"""A start from forward passes only: thresholds set block by block so that the batch follows a schedule."""

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
from .schedule import Schedule, Shape, check_every, usual


class Calibrating(Thresholds):
    """Thresholds that set themselves, at each block, to what removes the wanted part of this batch's tokens."""

    def __init__(self, like: Thresholds, schedule: Schedule) -> None:
        super().__init__(like.depth, like.config)
        self.there = 0
        self.probe = like.probe
        self.rates = {"merge": schedule.merge.tolist(), "prune": schedule.prune.tolist()}
        self.eval()

    def active(self) -> tuple[tuple[bool, bool], ...]:
        return tuple((m > 0, p > 0) for m, p in zip(self.rates["merge"], self.rates["prune"], strict=True))

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        self.there = int(tokens.sum())
        return super().select(step, block, score, free, tokens)

    @torch.no_grad()
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        rate = self.rates[step][block]
        if math.isinf(rate):
            # no mean of attention weights is above 1
            self.prune[block] = 1.0
            return super().decide(step, block, score, free)
        scores = score[free].sort(descending=step == "merge").values
        count = scores.numel()
        if step == "merge":
            # only some of the tokens may merge, so that of these more than the wanted part must
            count = self.there if self.config.scores.mutual else 2 * count
        wanted = min(round(count * (1 - math.exp(-rate))), scores.numel() - 1)
        if wanted > 0:
            # halfway between the last that goes and the first that stays
            getattr(self, step)[block] = (scores[wanted - 1] + scores[wanted]) / 2
        return super().decide(step, block, score, free)


@torch.inference_mode()
def geometry_of(model: nn.Module, images: Images) -> Geometry:
    """Geometry of one of these images for an attached model."""
    with record() as calls, dense():
        call(model, images[:1])
    found = calls.geometry[0]
    # of images of several sizes, one that stands for all
    return replace(found, tokens=round(fmean(found.each)), each=None) if found.each else found


@preserved_random_state()
def calibrate(model: nn.Module, images: Images, target: float, every: int = 1) -> None:
    """Set an attached model's thresholds so that `images` cost about `target`, block after block in one pass.

    Where the model's scores ask for a probe and there is none, one is learned of these images first.

    Args:
        images: [B, 3, H, W] on the model's device, or keywords; 128 or more give stable thresholds.
        target: FLOPs share.
        every: of how many blocks one removes tokens, see `ltmp.learn_dial`.

    Raises:
        UsageError: `every` is no such number.
    """
    thresholds = thresholds_of(model)
    check_every(every, thresholds.depth)
    if thresholds.config.needs_probe and thresholds.probe is None:
        learn_probe(model, images)
    shape = usual(target, thresholds.config.scores.matching)
    follow(model, images, shape, target, geometry_of(model, images), every=every)


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
        images: [B, 3, H, W] on the model's device, or keywords.
        geometry: what an image of these costs, see `geometry_of`.
        judge: how answers are read; None: not at all.
        every: of how many blocks one removes tokens.

    Returns:
        What the model answers in that pass, which is what it will answer when deployed with these thresholds.
    """
    made = attachment(model)
    body, thresholds = made.body, made.thresholds
    # an emptied last block is free where the head reads the prefix tokens alone
    last_free = body.prefix_only and "prune" in thresholds.config.steps
    schedule = shape.schedule(thresholds.depth, thresholds.config.steps, last_free, every)
    schedule = schedule.to_cost(target, geometry, body.protected)
    calibrating = Calibrating(thresholds, schedule).to(images.device)
    with running(body=replace(body, policy=calibrating)):
        found = call(model, images) if judge is None else judge(model, images)
    thresholds.set(calibrating.merge.clamp(max=1), calibrating.prune.clamp(min=0))
    return found
