"""The budget that meets a time or a speed given on the command line."""

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
from .screen import print_result


@dataclass(frozen=True)
class Target:
    """How fast a batch has to run: the value of --milliseconds or of --images-per-second."""

    milliseconds: float | None
    images_per_second: float | None

    @classmethod
    def from_options(cls, options: SpeedOptions) -> Target | None:
        """Return the requested target, or None.

        Raises:
            UsageError: more than one option sets the dial, or several processes would disturb each other's timing.
        """
        values = {
            "--budget": options.budget,
            "--certified": 1.0 if options.certified else None,
            "--milliseconds": options.milliseconds,
            "--images-per-second": options.images_per_second,
        }
        names = [name for name, value in values.items() if value is not None]
        if len(names) > 1:
            raise UsageError(f"{' and '.join(names)} each set the dial: give one of them")
        if options.milliseconds is None and options.images_per_second is None:
            return None
        if distributed.started():
            raise UsageError(f"{names[0]} times one process: run it without torchrun, then give --budget to all")
        return cls(options.milliseconds, options.images_per_second)

    def meet(self, network: nn.Module, images: Tensor, amp: torch.dtype | None = None, quiet: bool = False) -> float:
        """Measure the costs of blocks on batches like `images` and set the dial; print and return the FLOPs share."""
        with progress_bar("measuring costs", None) as bar:
            costs = measure_costs(
                network, images, amp=amp, progress=lambda done, total: bar.reach(done, total, "measuring costs")
            )
        share = set_latency(network, costs, milliseconds=self.milliseconds, images_per_second=self.images_per_second)
        dial = thresholds_of(network).dial
        assert dial is not None
        seconds = costs.dense if share == 1 else float(costs.predict_seconds(dial.kept_at(share)))
        if not quiet:
            choice = "the dense model is fast enough, reduction is off" if share == 1 else f"budget {share:g}"
            print_result(f"{choice}: {speed(seconds, len(images))} predicted for batches of {len(images)}")
        return share


def print_measured(images: int, images_per_second: float) -> None:
    """Print the time and speed that a batch was measured at."""
    print_result(f"measured: {speed(images / images_per_second, images)}")
