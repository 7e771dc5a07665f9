"""Convert request bodies to tensors, and batches of tensors to answers."""

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
        scores: float32 [K] on the CPU, class probabilities.
        share: FLOPs spent on the image, as a share of the dense model's.
        tokens: tokens left after each block, averaged over the blocks.
    """

    scores: Tensor
    share: float
    tokens: float


def check(deployment: Deployment) -> None:
    """Check that a model can be served, by a call on a blank image.

    Raises:
        LTMPError: nothing is attached, or the output is not one row of class scores per image.
        UsageError: the number of names is not that of the classes.
    """
    if not deployment.attached:
        raise LTMPError("nothing to serve: attach thresholds first, e.g. ltmp.load(model, file)")
    _ = deployment.classes  # a cached property that raises


def prepare(transform: Transform, mode: str, max_pixels: int, body: bytes) -> Tensor:
    """Return the image in `body` as the model takes it, [C, H, W]; raises like `read_image`."""
    image: Tensor = transform(read_image(body, mode, max_pixels))
    return image


def answer(deployment: Deployment, images: list[Tensor]) -> list[Answer]:
    """Return the model's answers for prepared images, in order.

    Raises:
        LTMPError: the output is NaN or infinite.
    """
    output = deployment(torch.stack(images))
    scores = output.logits.softmax(-1).cpu()
    if not scores.isfinite().all():
        raise LTMPError("the model's output is NaN or infinite: its weights or its thresholds are damaged")
    assert output.kept is not None
    tokens = output.kept.float().mean(1).tolist()
    return [Answer(*values) for values in zip(scores, output.share.tolist(), tokens, strict=True)]
