"""Build a model of timm or another library by name, load its weights, and save them.

Every failure raises an error of one clear sentence.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.contents import split_thresholds
from ..checkpoint.metadata import Metadata
from ..errors import LTMPError, UsageError, first_line
from ..files.tensors import read_state_dict, write_tensors
from .hugging_face import PREFIX, build_pretrained, is_transformers_model, save_classifier
from .libraries import BUILDERS
from .timm_names import no_weights, parse_name

_LOADS = {
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_image_path",
    "pretrained_text_path", "weights", "weights_only",
}  # fmt: skip
"""Arguments of timm, torchvision and open_clip that choose where weights come from and how they are read."""

_SAFE_NAME = re.compile(r"(torchvision:)?[\w.-]+|open_clip:[\w.-]+(/[\w.-]+)?|hf:[^:]+")
"""Model names that cannot choose unsafe weights: these are safetensors, or come from the library's own source."""

_HEAD = re.compile(r"(head|heads|classifier|fc)(_dist)?\.")
"""Parameter names of classification heads in the supported libraries."""


def build_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    classifier: bool = True,
) -> nn.Module:
    """Build a model by name, in evaluation mode.

    Args:
        name: a timm model name; for an `ltmp_*` name, its host is built with nothing attached. `hf:NAME_OR_FOLDER` is
            a model of transformers on the Hugging Face hub or on disk, `torchvision:NAME` a ViT of torchvision,
            `open_clip:NAME[/WEIGHTS]` a visual tower of open_clip.
        weights: a checkpoint in safetensors or torch's format, read without unpickling code; thresholds in a checkpoint
            of the paper's code are ignored.
        pretrained: load the library's pretrained weights, from its cache or over the network; ignored with `weights`.
        num_classes: number of outputs of the head; None for the model's default.
        image_size: side of the images in pixels; None for the model's default.
        model_kwargs: further arguments of the model's constructor, or of `from_pretrained`.
        classifier: for models of transformers, accept only image classifiers. Otherwise any model is built; for one
            that takes more than images, its vision tower.

    Raises:
        UsageError: the library does not know the name or an argument, a model of transformers determines that argument
            itself, or an argument would load weights other than `weights`.
        LTMPError: the weights cannot be loaded, do not fit, or contain NaN or infinity.
    """
    loads = sorted(_LOADS & (model_kwargs or {}).keys())
    if loads:
        raise UsageError(
            f"{', '.join(loads)} cannot be an argument of the model: give a checkpoint as --weights FILE (weights= in "
            "Python), which is read without running code"
        )
    if name.startswith(PREFIX):
        unsupported = {"weights": weights, "num_classes": num_classes, "image_size": image_size}
        return build_pretrained(name, unsupported, model_kwargs or {}, classifier=classifier)
    pretrained = pretrained and weights is None
    library, _, model_name = name.partition(":")
    if library in BUILDERS:
        model = BUILDERS[library](model_name, pretrained, num_classes, image_size, model_kwargs or {})
    else:
        model = _build_timm(parse_name(name)[1], pretrained, num_classes, image_size, model_kwargs)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into `model`, completely or not at all.

    Raises:
        LTMPError: the checkpoint cannot be read, is not finite, or has another shape; the message names the first
            parameter at fault.
    """
    state = split_thresholds(read_state_dict(path), str(path))[1]
    _check_finite(state, path)
    _check_fit(model, state, path)
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's weights, without thresholds, as a plain checkpoint of its library, e.g. after `ltmp.tune`.

    Args:
        path: a `.safetensors` file, replaced atomically; for a classifier of transformers, a folder.

    Raises:
        LTMPError: the checkpoint cannot be written.
    """
    if is_transformers_model(model):
        save_classifier(model, plain_state(model), path)
        return
    write_tensors(plain_state(model), path, {"format": "pt"})


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state dict on the CPU, without thresholds, as if nothing were attached."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if not name.startswith("ltmp.")
    }


def model_name_in(about: Metadata, source: str | os.PathLike[str]) -> str | None:
    """Return the name of the model that a file was written for, from its metadata; None if it names none.

    Raises:
        UsageError: the name chooses a source of weights, which only the user may trust.
    """
    # the model name also identifies the weights; files saved from Python hold only the architecture
    name = about.model_name or about.architecture
    if name is not None and not is_safe_name(name):
        raise UsageError(
            f"{source} names the model {name}: a file from someone else may not choose where weights are loaded from; "
            f"if you trust that source, pass it yourself, as --model {name}"
        )
    return name


