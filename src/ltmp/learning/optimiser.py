"""The state of an optimisation, and its step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..method.thresholds import Thresholds
from .heldout import Candidate
from .resume import frozen
from .schedule import idle
from .weights import Weights


@dataclass(frozen=True)
class Step:
    """One optimisation step, for progress and logs.

    Attributes:
        step, steps: this one, counted from 1, and how many there will be.
        loss: task loss; share: mean FLOPs share of the step's images.
        seconds: since learning (or its continuation) began.
        kept: mean tokens after each block, [L].
    """

    step: int
    steps: int
    loss: float
    share: float
    seconds: float
    kept: list[float] = field(default_factory=list)


class ThresholdOptimiser:
    """The thresholds as the optimiser sees them: the merge threshold as it is, the prune threshold by its logarithm.

    Importance lives near 1/N; a step in its logarithm means the same for every model and block.

    Args:
        steps: that will be taken.
        every: of how many blocks one learns; the others keep the thresholds that the run starts with.
    """

    RATES: ClassVar = {"merge": 4e-3, "prune": 0.06}
    FULL_RUN = 250
    AVERAGED = 0.3

    def __init__(self, thresholds: Thresholds, lr: float, steps: int, every: int = 1) -> None:
        self.thresholds = thresholds
        self.idle = idle(thresholds.depth, every).to(thresholds.merge.device)
        self.steps = steps
        self.names = thresholds.config.steps
        self.latent = {name: torch.zeros_like(getattr(thresholds, name).data) for name in self.names}
        self.mean = {name: torch.zeros_like(value) for name, value in self.latent.items()}
        # Adam's steps are all of one size at first: a short run takes smaller ones, or it would end in their noise
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
        self.completed: dict[str, Any] = {}

    def begin(self, start: Candidate) -> None:
        """Take the thresholds as they are: those of `start`."""
        self.start = start
        for name, latent in self.latent.items():
            latent.copy_(self.to_latent(name, getattr(self.thresholds, name).data))

    def update(self) -> None:
        """One step of the optimiser from the gradients that the thresholds hold; without any, they wait."""
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
        """Set the average of the last steps: single steps are noisy."""
        self.write(self.mean)

    def write(self, latent: dict[str, Tensor]) -> None:
        for name, value in latent.items():
            own = getattr(self.thresholds, name).data
            started = getattr(self.start, name).to(own.device)
            own.copy_(torch.where(self.idle, started, self.to_threshold(name, value)))

    def to_latent(self, name: str, threshold: Tensor) -> Tensor:
        """The number [L] that is optimised, from the threshold."""
        return threshold.clamp_min(1e-6).log() if name == "prune" else threshold

    def to_threshold(self, name: str, latent: Tensor) -> Tensor:
        """The threshold [L] from the number that is optimised."""
        return latent.exp().clamp(max=1) if name == "prune" else latent.clamp(-1, 1)

    def gradient(self, name: str, threshold: Tensor) -> Tensor:
        """Gradient [L] of the number that is optimised, from that of the threshold."""
        assert threshold.grad is not None
        if name == "prune":
            # a threshold of 1 drops all there is, on purpose (see calibrate): it stays
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

    def complete(self, weights: Weights | None = None) -> None:
        """Remember the state between two steps, with that of weights that train along: it is what may be saved.

        What an interrupt leaves half done in the next step is not seen: the copy is whole before it gets its name.
        """
        along = {} if weights is None else {"tuned": weights.state()}
        self.completed = frozen({**self.state(), **along})

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where a saved run was.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        if not 0 <= saved["step"] <= self.steps or len(saved["history"]) != saved["step"]:
            raise ValueError(f"step {saved['step']} of {self.steps}")
        for kind in ("latent", "mean"):
            for name, own in getattr(self, kind).items():
                if saved[kind][name].shape != own.shape or not saved[kind][name].isfinite().all():
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
