"""An export counts as done when it gives what the model gives: the same tokens in every block, the same logits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import dense as run_dense
from ..deploy import deployed, run
from ..errors import LTMPError
from .program import image_shape
from .runtimes import Session

LOGITS = 1e-4
"""How far logits may be from eager, as a share of the largest one: both compute in float32, in another order."""

NUDGE = 1e-5
"""Standard deviation of the noise by which an undecided image is told, in units of normalised pixels."""

AGREE = 0.25
"""How far the logits of a quantised model may be, as a share of their norm, in the median image."""


@dataclass(frozen=True)
class Verification:
    """What a check on `images` images found.

    Attributes:
        undecided: images that the model itself decides otherwise when their pixels move by 1e-5, and which are not
            judged; of a quantised export those that keep other tokens than in float.
        counts: different token counts (all blocks together) among the images.
        difference: largest difference of a logit.
        share: mean FLOPs share.
    """

    images: int
    undecided: int
    counts: int
    difference: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """What the model itself gives for some images.

    Attributes:
        images: [B, C, H, W].
        logits: [B, K].
        kept: int64 [B, L].
        share: [B].
        steady: bool [B], False for images whose decisions are within rounding of a threshold.
    """

    images: Tensor
    logits: Tensor
    kept: Tensor
    share: Tensor
    steady: Tensor


def expect(model: nn.Module, images: Tensor, *, dense: bool = False) -> Expected:
    """Run an attached model, or the one beneath, on images [B, C, H, W].

    A decision within rounding of its threshold may fall either way in another runtime. Such images are told by a nudge
    of their pixels.

    Raises:
        LTMPError: no image is left to judge by.
    """
    logits, kept, share = _run(model, images, dense)
    noise = NUDGE * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    steady = torch.ones(len(images), dtype=torch.bool)
    for nudged in (images + noise, images - noise):
        steady &= (_run(model, nudged, dense)[1] == kept).all(1)
    if not steady.any():
        raise LTMPError("nothing to verify by: rounding decides every image given; give other images with --data")
    return Expected(images, logits, kept, share, steady)


def _run(model: nn.Module, images: Tensor, dense: bool) -> tuple[Tensor, Tensor, Tensor]:
    with deployed(model, images.device), run_dense() if dense else nullcontext():
        found = run(model, images)
    assert found.kept is not None
    return found.logits, found.kept.long(), found.share


def verify(session: Session, expected: Expected) -> Verification:
    """Compare an export with its model.

    Raises:
        LTMPError: counts or logits differ.
    """
    logits, counts = session(expected.images)
    steady = expected.steady
    wrong = steady & (counts != expected.kept).any(1)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise LTMPError(
            f"the export keeps other tokens than the model in {int(wrong.sum())} of {int(steady.sum())} images: after "
            f"each block {counts[i].tolist()} instead of {expected.kept[i].tolist()}"
        )
    difference = (logits - expected.logits)[steady].abs().max().item()
    allowed = LOGITS * max(1.0, expected.logits.abs().max().item())
    # NaN is not within anything
    if not difference <= allowed:
        raise LTMPError(f"the export's logits differ from the model's by {difference:.1e}, allowed {allowed:.1e}")
    return _found(expected, int((~steady).sum()), difference)


def verify_quantised(session: Session, expected: Expected) -> Verification:
    """Compare a quantised export with its model: it decides a little differently, but must not be broken.

    Raises:
        LTMPError: logits are not finite, or far from the model's.
    """
    logits, counts = session(expected.images)
    error = logits - expected.logits
    distance = (error.norm(dim=1) / expected.logits.norm(dim=1)).median().item()
    if not distance <= AGREE:
        raise LTMPError(
            f"quantised, this model's logits are {distance:.2f} of their norm from float, allowed {AGREE}: export it "
            "in float, without --int8"
        )
    return _found(expected, int((counts != expected.kept).any(1).sum()), error.abs().max().item())


def _found(expected: Expected, undecided: int, difference: float) -> Verification:
    kinds = len(expected.kept.unique(dim=0))
    return Verification(len(expected.images), undecided, kinds, difference, expected.share.mean().item())


def smooth_images(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """[count, C, H, W] of blobs on noise as `model` takes them, where no photographs are at hand.

    Neighbouring patches resemble each other, and some images are busier than others, so that token counts differ.
    """
    channels, height, width = image_shape(model)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(count):
        coarse = torch.randn(1, channels, 4 + 4 * (i % 4), 4 + 4 * (i % 4), generator=generator)
        blobs = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        images.append(blobs + 0.1 * torch.randn(1, channels, height, width, generator=generator))
    return torch.cat(images)
