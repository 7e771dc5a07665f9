"""An export counts as done when it gives what the model gives: the same tokens in every block, the same logits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
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
    """Result of a check on `images` images.

    Attributes:
        undecided: images that the model itself decides otherwise when their pixels move by 1e-5, and which are not
            judged; of a quantised export those that keep other tokens than in float.
        counts: different token counts (all blocks together) among the images.
        difference: largest difference of a logit.
        share: mean FLOPs share of these images.
        note: what is to be known about the check, or nothing.
    """

    images: int
    undecided: int
    counts: int
    difference: float
    share: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """The model's own results for some images.

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


NOISES = (0.1, 0.03, 0.3, 0.01, 1.0)
"""Noise on made images, in standard deviations of their blobs, in the order in which it is tried."""

FAR = 0.1
"""How far the share of the images may be from the thresholds' own before it is noted."""


def made_images(model: nn.Module, count: int, share: float | None = None) -> Tensor:
    """`smooth_images` that an attached model reduces about as much as what its thresholds were learned on.

    Args:
        share: the thresholds' own FLOPs share; None takes the first images.
    """
    best, distance = smooth_images(model, count), float("inf")
    for noise in NOISES if share is not None else ():
        images = smooth_images(model, count, noise=noise)
        far = abs(_run(model, images, dense=False)[2].mean().item() - (share or 0.0))
        if far < distance:
            best, distance = images, far
        if far < FAR / 2:
            break
    return best


def check_share(found: Verification, share: float | None, made: bool) -> Verification:
    """The same, with a note where the images were reduced much more, or less, than the thresholds' own share."""
    if share is None or abs(found.share - share) <= FAR:
        return found
    kind = "made images" if made else "the images given"
    note = (
        f"{kind} keep a share of {found.share:.2f}, but these thresholds are for {share:.2f}: verify on images like "
        "those they were learned on (--data)"
    )
    return replace(found, note=note)


def smooth_images(model: nn.Module, count: int, seed: int = 0, noise: float = NOISES[0]) -> Tensor:
    """[count, C, H, W] of blobs on noise as `model` takes them, where no photographs are at hand.

    Neighbouring patches resemble each other, the less the more noise, and some images are busier than others, so that
    token counts differ.
    """
    channels, height, width = image_shape(model)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(count):
        coarse = torch.randn(1, channels, 4 + 4 * (i % 4), 4 + 4 * (i % 4), generator=generator)
        blobs = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        images.append(blobs + noise * torch.randn(1, channels, height, width, generator=generator))
    return torch.cat(images)
