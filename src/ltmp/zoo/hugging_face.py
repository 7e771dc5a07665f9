"""Build models of Hugging Face from a folder or the hub, and translate their image processors for timm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LTMPError, MissingExtraError, UsageError, first_line
from ..hosts.attach import find_host

PREFIX = "hf:"
"""Prefix of the names of such models."""

_SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}

_CODE = ("weights_only", "allow_all_kernels", "use_kernels", "kernel_config")
"""Arguments that could load pickles or code from the hub."""

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Number of a Pillow filter, as in image processors -> timm's name of it."""


def build_pretrained(
    name: str, unsupported: dict[str, Any], kwargs: dict[str, Any], *, classifier: bool = True
) -> nn.Module:
    """Build the image classifier in a folder or on the hub, in float32 and evaluation mode.

    Weights are read from safetensors only, and no code that comes with a model is run. `pretrained_cfg` and
    `num_classes` are set on the model, as in timm, so that images are prepared as by its image processor.

    Args:
        name: `hf:` and a folder written by `save_pretrained`, or a name on the hub.
        unsupported: arguments that a pretrained model determines itself; all must be None.
        kwargs: further arguments of `from_pretrained`, e.g. `revision`.
        classifier: accept only image classifiers. Otherwise any model is built; for one that takes more than images,
            its vision tower.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: an unsupported argument, one that would run code or read pickles, or an image processor that timm's
            transforms cannot reproduce.
        LTMPError: the model cannot be loaded, or weights are missing.
    """
    source = name.removeprefix(PREFIX)
    refused = sorted(option for option, value in unsupported.items() if value is not None)
    if refused:
        raise UsageError(f"{name} has its own weights, classes and image size: leave out {', '.join(refused)}")
    refused = sorted({*_SAFE, *_CODE} & kwargs.keys())
    if refused:
        raise UsageError(f"{', '.join(refused)} cannot be set: no code and no pickles of a model are loaded")
    try:
        from transformers import AutoModelForImageClassification, PreTrainedConfig
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", f"the model {name}") from error
    try:
        location = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
        config = PreTrainedConfig.get_config_dict(source, **location)[0]
        kernels = _find_kernels({**config, **kwargs})
    except Exception as error:
        raise _unavailable("config", source, error) from error
    if kernels:
        raise UsageError(f"{source} computes attention by code from {kernels}: no code of a model is loaded")
    try:
        with quiet_in_logs():
            cls = AutoModelForImageClassification if classifier else _class_of(config)
            model, report = cls.from_pretrained(
                source, **{"dtype": torch.float32, **kwargs}, **_SAFE, output_loading_info=True
            )
    except Exception as error:  # the network, the hub, the files and the config each raise their own exceptions
        raise _unavailable("model", source, error) from error
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise LTMPError(
            f"{source} has no weights for {missing[0]!r} of a {type(model).__name__} ({len(missing)} such parameters): "
            + ("give a model that was fine-tuned to classify" if classifier else "give one with all of its weights")
        )
    preprocessing = data_config(model)
    image_model = _image_model(model, source)
    image_model.pretrained_cfg = preprocessing
    if image_model is model and "ForImageClassification" in type(model).__name__:
        image_model.num_classes = model.config.num_labels
    return image_model.eval()


