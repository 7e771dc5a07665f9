"""Models of torchvision and open_clip by name, with how their images are prepared in the words of timm's configs."""

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
    """A classifier `vit_*`; `pretrained` takes its default weights, whose settings its images follow either way."""
    from torchvision import models

    known = [known for known in models.list_models() if known.startswith("vit_")]
    _check(name, known, "torchvision")
    weights = models.get_model_weights(name).DEFAULT
    given = {"num_classes": num_classes, "image_size": image_size}
    arguments = {**{key: value for key, value in given.items() if value is not None}, **kwargs}
    model = _built(name, lambda: models.get_model(name, weights=weights if pretrained else None, **arguments))
    images = weights.transforms()
    model.pretrained_cfg = {
        "architecture": f"torchvision:{name}",
        "input_size": (3, model.image_size, model.image_size),
        "interpolation": images.interpolation.value,
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        "crop_pct": images.crop_size[0] / images.resize_size[0],
        "crop_mode": "center",
    }
    return model


def build_open_clip(
    name: str, pretrained: bool, num_classes: int | None, image_size: int | None, kwargs: dict[str, Any]
) -> nn.Module:
    """The visual tower of NAME or NAME/TAG, images to embeddings; TAG says which of open_clip's weights to take."""
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip", "open-clip", f"the model open_clip:{name}") from error
    architecture, _, tag = name.partition("/")
    _check(architecture, open_clip.list_models(), "open_clip")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (pretrained or tag) and tag not in tags:
        raise UsageError(f"open_clip:{architecture}/TAG takes its weights, TAG one of {', '.join(tags) or '(none)'}")
    if num_classes is not None:
        raise UsageError(f"open_clip:{name} gives embeddings, not classes: leave out num_classes")
    if image_size is not None:
        kwargs = {**kwargs, "force_image_size": image_size}
    whole = _built(name, lambda: open_clip.create_model(architecture, pretrained=tag or None, **kwargs))
    images = open_clip.get_model_preprocess_cfg(whole)
    model: Any = whole.visual
    model.pretrained_cfg = {
        "architecture": f"open_clip:{architecture}",
        "input_size": (3, *images["size"]),
        "interpolation": images["interpolation"],
        "mean": tuple(images["mean"]),
        "std": tuple(images["std"]),
        "crop_pct": 1.0,
        "crop_mode": {"shortest": "center", "longest": "border", "squash": "squash"}[images["resize_mode"]],
    }
    return model


BUILDERS: dict[str, Builder] = {"torchvision": build_torchvision, "open_clip": build_open_clip}
"""What comes before the colon of a name."""


def _check(name: str, known: list[str], library: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:5]
        raise UsageError(f"{library} knows no vision transformer {name!r}: did you mean {', '.join(near)}?")


def _built(name: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"cannot build {name}: {first_line(error)}") from error
    except Exception as error:  # the network and the hub fail each in their own way
        raise LTMPError(
            f"cannot get the pretrained weights of {name} ({first_line(error)}): without a network, copy the "
            "checkpoint here and give its file as --weights FILE (weights= in Python)"
        ) from error
