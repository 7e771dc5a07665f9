"""The paper's own training: SGD on the plain thresholds, from a fixed start, without calibration afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from ..method.thresholds import Thresholds
from .optimiser import ThresholdOptimiser

SMOOTHING = 0.1
"""Label smoothing of the cross-entropy."""
TAU = 0.5
"""Temperature in the paper's command; its text also mentions 0.1."""
BATCH = 128
HELD_OUT = 0.02
"""Part of the images that is held out."""


class PaperOptimiser(ThresholdOptimiser):
    """SGD without momentum on the plain thresholds, clamped to [0, 1], with separate rates (paper, section 4.1).

    Merge thresholds start at 0.9 and prune thresholds at 0, and the run ends with those of its last step.
    """

    RATES: ClassVar = {"merge": 5e-3, "prune": 5e-6}

    def __init__(self, thresholds: Thresholds, lr: float, steps: int, every: int = 1) -> None:
        super().__init__(thresholds, lr, steps, every)
        self.optimizer = torch.optim.SGD(
            [{"params": [self.latent[name]], "lr": lr * self.RATES[name]} for name in self.names]
        )
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    def to_latent(self, name: str, threshold: Tensor) -> Tensor:
        """The threshold itself."""
        return threshold

    def to_threshold(self, name: str, latent: Tensor) -> Tensor:
        """The latent value, clamped in place to [0, 1]."""
        return latent.clamp_(0, 1)

    def gradient(self, name: str, threshold: Tensor) -> Tensor:
        """The threshold's own gradient."""
        assert threshold.grad is not None
        return threshold.grad

    def finish(self) -> None:
        """Keep the thresholds of the last step."""
        self.write(self.latent)


@contextmanager
def linear_gradients(thresholds: Thresholds, enabled: bool) -> Iterator[None]:
    """If enabled, take the prune decision's gradient from a sigmoid of plain importance (paper, equation 8) inside."""
    thresholds.log_prune = not enabled
    try:
        yield
    finally:
        thresholds.log_prune = True