def _class_of(config: dict[str, Any]) -> Any:
    """Return the model class that a config names; that of image classifiers if it names none."""
    import transformers

    name = next(iter(config.get("architectures") or ()), "")
    cls = getattr(transformers, str(name), None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model else transformers.AutoModelForImageClassification


def _image_model(model: Any, source: str) -> Any:
    """Return the model itself if it takes images only, or else its vision tower.

    Raises:
        UsageError: the tower does not take images but what a processor computes from them.
    """
    tower = model if "input_ids" not in signature(model.forward).parameters else find_host(model)[0]
    if "pixel_values" in signature(tower.forward).parameters:
        return tower
    raise UsageError(
        f"{source} is a {type(model).__name__}, whose {type(tower).__name__} reads what a processor made of images: "
        "use it from Python"
    )


def _find_kernels(config: dict[str, Any]) -> str | None:
    """Return the hub repository of attention kernels that a config, or one nested in it, would load code from."""
    for key, value in config.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            return ascii(value)
        nested = _find_kernels(value) if isinstance(value, dict) else None
        if nested:
            return nested
    return None


def save_classifier(model: Any, state: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write a model with the weights `state`, and its image processor, into a folder that `hf:FOLDER` can load.

    Raises:
        LTMPError: the folder cannot be written, or the model's image processor is unknown.
    """
    from transformers import AutoImageProcessor

    source = model.config.name_or_path
    if not source:
        raise LTMPError(
            "this model does not name the source of its image processor, without which images cannot be prepared for "
            "it: save_pretrained both into one folder, and load the model from there"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        with quiet_in_logs():
            model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
    except OSError as error:
        raise LTMPError(f"cannot save the model in {folder}: {first_line(error)}") from error


@contextmanager
def quiet_in_logs() -> Iterator[None]:
    """Suppress transformers' progress bars inside, if stderr is a file or a pipe."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is a model of transformers, without importing transformers."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def data_config(model: Any) -> dict[str, Any]:
    """Return the preprocessing of a model's image processor, as a data config of timm.

    Raises:
        LTMPError: the processor cannot be loaded.
        UsageError: timm's transforms cannot reproduce it.
    """
    from transformers import AutoImageProcessor

    source = model.config.name_or_path
    try:
        if not source:
            raise OSError("the model's config does not name where it was loaded from")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _unavailable("image processor", source or type(model).__name__, error) from error
    return translate(processor.to_dict(), int(getattr(model.config, "num_channels", 3)))


def translate(processor: dict[str, Any], channels: int = 3) -> dict[str, Any]:
    """Translate an image processor's settings to a data config of timm.

    Returns:
        `input_size`, `interpolation`, `mean`, `std`, `crop_pct` and `crop_mode`.

    Raises:
        UsageError: timm's transforms cannot reproduce the settings.
    """
    resized = _edges(processor.get("size"))
    cropped = (_edges(processor.get("crop_size")) if processor.get("do_center_crop") else None) or resized
    rescales = abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    if not (processor.get("do_resize") and rescales and resized and cropped and _is_crop(cropped, resized)):
        settings = {name: processor.get(name) for name in ("do_resize", "size", "crop_size", "rescale_factor")}
        raise UsageError(f"no transform of timm does what this image processor does ({settings}): write one for it")
    normalizes = processor.get("do_normalize", True)
    return {
        "input_size": (channels, *cropped),
        "interpolation": _INTERPOLATION[int(processor.get("resample", 2))],
        "mean": tuple(processor["image_mean"]) if normalizes else (0.0,) * channels,
        "std": tuple(processor["image_std"]) if normalizes else (1.0,) * channels,
        # timm computes the size to resize to as floor(size / crop_pct)
        "crop_pct": 1.0 if cropped == resized else cropped[0] / (resized[0] + 0.5),
        "crop_mode": "center" if "shortest_edge" in processor["size"] else "squash",
    }


def _is_crop(crop: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a size is at most that of an image, with the same aspect ratio."""
    return crop[0] <= image[0] and crop[0] * image[1] == crop[1] * image[0]


def _edges(size: Any) -> tuple[int, int] | None:
    """Return the height and width of a processor's size setting; None if they depend on the image."""
    if isinstance(size, int):
        return size, size
    size = dict(size or {})
    if "shortest_edge" in size and size.get("longest_edge") is None:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return (int(size["height"]), int(size["width"])) if size.get("height") and size.get("width") else None


def _unavailable(what: str, source: str, error: Exception) -> LTMPError:
    reason = first_line(error).rstrip(".")
    return LTMPError(
        f"cannot load the {what} of {source} from Hugging Face ({reason}): without a network, save_pretrained it where "
        f"there is one and give the folder as {PREFIX}FOLDER"
    )
