"""Models of Hugging Face by folder or hub name, and how their image processors prepare images."""

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
"""What names of such models begin with."""

_SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}

_CODE = ("weights_only", "allow_all_kernels", "use_kernels", "kernel_config")
"""Arguments that would let pickles or code of the hub in."""

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filters, as processors number them, by timm's names."""


def build_pretrained(name: str, given: dict[str, Any], kwargs: dict[str, Any], *, classifier: bool = True) -> nn.Module:
    """The image classifier in a folder or on the hub, in float32 and evaluation mode.

    Weights are read from safetensors alone, and no code that comes with a model is run. `pretrained_cfg` and
    `num_classes` are set on the model, as timm has them, so that data is prepared as its image processor would.

    Args:
        name: `hf:` and a folder that `save_pretrained` wrote, or a name on the hub.
        given: what only models of timm can be given; nothing here may have a value.
        kwargs: more arguments of `from_pretrained`, e.g. `revision`.
        classifier: refuse what is none. Otherwise the model is whatever is there; of one that reads more than images,
            the vision tower.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: an argument of timm, one that would run code or read pickles, or an image processor that timm's
            transforms cannot follow.
        LTMPError: the model cannot be had, or its weights are not whole.
    """
    source = name.removeprefix(PREFIX)
    refused = sorted(option for option, value in given.items() if value is not None)
    if refused:
        raise UsageError(f"{name} brings its own weights, classes and image size: leave out {', '.join(refused)}")
    refused = sorted({*_SAFE, *_CODE} & kwargs.keys())
    if refused:
        raise UsageError(f"{', '.join(refused)} cannot be set: no code and no pickles of a model are loaded")
    try:
        from transformers import AutoModelForImageClassification, PreTrainedConfig
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", f"the model {name}") from error
    try:
        place = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
        config = PreTrainedConfig.get_config_dict(source, **place)[0]
        kernels = _kernels({**config, **kwargs})
    except Exception as error:
        raise _unavailable("config", source, error) from error
    if kernels:
        raise UsageError(f"{source} computes attention by code from {kernels}: no code of a model is loaded")
    try:
        with quiet_in_logs():
            kind = AutoModelForImageClassification if classifier else _class_of(config)
            model, report = kind.from_pretrained(
                source, **{"dtype": torch.float32, **kwargs}, **_SAFE, output_loading_info=True
            )
    except Exception as error:  # the network, the hub, the files and the config fail each in their own way
        raise _unavailable("model", source, error) from error
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        raise LTMPError(
            f"{source} has no weights for {lacking[0]!r} of a {type(model).__name__} ({len(lacking)} such parameters): "
            f"give a model that was fine-tuned {'to classify' if classifier else 'whole'}"
        )
    settings = data_config(model)
    found = _reading_images(model, source)
    found.pretrained_cfg = settings
    if found is model and "ForImageClassification" in type(model).__name__:
        found.num_classes = model.config.num_labels
    return found.eval()


def _class_of(config: dict[str, Any]) -> Any:
    """The class of transformers that a config names; that of classifiers where it names none."""
    import transformers

    name = next(iter(config.get("architectures") or ()), "")
    found = getattr(transformers, str(name), None)
    of_models = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if of_models else transformers.AutoModelForImageClassification


def _reading_images(model: Any, source: str) -> Any:
    """The model itself where images are all that it reads, or else its vision tower."""
    tower = model if "input_ids" not in signature(model.forward).parameters else find_host(model)[0]
    if "pixel_values" in signature(tower.forward).parameters:
        return tower
    raise UsageError(
        f"{source} is a {type(model).__name__}, whose {type(tower).__name__} reads what a processor made of images: "
        "use it from Python"
    )


def _kernels(config: dict[str, Any]) -> str | None:
    """The repository of code that a config, or a part of one, has attention computed by."""
    for key, value in config.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            return ascii(value)
        found = _kernels(value) if isinstance(value, dict) else None
        if found:
            return found
    return None


def save_classifier(model: Any, state: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write a model with these weights, and its image processor, as `hf:FOLDER` reads them.

    Raises:
        LTMPError: the folder cannot be written, or nobody knows the model's image processor.
    """
    from transformers import AutoImageProcessor

    source = model.config.name_or_path
    if not source:
        raise LTMPError(
            "this model does not say where its image processor is, without which nobody can read images for it: "
            "save_pretrained both into one folder, and load the model from there"
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
    """No progress bars of transformers inside, where stderr is a file or a pipe and no bar can move."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of the library transformers, which is not imported for this."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def data_config(model: Any) -> dict[str, Any]:
    """Preprocessing of a model's image processor, in the terms of timm's data configs.

    Raises:
        LTMPError: the processor cannot be had.
        UsageError: it does what timm's transforms cannot.
    """
    from transformers import AutoImageProcessor

    source = model.config.name_or_path
    try:
        if not source:
            raise OSError("the model does not say where it was loaded from")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _unavailable("image processor", source or type(model).__name__, error) from error
    return translate(processor.to_dict(), int(getattr(model.config, "num_channels", 3)))


def translate(processor: dict[str, Any], channels: int = 3) -> dict[str, Any]:
    """`input_size`, `interpolation`, `mean`, `std`, `crop_pct` and `crop_mode` from an image processor's settings."""
    resized = _edges(processor.get("size"))
    cropped = (_edges(processor.get("crop_size")) if processor.get("do_center_crop") else None) or resized
    scaled = abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    if not (processor.get("do_resize") and scaled and resized and cropped and _is_crop(cropped, resized)):
        settings = {name: processor.get(name) for name in ("do_resize", "size", "crop_size", "rescale_factor")}
        raise UsageError(f"no transform of timm does what this image processor does ({settings}): write one for it")
    normal = processor.get("do_normalize", True)
    return {
        "input_size": (channels, *cropped),
        "interpolation": _INTERPOLATION[int(processor.get("resample", 2))],
        "mean": tuple(processor["image_mean"]) if normal else (0.0,) * channels,
        "std": tuple(processor["image_std"]) if normal else (1.0,) * channels,
        # timm rounds the size that it resizes to down
        "crop_pct": 1.0 if cropped == resized else cropped[0] / (resized[0] + 0.5),
        "crop_mode": "center" if "shortest_edge" in processor["size"] else "squash",
    }


def _is_crop(part: tuple[int, int], whole: tuple[int, int]) -> bool:
    return part[0] <= whole[0] and part[0] * whole[1] == part[1] * whole[0]


def _edges(size: Any) -> tuple[int, int] | None:
    """Height and width that a processor's size asks for; None for one that depends on the image."""
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
