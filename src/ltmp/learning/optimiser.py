"""The optimiser of thresholds: its state, and its step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..method.thresholds import Thresholds
from .heldout import Candidate
from .resume import frozen
from .schedule import idle_blocks
from .weights import Weights


@dataclass(frozen=True)
class Step:
    """One optimisation step, for progress and logs.

    Attributes:
        step: number of this step, from 1.
        steps: number of steps in the run.
        loss: task loss.
        share: mean FLOPs share of the step's images.
        seconds: since learning began or was resumed.
        kept: mean tokens after each block, [L].
    """

    step: int
    steps: int
    loss: float
    share: float
    seconds: float
    kept: list[float] = field(default_factory=list)


class ThresholdOptimiser:
    """Adam on the thresholds' latent values: merge thresholds as they are, prune thresholds as logarithms.

    Importance is near 1/N; a step in its logarithm has the same effect in every model and block.

    Args:
        lr: factor on the learning rates `RATES`.
        steps: number of steps that will be taken.
        every: learn the thresholds of one in this many blocks; the others keep those that the run starts with.

    Attributes:
        RATES: learning rates of a run of `FULL_RUN` steps or more.
        AVERAGED: part of the run, at its end, whose thresholds are averaged.
        latent: the optimised values [L] by step name.
        mean: their average over the last steps.
        start: the thresholds that the run starts with.
        snapshot: the state after the last completed step, see `take_snapshot`.
    """

    RATES: ClassVar = {"merge": 4e-3, "prune": 0.06}
    FULL_RUN = 250
    AVERAGED = 0.3

    def __init__(self, thresholds: Thresholds, lr: float, steps: int, every: int = 1) -> None:
        self.thresholds = thresholds
        self.idle = idle_blocks(thresholds.depth, every).to(thresholds.merge.device)
        self.steps = steps
        self.names = thresholds.config.steps
        self.latent = {name: torch.zeros_like(getattr(thresholds, name).data) for name in self.names}
        self.mean = {name: torch.zeros_like(value) for name, value in self.latent.items()}
        # Adam's first steps all have the same size: a short run takes smaller ones, or it would end in their noise
        lr *= min(1.0, math.sqrt(max(1, steps) / self.FULL_RUN))
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            [{"params": [self.latent[name]], "lr": lr * self.RATES[name]} for name in self.names], betas=(0.9, 0.99)
        )
        self.schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )
        self.start: Candidate
        self.step = 0
        self.history: list[Step] = []
        self.snapshot: dict[str, Any] = {}

    def begin(self, start: Candidate) -> None:
        """Start from the thresholds as they are, which are those of `start`."""
        self.start = start
        for name, latent in self.latent.items():
            latent.copy_(self.to_latent(name, getattr(self.thresholds, name).data))

    def update(self) -> None:
        """Take one step with the gradients that the thresholds hold; without gradients the thresholds stay."""
        moved = False
        for name, latent in self.latent.items():
            threshold = getattr(self.thresholds, name)
            if threshold.grad is None:
                continue
            moved = True
            latent.grad = self.gradient(name, threshold)
            threshold.grad = None
        if moved:
            self.optimizer.step()
        self.schedule.step()
        self.step += 1
        first = int(self.steps * (1 - self.AVERAGED))
        if self.step > first:
            for name, mean in self.mean.items():
                mean.lerp_(self.latent[name], 1 / (self.step - first))
        self.write(self.latent)

    def finish(self) -> None:
        """Set the thresholds to their average over the last steps, because single steps are noisy."""
        self.write(self.mean)

    def write(self, latent: dict[str, Tensor]) -> None:
        """Set the thresholds to latent values; idle blocks keep those of the start."""
        for name, value in latent.items():
            threshold = getattr(self.thresholds, name).data
            start = getattr(self.start, name).to(threshold.device)
            threshold.copy_(torch.where(self.idle, start, self.to_threshold(name, value)))

    def to_latent(self, name: str, threshold: Tensor) -> Tensor:
        """The latent value [L] of a threshold [L]."""
        return threshold.clamp_min(1e-6).log() if name == "prune" else threshold

    def to_threshold(self, name: str, latent: Tensor) -> Tensor:
        """The threshold [L] of a latent value [L]."""
        return latent.exp().clamp(max=1) if name == "prune" else latent.clamp(-1, 1)

    def gradient(self, name: str, threshold: Tensor) -> Tensor:
        """Gradient [L] with respect to the latent value, from that of the threshold."""
        assert threshold.grad is not None
        if name == "prune":
            # a threshold of 1 drops every token, on purpose (see calibrate), and stays
            return threshold.grad * threshold.data * (threshold.data < 1)
        return threshold.grad

    def state(self) -> dict[str, Any]:
        return {
            "start": asdict(self.start),
            "step": self.step,
            "latent": self.latent,
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": list(self.history),
        }

    def take_snapshot(self, weights: Weights | None = None) -> None:
        """Copy the state between two steps, with that of weights that train along: checkpoints are made of it.

        An interrupt in the middle of the next step cannot corrupt it, as the copy is complete before it is assigned.
        """
        tuned = {} if weights is None else {"tuned": weights.state()}
        self.snapshot = frozen({**self.state(), **tuned})

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        if not 0 <= saved["step"] <= self.steps or len(saved["history"]) != saved["step"]:
            raise ValueError(f"step {saved['step']} of {self.steps}")
        for kind in ("latent", "mean"):
            for name, value in getattr(self, kind).items():
                if saved[kind][name].shape != value.shape or not saved[kind][name].isfinite().all():
                    raise ValueError(f"{kind} {name}")
        self.start = Candidate(**saved["start"])
        self.step = saved["step"]
        for name in self.names:
            self.latent[name].copy_(saved["latent"][name])
            self.mean[name].copy_(saved["mean"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.history = [Step(**step) for step in saved["history"]]
        self.write(self.latent)
