"""The gain of a certified budget on this machine, in a paragraph: speed against dense and against lower resolution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import dense, record
from ..deploy import deployed
from ..evaluate.timing import timed
from ..hosts.attach import detach, thresholds_of
from ..method.certificate import Certificate
from .resolution import lower_resolutions
from .run import Progress, certify


@dataclass(frozen=True)
class Gain:
    """Interleaved measurements on one batch.

    Attributes:
        batch_size: images of it.
        dense, reduced: images per second.
        resolution: pixels a side of the lowest resolution that the same test certifies, None where there is none.
        smaller: images per second at that resolution.
        tried: whether the host can run at lower resolution at all.
    """

    batch_size: int
    dense: float
    reduced: float
    resolution: int | None = None
    smaller: float | None = None
    tried: bool = False

    def sentence(self) -> str:
        """The speeds in words."""
        told = (
            f"Here it runs {self.reduced / self.dense:.2f} times as fast as the dense model "
            f"({self.reduced:.3g} against {self.dense:.3g} images/s, batch {self.batch_size})"
        )
        if self.smaller is not None:
            times = self.smaller / self.dense
            return f"{told}; lower resolution ({self.resolution} pixels), certified alike, {times:.2f} times."
        return f"{told}; no lower resolution is certified on these images." if self.tried else f"{told}."


def measure_gain(
    model: nn.Module,
    loader: Any,
    certificate: Certificate,
    risk: Any = None,
    *,
    seconds: float = 4.0,
    amp: torch.dtype | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> Gain | None:
    """Time the certified budget, the dense model and the lowest resolution that is certified on the same images.

    Args:
        model: attached, on its device; left at the budget it had.
        loader: as it was certified on.
        certificate: None comes back where it certifies no budget.
        risk: its function, where it is one.
        seconds: of timing for each.
        how: more arguments of `certify`.
    """
    if certificate.budget is None:
        return None
    own = thresholds_of(model)
    device = own.merge.device
    images = next(iter(loader))[0].to(device)
    smaller = lower_resolutions(model, images)
    found = None
    if smaller:
        dense_model = detach(copy.deepcopy(model))
        alike = certify(
            [(1, dense_model), *smaller], loader, risk or certificate.risk, certificate.at_most,
            certificate.confidence, device=device, amp=amp, progress=progress, **how,
        )  # fmt: skip
        found = None if alike.budget is None else dict(smaller)[alike.budget]
    before = own.asked
    own.set_budget(certificate.budget)
    ways: dict[str, Callable[[], Any]] = {"dense": _densely(model, images), "reduced": lambda: model(images)}
    if found is not None:
        ways["smaller"] = lambda: found(images)
    # recorded calls are reduced, even where `auto` would find dense ones faster
    with deployed(model, device, amp=amp), record():
        speeds = timed(ways, len(images), seconds)
    if before is not None:
        own.set_budget(before)
    size = None if found is None else found.size
    return Gain(len(images), speeds["dense"], speeds["reduced"], size, speeds.get("smaller"), bool(smaller))


def _densely(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with dense():
            return model(images)

    return call
