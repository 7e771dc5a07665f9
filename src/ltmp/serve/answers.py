"""From the bytes of an image to a tensor, and from tensors to answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.dataset import Transform
from ..deploy import Deployment
from ..errors import LTMPError
from .limits import read_image


@dataclass(frozen=True)
class Answer:
    """The model's answer for one image.

    Attributes:
        scores: float32 [K] on the CPU, probabilities of the classes.
        share: FLOPs spent on it, as a share of the dense model's.
        tokens: tokens left after a block, as a mean over the blocks.
    """

    scores: Tensor
    share: float
    tokens: float


def check(deployment: Deployment) -> None:
    """Refuse a model that cannot be served, with a call on a blank image.

    Raises:
        LTMPError: nothing is attached, or the output is not one row of class scores an image.
        UsageError: another number of names than classes.
    """
    if not deployment.attached:
        raise LTMPError("nothing to serve: attach thresholds first, e.g. ltmp.load(model, file)")
    _ = deployment.classes


def prepare(transform: Transform, mode: str, max_pixels: int, body: bytes) -> Tensor:
    """[C, H, W] of the image in `body`; raises like `read_image`."""
    image: Tensor = transform(read_image(body, mode, max_pixels))
    return image


def answer(deployment: Deployment, images: list[Tensor]) -> list[Answer]:
    """Answers to prepared images, in order.

    Raises:
        LTMPError: the output is NaN or infinite.
    """
    found = deployment(torch.stack(images))
    scores = found.logits.softmax(-1).cpu()
    if not scores.isfinite().all():
        raise LTMPError("the model's output is NaN or infinite: its weights or its thresholds are damaged")
    assert found.kept is not None
    tokens = found.kept.float().mean(1).tolist()
    return [Answer(*values) for values in zip(scores, found.share.tolist(), tokens, strict=True)]
