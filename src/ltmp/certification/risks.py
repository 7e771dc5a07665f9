"""Risks: how much of an image's answer is lost, as a number whose mean can be bounded by a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LTMPError, UsageError
from ..hosts.outputs import embeddings_of, logits_of

Call = Callable[[Tensor], Any]
"""From images [B, C, H, W] to a model's output."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the reduced and the dense model's outputs [B, K] and labels [B] (-1 for none) to losses [B], bool or numbers."""

RISKS = ("disagree", "error", "embedding")


@dataclass(frozen=True)
class Risk:
    """A named loss.

    Attributes:
        lowest: the smallest value that the loss may have; the largest is 1.
        limit: distance for `embedding`, or None.
        labelled: whether the loss needs labels.
        embeds: whether the loss compares embeddings instead of logits.
    """

    name: str
    loss: Loss
    lowest: float = 0.0
    limit: float | None = None
    labelled: bool = False
    embeds: bool = False

    @classmethod
    def of(cls, risk: str | Loss, limit: float) -> Risk:
        """The risk with a name, or of a function.

        Raises:
            UsageError: an unknown name, or a limit out of range.
        """
        if callable(risk):
            return cls(getattr(risk, "__name__", type(risk).__name__), risk)
        if risk == "disagree":
            return cls(risk, _disagree)
        if risk == "error":
            return cls(risk, _error, lowest=-1.0, labelled=True)
        if risk == "embedding":
            if not 0 < limit < 2:
                raise UsageError(f"limit is {limit}: expected a distance 1 - cosine between 0 and 2, such as 0.05")
            return cls(risk, partial(_far, limit=limit), limit=limit, embeds=True)
        raise UsageError(f"unknown risk {risk!r}: expected one of {', '.join(RISKS)}, or a function")

    def output(self, call: Call, images: Tensor) -> Tensor:
        """What the loss compares: logits or embeddings, float32 [B, K].

        Raises:
            LTMPError: the output holds NaN or infinity.
        """
        output = embeddings_of(call, images) if self.embeds else logits_of(call(images))
        if not output.isfinite().all():
            raise LTMPError("the model's output is NaN or infinite: repair its weights or the images first")
        return output.float()

    def losses(self, reduced: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image, [B] on the CPU, bool or float64.

        Raises:
            UsageError: labels are missing, or a function did not return one number in [0, 1] per image.
        """
        if self.labelled and (labels < 0).any():
            raise UsageError("risk 'error' needs labels, which these images lack: use 'disagree', which needs none")
        values = self.loss(reduced, dense, labels)
        if not isinstance(values, Tensor) or values.shape != (len(dense),):
            raise UsageError(f"risk {self.name} must give a tensor of one number for each of {len(dense)} images")
        values = values.cpu()
        if values.dtype == torch.bool:
            return values
        values = values.double()
        if not ((values >= self.lowest) & (values <= 1)).all():
            wrong = next(value for value in values.tolist() if not self.lowest <= value <= 1)
            raise UsageError(f"risk {self.name} gave {wrong:g}: it must be between 0 and 1 for every image")
        return values


def _disagree(reduced: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    return reduced.argmax(-1) != dense.argmax(-1)


def _error(reduced: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """1 if only the dense model is right, -1 if only the reduced one is: the mean is the drop in accuracy."""
    reduced_right, dense_right = reduced.argmax(-1) == labels, dense.argmax(-1) == labels
    return dense_right.double() - reduced_right.double()


def _far(reduced: Tensor, dense: Tensor, labels: Tensor, limit: float) -> Tensor:
    return 1 - F.cosine_similarity(reduced, dense, dim=-1) > limit
