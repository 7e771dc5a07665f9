"""Risks: what of an image's answer is lost, as a number that a test can bound the mean of."""

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
"""From images [B, C, H, W] to what a model returns."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the reduced and the dense model's outputs [B, K] and labels [B] (-1: none) to losses [B]: bool, or numbers."""

RISKS = ("disagree", "error", "embedding")


@dataclass(frozen=True)
class Risk:
    """A named loss.

    Attributes:
        lowest: the smallest value that it may have; the largest is 1.
        limit: of `embedding`.
        labelled: whether it needs labels.
        embeds: whether it looks at embeddings instead of logits.
    """

    name: str
    loss: Loss
    lowest: float = 0.0
    limit: float | None = None
    labelled: bool = False
    embeds: bool = False

    @classmethod
    def of(cls, risk: str | Loss, limit: float) -> Risk:
        """A risk by its name or by its function.

        Raises:
            UsageError: no such risk, or a limit that no distance has.
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
        """[B, K], what the loss looks at, in float32.

        Raises:
            LTMPError: it holds NaN or infinity.
        """
        found = embeddings_of(call, images) if self.embeds else logits_of(call(images))
        if not found.isfinite().all():
            raise LTMPError("the model's output is NaN or infinite: repair its weights or the images first")
        return found.float()

    def losses(self, reduced: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
        """[B] on the CPU, bool or float64.

        Raises:
            UsageError: labels are missing, or a function gave something else than one number in [0, 1] an image.
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
    """1 where only the dense model is right, -1 where only the reduced one is: their mean is the drop in accuracy."""
    right, before = reduced.argmax(-1) == labels, dense.argmax(-1) == labels
    return before.double() - right.double()


def _far(reduced: Tensor, dense: Tensor, labels: Tensor, limit: float) -> Tensor:
    return 1 - F.cosine_similarity(reduced, dense, dim=-1) > limit
