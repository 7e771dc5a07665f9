"""From a Pillow image to a model's input tensor, by timm's own rules for that model."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint.describe import metadata_of
from ..checkpoint.metadata import Preprocessing
from ..errors import UsageError
from ..zoo.hugging_face import data_config, is_transformers_model
from .dataset import Transform

log = logging.getLogger("ltmp")


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
    """Return timm's evaluation transform for `model`.

    An option left at None comes from the metadata of the model's thresholds, or else from its timm config; for a
    transformers model, from the image processor at the path or Hub id that the model was loaded from. By default the
    image size is the one the model was built with.

    `crop_pct=1.0` with `crop_mode="squash"` resizes to exactly the model's size and crops nothing. Raises UsageError
    for an option out of range.
    """
    from timm.data import create_transform

    options = {
        "interpolation": interpolation, "mean": mean, "std": std, "crop_pct": crop_pct, "crop_mode": crop_mode,
    }  # fmt: skip
    settings = eval_settings(model, options, image_size)
    transform = create_transform(**settings, is_training=False)
    # Thresholds learned from these images keep the settings in their metadata.
    transform.settings = settings
    return transform


def train_transform(model: nn.Module, **options: Any) -> Transform:
    """Return timm's training transform for `model`: random crop of 8 to 100 % of the image, flips, colour jitter 0.4.

    Its random numbers derive from torch's generator alone, so that they can be reproduced with one seed.

    Args:
        options: as in `eval_transform`; `crop_pct` and `crop_mode` have no effect.
    """
    from timm.data import create_transform

    settings = eval_settings(model, options)
    kept = {name: settings[name] for name in ("input_size", "interpolation", "mean", "std")}
    transform = create_transform(**kept, is_training=True, color_jitter=0.4, auto_augment=None, re_prob=0.0)
    return Augmentation(transform, settings)


class Augmentation:
    """A transform that uses Python's random generator, seeded for each image from torch's."""

    def __init__(self, transform: Transform, settings: dict[str, Any]) -> None:
        self.transform, self.settings = transform, settings

    def __call__(self, image: Image.Image) -> Tensor:
        random.seed(int(torch.randint(1 << 62, ())))
        return self.transform(image)


def sharp_view(model: nn.Module, image: Image.Image, width: int, **options: Any) -> Tensor:
    """Return the part of an image that `model` sees at a higher resolution, for display.

    Args:
        image: RGB or greyscale.
        width: minimum width of the result in pixels.
        options: as in `eval_transform`. An image that is squashed for the model keeps its aspect ratio here.

    Returns:
        float32 [3, H, W] in [0, 1].
    """
    from timm.data import create_transform

    settings = eval_settings(model, options)
    channels, input_height, input_width = settings["input_size"]
    scale = -(-width // input_width)
    width = scale * input_width
    squashed = settings["crop_mode"] == "squash"
    height = round(width * image.height / image.width) if squashed else scale * input_height
    settings.update(input_size=(channels, max(1, height), width), mean=(0.0,) * channels, std=(1.0,) * channels)
    return create_transform(**settings, is_training=False)(image).clamp(0, 1).expand(3, -1, -1)


def eval_settings(
    model: nn.Module, options: dict[str, Any] | None = None, image_size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the arguments of timm's transforms, from the model's config and the options of `eval_transform`."""
    from timm.data import resolve_data_config

    options = options or {}
    Preprocessing.check(options)
    recorded = {name: value for name, value in asdict(metadata_of(model).preprocessing).items() if value is not None}
    for name, value in recorded.items():
        override = options.get(name)
        if override is not None and _as_list(override) != _as_list(value):
            _warn_once(f"{name} {override} overrides {value}, with which the thresholds were made")
    config = {**_config(model), **recorded}
    size, channels = _pair(image_size or _built_size(model, config)), input_channels(model)
    per_channel = {name: _per_channel(name, options[name], channels) for name in ("mean", "std") if options.get(name)}
    settings = resolve_data_config({**options, **per_channel, "input_size": (channels, *size)}, config)
    # An RGB config has no statistics for the single channel of a greyscale model, which gets their average.
    for name in ("mean", "std"):
        if len(settings[name]) != channels:
            settings[name] = (fmean(settings[name]),) * channels
    return settings


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one number per colour channel; a number for all channels may be given once or three times.

    Raises:
        UsageError: the count is not that of the model's channels, and the numbers differ.
    """
    numbers = tuple(values)
    if len(numbers) == channels:
        return numbers
    if len(set(numbers)) > 1:
        raise UsageError(
            f"{name} {' '.join(f'{number:g}' for number in numbers)}: this model takes {channels} channel"
            f"{'s' * (channels > 1)}, give a number for each"
        )
    return numbers[:1] * channels


def input_channels(model: nn.Module) -> int:
    """Return the number of colour channels of the model's input: 3, or 1 for a greyscale model."""
    projection: Any = getattr(getattr(model, "patch_embed", None), "proj", None)
    config: Any = getattr(model, "config", None)
    return int(getattr(projection, "in_channels", None) or getattr(config, "num_channels", None) or 3)


def image_mode(model: nn.Module) -> str:
    """Return the Pillow mode of the model's input: "RGB", or "L" for a greyscale model."""
    return "L" if input_channels(model) == 1 else "RGB"


def _config(model: Any) -> dict[str, Any]:
    """Return the preprocessing of a model as a timm data config."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return data_config(model) if not config and is_transformers_model(model) else config


def _built_size(model: nn.Module, config: dict[str, Any]) -> int | tuple[int, int]:
    """Return the image size that the model was built with, which may differ from that of its pretrained config."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size or tuple(config.get("input_size", (3, 224, 224))[-2:])


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@cache
def _warn_once(text: str) -> None:
    """Log a warning once, as several transforms may be made for one model."""
    log.warning(text)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
