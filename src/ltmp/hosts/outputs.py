"""Outputs of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LTMPError

FIELDS = (
    "logits", "predicted_depth", "heatmaps", "masks_queries_logits", "pred_masks", "embeddings", "image_embeds",
    "feature_maps", "last_hidden_state",
)  # fmt: skip
"""Fields of what models of transformers return, the first of which is the answer."""


def answers_in(output: Any) -> Tensor:
    """Judge [B, ...] in what a model returned: a tensor, the first of `FIELDS`, or feature maps, one after another.

    Logits [B] of a binary classifier become [B, 1].

    Raises:
        LTMPError: there are none.
    """
    if not isinstance(output, Tensor | list | tuple):
        found = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in FIELDS)
        output = next((each for each in found if each is not None), output)
    if isinstance(output, list | tuple) and output and all(isinstance(each, Tensor) for each in output):
        # maps differ in size
        return torch.cat([each.flatten(1) for each in output], 1)[:, :, None]
    if not isinstance(output, Tensor):
        raise LTMPError(
            f"the model returned a {type(output).__name__} without an answer: expected a tensor, feature maps, or an "
            f"object with one of {', '.join(FIELDS)}; put a module around it that returns a tensor [B, ...]"
        )
    return output[:, None] if output.ndim == 1 else output


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
