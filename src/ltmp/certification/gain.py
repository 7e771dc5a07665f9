"""The speed of a certified budget on this machine, against the dense model and against lower resolution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """Interleaved speed measurements on one batch.

    Attributes:
        batch_size: images in the batch.
        dense, reduced: images per second.
        resolution: image side in pixels of the lowest resolution that the same test certifies, or None.
        smaller: images per second at that resolution, or None.
        tried: whether lower resolutions could be tested, which not all hosts support.
    """

    batch_size: int
    dense: float
    reduced: float
    resolution: int | None = None
    smaller: float | None = None
    tried: bool = False

    def sentence(self) -> str:
        """The speeds in words."""
        speed = (
            f"Here it runs {self.reduced / self.dense:.2f} times as fast as the dense model "
            f"({self.reduced:.3g} against {self.dense:.3g} images/s, batch {self.batch_size})"
        )
        if self.smaller is not None:
            times = self.smaller / self.dense
            return f"{speed}; lower resolution ({self.resolution} pixels), certified alike, {times:.2f} times."
        return f"{speed}; no lower resolution is certified on these images." if self.tried else f"{speed}."


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
    """Time the certified budget, the dense model and the lowest resolution that the same test certifies.

    Args:
        model: attached, on its device; left at the budget it had.
        loader: the images that the certificate is for.
        certificate: of a budget of `model`.
        risk: the function, if the certified risk is one.
        seconds: time to measure each.
        how: more keyword arguments of `certify`.

    Returns:
        The speeds, or None if the certificate certifies no budget.
    """
    if certificate.budget is None:
        return None
    thresholds = thresholds_of(model)
    device = thresholds.merge.device
    images = next(iter(loader))[0].to(device)
    smaller = lower_resolutions(model, images)
    lowest = None
    if smaller:
        dense_model = detach(copy.deepcopy(model))
        certified = certify(
            [(1, dense_model), *smaller], loader, risk or certificate.risk, certificate.at_most,
            certificate.confidence, device=device, amp=amp, progress=progress, **how,
        )  # fmt: skip
        lowest = None if certified.budget is None else dict(smaller)[certified.budget]
    before = thresholds.requested_budget
    thresholds.set_budget(certificate.budget)
    calls: dict[str, Callable[[], Any]] = {
        "dense": partial(_run_dense, model, images),
        "reduced": partial(model, images),
    }
    if lowest is not None:
        calls["smaller"] = partial(lowest, images)
    # recorded calls are reduced, even if engine="auto" would find dense ones faster
    with deployed(model, device, amp=amp), record():
        speeds = timed(calls, len(images), seconds)
    if before is not None:
        thresholds.set_budget(before)
    size = None if lowest is None else lowest.size
    return Gain(len(images), speeds["dense"], speeds["reduced"], size, speeds.get("smaller"), bool(smaller))


def _run_dense(model: nn.Module, images: Tensor) -> Any:
    with dense():
        return model(images)