def is_safe_name(name: str) -> bool:
    """Whether a model of this name can be built even if an untrusted file names it."""
    return _SAFE_NAME.fullmatch(name) is not None


def includes_weights(name: str) -> bool:
    """Whether a model's name determines its weights."""
    return name.startswith(PREFIX) or (name.startswith("open_clip:") and "/" in name)


def _build_timm(
    name: str, pretrained: bool, num_classes: int | None, image_size: int | None, model_kwargs: dict[str, Any] | None
) -> nn.Module:
    _check_name(name)
    kwargs = dict(model_kwargs or {})
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if image_size is not None:
        kwargs["img_size"] = image_size
    model = _create(name, pretrained, kwargs)
    _check_patches(model)
    return model


def _check_name(name: str) -> None:
    import timm

    # timm itself looks up names with a source ("hf-hub:...", "local-dir:...")
    architecture = name.partition(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, [n for n in timm.list_models() if parse_name(n)[0] is None], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has all names"
    raise UsageError(f"timm has no model {name!r}: {hint}")


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, AssertionError) as error:
        raise UsageError(f"timm cannot build {name} with {kwargs or 'its defaults'}: {first_line(error)}") from error
    # the network, the hub and missing weights each raise their own exceptions
    except Exception as error:
        if not pretrained:
            raise UsageError(f"timm cannot build {name}: {first_line(error)}") from error
        raise no_weights(name, error, "pass its file as --weights FILE (weights= in Python)") from error


def _check_patches(model: nn.Module) -> None:
    embed: Any = getattr(model, "patch_embed", None)
    patch, size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if patch and size and (size[0] < patch[0] or size[1] < patch[1]):
        raise UsageError(
            f"images of {size[0]}x{size[1]} pixels are smaller than one {patch[0]}x{patch[1]} patch: "
            "give a larger image size"
        )


def _check_finite(state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise LTMPError(
                f"{path} holds NaN or infinity in {key!r}: the run that wrote it diverged, or it is damaged"
            )


def _check_fit(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    expected = model.state_dict()
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        faults = [f"{verb} {min(keys)!r}" for verb, keys in (("lacks", missing), ("has", unknown)) if keys]
        raise LTMPError(
            f"{path} is not a checkpoint of this model: it {' and '.join(faults)} "
            f"({len(missing)} missing, {len(unknown)} unknown parameters); check --model and --model-kwargs"
        )
    # dictionaries as ordered sets
    reasons: dict[str, None] = {}
    options: dict[str, None] = {}
    for key, value in expected.items():
        shape, stored = value.shape, state[key].shape
        if shape == stored:
            continue
        hint = _hint(model, key, shape, stored)
        if hint is None:
            raise LTMPError(
                f"{path} does not fit the model: {key!r} is {list(stored)} in the file and {list(shape)} in the model; "
                "check --model, --img-size and --model-kwargs"
            )
        reason, option = hint
        reasons[reason] = options[option] = None
    if reasons:
        raise LTMPError(f"{path} {' and '.join(reasons)}: use {' '.join(options)}")


def _hint(model: nn.Module, key: str, shape: torch.Size, stored: torch.Size) -> tuple[str, str] | None:
    """Explain why the stored shape of a parameter differs, and return the option that makes the model match.

    None if the reason is neither the number of classes nor the image size.
    """
    if _HEAD.match(key) and shape[1:] == stored[1:]:
        return f"has {stored[0]} classes but the model's head has {shape[0]}", f"--num-classes {stored[0]}"
    embed: Any = getattr(model, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if not (key.endswith("pos_embed") and grid and patch and len(shape) == len(stored) == 3):
        return None
    # in some models, prefix tokens have position embeddings, too
    prefix = shape[1] - grid[0] * grid[1]
    patches = stored[1] - prefix
    side = math.isqrt(max(0, patches))
    if side == 0 or side * side != patches:
        return None
    size = side * patch[0]
    return f"is for images of {size} pixels but the model takes {grid[0] * patch[0]}", f"--img-size {size}"
