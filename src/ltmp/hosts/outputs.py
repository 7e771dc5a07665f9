"""Read logits, embeddings and other results from what models of different libraries return."""

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
"""Fields of transformers' model outputs that hold an answer; the first one present is taken."""


def answers_in(output: Any) -> Tensor:
    """Return the answers [B, ...] by which a model's output is judged.

    They are the output itself if it is a tensor, or the first of `FIELDS` that it has. Logits [B] of a binary
    classifier become [B, 1]; a list of feature maps, which differ in size, is flattened and concatenated to [B, M, 1].

    Raises:
        LTMPError: the output holds no answers.
    """
    if not isinstance(output, Tensor | list | tuple):
        values = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in FIELDS)
        output = next((value for value in values if value is not None), output)
    if isinstance(output, list | tuple) and output and all(isinstance(item, Tensor) for item in output):
        return torch.cat([item.flatten(1) for item in output], 1)[:, :, None]
    if not isinstance(output, Tensor):
        raise LTMPError(
            f"the model returned a {type(output).__name__} without an answer: expected a tensor, feature maps, or an "
            f"object with one of {', '.join(FIELDS)}; wrap it in a module that returns a tensor [B, ...]"
        )
    return output[:, None] if output.ndim == 1 else output


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, K] in a classifier's output: a tensor, or an object with `logits` (transformers).

    Raises:
        LTMPError: the output holds no logits.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise LTMPError(
            f"the model returned a {type(output).__name__} without logits: give a classifier, such as a "
            "...ForImageClassification of transformers, or wrap it in a module that returns logits [B, K]"
        )
    return logits


def embeddings_of(model: Any, images: Tensor) -> Tensor:
    """Return embeddings [B, C] of images: the input of the classification head, or the output of a headless model."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)
    return logits_of(model(images)).flatten(1)
