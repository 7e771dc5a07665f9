"""From a Pillow image to the tensor a model takes, by timm's own rules for that model."""

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
from ..zoo.hugging_face import data_config, is_of_transformers
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
    """timm's evaluation transform for `model`; each option left at None is as its thresholds or its config say.

    For a model of transformers that is what its image processor does, which lies where the model was loaded from.

    The image size is the one the model was built with. crop_pct=1.0 with crop_mode="squash" resizes to exactly
    the model's size and crops nothing. Raises UsageError for an option out of range.
    """
    from timm.data import create_transform

    options = {
        "interpolation": interpolation, "mean": mean, "std": std, "crop_pct": crop_pct, "crop_mode": crop_mode,
    }  # fmt: skip
    settings = eval_settings(model, options, image_size)
    transform = create_transform(**settings, is_training=False)
    # what is learned from such images is of images that were prepared so
    transform.settings = settings
    return transform


def train_transform(model: nn.Module, **options: Any) -> Transform:
    """timm's training transform for `model`: a random crop of 8 to 100 % of the image, flips, and colour jitter of 0.4.

    Its random numbers follow from torch's generator alone, so that one seed repeats them.

    Args:
        options: as in `eval_transform`; `crop_pct` and `crop_mode` have no meaning here.
    """
    from timm.data import create_transform

    settings = eval_settings(model, options)
    kept = {name: settings[name] for name in ("input_size", "interpolation", "mean", "std")}
    transform = create_transform(**kept, is_training=True, color_jitter=0.4, auto_augment=None, re_prob=0.0)
    return Augmentation(transform, settings)


class Augmentation:
    """A transform that draws from Python's generator, seeded for each image from torch's."""

    def __init__(self, transform: Transform, settings: dict[str, Any]) -> None:
        self.transform, self.settings = transform, settings

    def __call__(self, image: Image.Image) -> Tensor:
        random.seed(int(torch.randint(1 << 62, ())))
        return self.transform(image)


def sharp_view(model: nn.Module, image: Image.Image, width: int, **options: Any) -> Tensor:
    """The part of an image that `model` sees, for people to look at: the same crop at its original size.

    Args:
        image: RGB or greyscale.
        width: how wide it should at least be, in pixels.
        options: as in `eval_transform`. An image that is squashed for the model gets its own shape back.

    Returns:
        float32 [3, H, W] in [0, 1].
    """
    from timm.data import create_transform

    settings = eval_settings(model, options)
    channels, tall, wide = settings["input_size"]
    times = -(-width // wide)
    squashed = settings["crop_mode"] == "squash"
    height = round(times * wide * image.height / image.width) if squashed else times * tall
    settings.update(input_size=(channels, max(1, height), times * wide), mean=(0.0,) * channels, std=(1.0,) * channels)
    return create_transform(**settings, is_training=False)(image).clamp(0, 1).expand(3, -1, -1)


def eval_settings(
    model: nn.Module, options: dict[str, Any] | None = None, image_size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """Arguments for timm's transforms, from the model's config and the options of `eval_transform`."""
    from timm.data import resolve_data_config

    options = options or {}
    Preprocessing.check(options)
    known = {name: value for name, value in asdict(metadata_of(model).preprocessing).items() if value is not None}
    for name, value in known.items():
        given = options.get(name)
        if given is not None and _listed(given) != _listed(value):
            _say(f"{name} {given} goes before {value}, with which the thresholds were made")
    config = {**_config(model), **known}
    size, channels = _pair(image_size or _built_size(model, config)), input_channels(model)
    own = {name: _for_channels(name, options[name], channels) for name in ("mean", "std") if options.get(name)}
    settings = resolve_data_config({**options, **own, "input_size": (channels, *size)}, config)
    # a config of colours says nothing of a greyscale model's one channel: it gets their average
    return settings | {
        name: settings[name] if len(settings[name]) == channels else (fmean(settings[name]),) * channels
        for name in ("mean", "std")
    }


def _for_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A number for each colour channel; one that stands for all may be given once or for each of three.

    Raises:
        UsageError: as many as the model has no channels, and not all the same.
    """
    given = tuple(values)
    if len(given) != channels and len(set(given)) > 1:
        raise UsageError(f"{name} {' '.join(f'{value:g}' for value in given)}: this model takes {channels} channel"
                         f"{'s' * (channels > 1)}, give a number for each")  # fmt: skip
    return given if len(given) == channels else given[:1] * channels


def input_channels(model: nn.Module) -> int:
    """Colour channels the model takes: 3, or 1 for a greyscale model."""
    projection: Any = getattr(getattr(model, "patch_embed", None), "proj", None)
    config: Any = getattr(model, "config", None)
    return int(getattr(projection, "in_channels", None) or getattr(config, "num_channels", None) or 3)


def image_mode(model: nn.Module) -> str:
    """Pillow's name of what the model takes: "RGB", or "L" for a greyscale model."""
    return "L" if input_channels(model) == 1 else "RGB"


def _config(model: Any) -> dict[str, Any]:
    """How images are prepared for a model, in timm's words."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return data_config(model) if not config and is_of_transformers(model) else config


def _built_size(model: nn.Module, config: dict[str, Any]) -> int | tuple[int, int]:
    """The model's own size: its pretrained config may state another one than it was built with."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size or tuple(config.get("input_size", (3, 224, 224))[-2:])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@cache
def _say(text: str) -> None:
    """Once: a transform is made more than once."""
    log.warning(text)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
