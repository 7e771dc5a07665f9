"""Outputs of models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import LTMPError


def logits_of(output: Any) -> Tensor:
    """Logits [B, K] in what a classifier returned: a tensor, or an object that has them as `logits` (transformers).

    Raises:
        LTMPError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise LTMPError(
            f"the model returned a {type(output).__name__} without logits: give a classifier, such as a "
            "...ForImageClassification of transformers, or a module around it that returns logits [B, K]"
        )
    return logits


def embeddings_of(model: Any, images: Tensor) -> Tensor:
    """Embeddings [B, C] of images [B, C, H, W]: what the head classifies, or the output of a model without a head."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)
    return logits_of(model(images)).flatten(1)
