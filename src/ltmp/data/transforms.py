"""From a Pillow image to the tensor a model takes, by timm's own rules for that model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import UsageError
from .dataset import Transform


def eval_transform(
    model: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> Transform:
    """timm's evaluation transform for `model`; each option left at None is as the model's config says.

    The image size is the one the model was built with. crop_pct=1.0 with crop_mode="squash" resizes to exactly
    the model's size and crops nothing. Raises UsageError for an option out of range.
    """
    from timm.data import create_transform, resolve_model_data_config

    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UsageError(f"crop_pct is {crop_pct}: expected a number in (0, 1], 1 crops nothing")
    options = {
        "input_size": (input_channels(model), *_pair(image_size or _built_size(model))),
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    return create_transform(**resolve_model_data_config(model, args=options), is_training=False)


def input_channels(model: nn.Module) -> int:
    """Colour channels the model takes: 3, or 1 for a greyscale model."""
    projection: Any = getattr(getattr(model, "patch_embed", None), "proj", None)
    return int(getattr(projection, "in_channels", 3))


def _built_size(model: nn.Module) -> int | tuple[int, int]:
    """The model's own size: its pretrained config may state another one than it was built with."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return size or tuple(config.get("input_size", (3, 224, 224))[-2:])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
