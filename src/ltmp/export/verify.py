"""Verify that an export reproduces its model: the same number of tokens after every block, and the same logits."""

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
"""Allowed difference of logits from eager mode, relative to the largest one. Both compute in float32, but in different
order.
"""

NUDGE = 1e-5
"""Standard deviation of the noise that detects undecided images, in units of normalised pixels."""

AGREE = 0.25
"""Allowed distance of a quantised model's logits, relative to their norm, for the median image."""


@dataclass(frozen=True)
class Verification:
    """Result of a check on `images` images.

    Attributes:
        undecided: number of images for which the model itself keeps other tokens when pixels move by 1e-5; they are not
            compared. For a quantised export, the number of images that keep other tokens than in float.
        counts: number of distinct token counts (of all blocks together) among the images.
        difference: largest absolute difference of a logit.
        share: mean FLOPs share of the images.
        note: a caveat about the check, or empty.
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
    """The model's own outputs for some images.

    Attributes:
        images: [B, C, H, W].
        logits: [B, K].
        kept: int64 [B, L], number of tokens after each block.
        share: [B], FLOPs share.
        steady: bool [B], False for images whose decisions are within rounding of a threshold.
    """

    images: Tensor
    logits: Tensor
    kept: Tensor
    share: Tensor
    steady: Tensor


def expect(model: nn.Module, images: Tensor, *, dense: bool = False) -> Expected:
    """Run an attached model on images [B, C, H, W], reduced or dense.

    A score within rounding of its threshold may be decided either way in another runtime. Such images are detected by
    adding a little noise to their pixels.

    Raises:
        LTMPError: the noise changes the decisions for every image, so that none can be compared.
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
        output = run(model, images)
    assert output.kept is not None
    return output.logits, output.kept.long(), output.share


def verify(session: Session, expected: Expected) -> Verification:
    """Compare an export with its model.

    Raises:
        LTMPError: token counts or logits differ.
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
    # negated, so that NaN fails, too
    if not difference <= allowed:
        raise LTMPError(f"the export's logits differ from the model's by {difference:.1e}, allowed {allowed:.1e}")
    return _verification(expected, int((~steady).sum()), difference)


def verify_quantised(session: Session, expected: Expected) -> Verification:
    """Compare a quantised export with its model. Its decisions may differ a little, but its logits must be close.

    Raises:
        LTMPError: the logits are not finite, or too far from the model's.
    """
    logits, counts = session(expected.images)
    error = logits - expected.logits
    distance = (error.norm(dim=1) / expected.logits.norm(dim=1)).median().item()
    if not distance <= AGREE:
        raise LTMPError(
            f"quantised, this model's logits are {distance:.2f} of their norm from float, allowed {AGREE}: export it "
            "in float, without --int8"
        )
    return _verification(expected, int((counts != expected.kept).any(1).sum()), error.abs().max().item())


def _verification(expected: Expected, undecided: int, difference: float) -> Verification:
    distinct = len(expected.kept.unique(dim=0))
    return Verification(len(expected.images), undecided, distinct, difference, expected.share.mean().item())


NOISES = (0.1, 0.03, 0.3, 0.01, 1.0)
"""Amounts of noise on synthetic images, in standard deviations of their blobs, in the order they are tried."""

FAR = 0.1
"""How far the share of the images may be from that of the thresholds before `Verification.note` mentions it."""


def check_share(verification: Verification, share: float | None, synthetic: bool) -> Verification:
    """Add a note if the images' FLOPs share is far from `share`, that of the thresholds.

    Args:
        synthetic: whether the images were generated and not given by the user.
    """
    if share is None or abs(verification.share - share) <= FAR:
        return verification
    kind = "synthetic images" if synthetic else "the images given"
    note = (
        f"{kind} keep a share of {verification.share:.2f}, but these thresholds are for {share:.2f}: verify on images "
        "like those they were learned on (--data)"
    )
    return replace(verification, note=note)


def synthetic_images(model: nn.Module, count: int, share: float | None = None) -> Tensor:
    """`smooth_images` with the amount of noise for which an attached model comes closest to a FLOPs share.

    Args:
        share: the FLOPs share of the thresholds; None is `smooth_images` with its default noise.
    """
    best, distance = smooth_images(model, count), float("inf")
    if share is None:
        return best
    for noise in NOISES:
        images = smooth_images(model, count, noise=noise)
        far = abs(_run(model, images, dense=False)[2].mean().item() - share)
        if far < distance:
            best, distance = images, far
        if far < FAR / 2:
            break
    return best


def smooth_images(model: nn.Module, count: int, seed: int = 0, noise: float = NOISES[0]) -> Tensor:
    """[count, C, H, W], images of blobs with noise, of the size that `model` takes, for use without photographs.

    Neighbouring patches are similar, less so with more noise, and some images are busier than others, so that token
    counts differ.
    """
    channels, height, width = image_shape(model)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(count):
        coarse = torch.randn(1, channels, 4 + 4 * (i % 4), 4 + 4 * (i % 4), generator=generator)
        blobs = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        images.append(blobs + noise * torch.randn(1, channels, height, width, generator=generator))
    return torch.cat(images)
