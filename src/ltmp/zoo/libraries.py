"""Build models of torchvision and open_clip by name, with their preprocessing as a data config of timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import LTMPError, MissingExtraError, UsageError, first_line

Builder = Callable[[str, bool, "int | None", "int | None", dict[str, Any]], nn.Module]


def build_torchvision(
    name: str, pretrained: bool, num_classes: int | None, image_size: int | None, kwargs: dict[str, Any]
) -> nn.Module:
    """Build a classifier `vit_*`. `pretrained` loads its default weights, which define the preprocessing either way."""
    from torchvision import models

    known = [known for known in models.list_models() if known.startswith("vit_")]
    _check(name, known, "torchvision")
    weights = models.get_model_weights(name).DEFAULT
    options = {"num_classes": num_classes, "image_size": image_size}
    arguments = {**{key: value for key, value in options.items() if value is not None}, **kwargs}
    model = _create(name, lambda: models.get_model(name, weights=weights if pretrained else None, **arguments))
    transform = weights.transforms()
    model.pretrained_cfg = {
        "architecture": f"torchvision:{name}",
        "input_size": (3, model.image_size, model.image_size),
        "interpolation": transform.interpolation.value,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "crop_pct": transform.crop_size[0] / transform.resize_size[0],
        "crop_mode": "center",
    }
    return model


def build_open_clip(
    name: str, pretrained: bool, num_classes: int | None, image_size: int | None, kwargs: dict[str, Any]
) -> nn.Module:
    """Build the visual tower of NAME or NAME/TAG, which embeds images; TAG selects one of open_clip's weights."""
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip", "open-clip", f"the model open_clip:{name}") from error
    architecture, _, tag = name.partition("/")
    _check(architecture, open_clip.list_models(), "open_clip")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (pretrained or tag) and tag not in tags:
        choices = ", ".join(tags) or "(none)"
        raise UsageError(f"name the weights as open_clip:{architecture}/TAG, with TAG one of {choices}")
    if num_classes is not None:
        raise UsageError(f"open_clip:{name} gives embeddings, not classes: leave out num_classes")
    if image_size is not None:
        kwargs = {**kwargs, "force_image_size": image_size}
    clip = _create(name, lambda: open_clip.create_model(architecture, pretrained=tag or None, **kwargs))
    preprocessing = open_clip.get_model_preprocess_cfg(clip)
    model: Any = clip.visual
    model.pretrained_cfg = {
        "architecture": f"open_clip:{architecture}",
        "input_size": (3, *preprocessing["size"]),
        "interpolation": preprocessing["interpolation"],
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "crop_pct": 1.0,
        "crop_mode": {"shortest": "center", "longest": "border", "squash": "squash"}[preprocessing["resize_mode"]],
    }
    return model


BUILDERS: dict[str, Builder] = {"torchvision": build_torchvision, "open_clip": build_open_clip}
"""Library, which precedes the colon in a name -> its builder."""


def _check(name: str, known: list[str], library: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:5]
        raise UsageError(f"{library} has no vision transformer {name!r}: did you mean {', '.join(near)}?")


def _create(name: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"cannot build {name}: {first_line(error)}") from error
    except Exception as error:  # the network and the hub each raise their own exceptions
        raise LTMPError(
            f"cannot get the pretrained weights of {name} ({first_line(error)}): without a network, copy the "
            "checkpoint to this machine and pass its file as --weights FILE (weights= in Python)"
        ) from error
