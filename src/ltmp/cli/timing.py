"""From a time or a speed on the command line to a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UsageError
from ..evaluate.costs import measure_costs
from ..evaluate.latency import set_latency, speed
from ..hosts.attach import thresholds_of
from .options import SpeedOptions
from .progress import progress_bar
from .screen import say


@dataclass(frozen=True)
class Target:
    """How fast a batch is to be, by --milliseconds or --images-per-second."""

    milliseconds: float | None
    images_per_second: float | None

    @classmethod
    def of(cls, asked: SpeedOptions) -> Target | None:
        """The request, or None.

        Raises:
            UsageError: two targets, or several processes, which would time each other.
        """
        given = {
            "--budget": asked.budget,
            "--certified": 1.0 if asked.certified else None,
            "--milliseconds": asked.milliseconds,
            "--images-per-second": asked.images_per_second,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise UsageError(f"{' and '.join(names)} each set the dial: give one of them")
        if asked.milliseconds is None and asked.images_per_second is None:
            return None
        if distributed.started():
            raise UsageError(f"{names[0]} times one process: run it without torchrun, then give --budget to all")
        return cls(asked.milliseconds, asked.images_per_second)

    def meet(self, network: nn.Module, images: Tensor, amp: torch.dtype | None = None, quiet: bool = False) -> float:
        """Measure what blocks cost on batches like `images`, set the dial, and say to what; returns the share."""
        with progress_bar("measuring costs", None) as bar:
            costs = measure_costs(
                network, images, amp=amp, progress=lambda done, total: bar.reach(done, total, "measuring costs")
            )
        share = set_latency(network, costs, milliseconds=self.milliseconds, images_per_second=self.images_per_second)
        dial = thresholds_of(network).dial
        assert dial is not None
        seconds = costs.dense if share == 1 else float(costs.predict_seconds(dial.kept_at(share)))
        if not quiet:
            said = "dense is fast enough, all off" if share == 1 else f"budget {share:g}"
            say(f"{said}: {speed(seconds, len(images))} predicted for batches of {len(images)}")
        return share


def say_measured(images: int, images_per_second: float) -> None:
    """The time that came of it."""
    say(f"measured: {speed(images / images_per_second, images)}")
