"""A model by name, of timm or another library, and one clear sentence for everything that can fail."""

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
from .hugging_face import PREFIX, build_pretrained, is_of_transformers, save_classifier
from .libraries import BUILDERS
from .timm_names import no_weights, parse_name

_LOADS = {
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_image_path",
    "pretrained_text_path", "weights", "weights_only",
}  # fmt: skip
"""Arguments of timm, torchvision and open_clip that say where weights come from, and how they are read."""

_SAFE_NAME = re.compile(r"(torchvision:)?[\w.-]+|open_clip:[\w.-]+(/[\w.-]+)?|hf:[^:]+")
"""Names of models whose weights are read from safetensors, or come from where the library itself says."""
_HEAD = re.compile(r"(head|heads|classifier|fc)(_dist)?\.")
"""Names of layers that give classes, in the libraries that models come from."""


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
    """timm.create_model in evaluation mode, checked; or an image classifier of transformers with its own weights.

    Args:
        name: a timm model name; of an `ltmp_*` name the host is built, with nothing attached. `hf:NAME_OR_FOLDER` is
            a model of transformers on the Hugging Face hub or on disk, `torchvision:NAME` a ViT of torchvision,
            `open_clip:NAME[/WEIGHTS]` a visual tower of open_clip.
        weights: a checkpoint, safetensors or torch's format read without unpickling code; a file of the seed's training
            is taken without its thresholds.
        pretrained: take timm's weights, from its cache or over the network.
        num_classes: outputs of the head; None leaves the model's own number.
        image_size: pixels a side; None leaves the model's own.
        model_kwargs: more arguments of the timm model, or of `from_pretrained`.
        classifier: of transformers, refuse what is none; otherwise any model is built, of one that reads more than
            images its vision tower.

    Raises:
        UsageError: the name or an argument is not known to timm, or a model of transformers brings that argument; or an
            argument that would load weights past `weights`.
        LTMPError: the weights cannot be had, do not fit, or hold NaN.
    """
    loads = sorted(_LOADS & (model_kwargs or {}).keys())
    if loads:
        raise UsageError(
            f"{', '.join(loads)} cannot be an argument of the model: give a checkpoint as --weights FILE (weights= in "
            "Python), which is read without running code"
        )
    if name.startswith(PREFIX):
        given = {"weights": weights, "num_classes": num_classes, "image_size": image_size}
        return build_pretrained(name, given, model_kwargs or {}, classifier=classifier)
    library, _, rest = name.partition(":")
    if library in BUILDERS:
        model = BUILDERS[library](rest, pretrained and weights is None, num_classes, image_size, model_kwargs or {})
    else:
        model = _build_timm(parse_name(name)[1], pretrained and weights is None, num_classes, image_size, model_kwargs)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


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


def name_in_file(about: Metadata, source: str | os.PathLike[str]) -> str | None:
    """The name of the model that a file says it is for; None where it does not say.

    Raises:
        UsageError: a name with a source of weights, which is for the one who types it to trust.
    """
    # the full name also says which weights; a file that Python saved knows the architecture only
    name = about.model_name or about.architecture
    if name is not None and not is_safe_name(name):
        raise UsageError(
            f"{source} names the model {name}: a file of somebody else may not choose where weights are loaded from; "
            f"if you trust that place, give it yourself, as --model {name}"
        )
    return name


def is_safe_name(name: str) -> bool:
    """Whether a model of this name can be built whoever says so."""
    return _SAFE_NAME.fullmatch(name) is not None


def brings_weights(name: str) -> bool:
    """Whether a model's name says which weights it has."""
    return name.startswith(PREFIX) or (name.startswith("open_clip:") and "/" in name)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint of `model`, all of it or nothing.

    Raises:
        LTMPError: unreadable, not finite, or made for another shape; the message names the first parameter at fault.
    """
    state = split_thresholds(read_state_dict(path), str(path))[1]
    _check_finite(state, path)
    _check_fit(model, state, path)
    model.load_state_dict(state)


def _check_name(name: str) -> None:
    import timm

    # A name with a source ("hf-hub:...", "local-dir:...") is timm's to look up.
    architecture = name.partition(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, [n for n in timm.list_models() if parse_name(n)[0] is None], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has all names"
    raise UsageError(f"timm knows no model {name!r}: {hint}")


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, AssertionError) as error:
        raise UsageError(f"timm cannot build {name} with {kwargs or 'its defaults'}: {first_line(error)}") from error
    # What is missing may be the network, the hub's answer or the weights themselves, each with its own class.
    except Exception as error:
        if not pretrained:
            raise UsageError(f"timm cannot build {name}: {first_line(error)}") from error
        raise no_weights(name, error, "give its file as --weights FILE (weights= in Python)") from error


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
    own = model.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unknown:
        faults = [f"{what} {min(keys)!r}" for what, keys in (("lacks", missing), ("has", unknown)) if keys]
        raise LTMPError(
            f"{path} is not a checkpoint of this model: it {' and '.join(faults)} "
            f"({len(missing)} missing, {len(unknown)} unknown parameters); check --model and --model-kwargs"
        )
    others: list[str] = []
    settings: list[str] = []
    for key, value in own.items():
        here, there = value.shape, state[key].shape
        if here == there:
            continue
        hint = _hint(model, key, here, there)
        if hint is None:
            raise LTMPError(
                f"{path} does not fit the model: {key!r} is {list(there)} there and {list(here)} here; check --model, "
                "--img-size and --model-kwargs"
            )
        others.append(hint[0])
        settings.append(hint[1])
    if others:
        raise LTMPError(f"{path} {' and '.join(dict.fromkeys(others))}: use {' '.join(dict.fromkeys(settings))}")


def _hint(model: nn.Module, key: str, here: torch.Size, there: torch.Size) -> tuple[str, str] | None:
    """Explain a parameter of another shape, and name the option that builds the model to match the checkpoint."""
    if _HEAD.match(key) and here[1:] == there[1:]:
        return f"has {there[0]} classes but the model's head has {here[0]}", f"--num-classes {there[0]}"
    embed: Any = getattr(model, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if not (key.endswith("pos_embed") and grid and patch and len(here) == len(there) == 3):
        return None
    # a class token and the like have a position, too, in some models
    side = math.isqrt(max(0, there[1] - (here[1] - grid[0] * grid[1])))
    if side == 0 or side * side != there[1] - (here[1] - grid[0] * grid[1]):
        return None
    was, now = side * patch[0], grid[0] * patch[0]
    return f"is for images of {was} pixels but the model takes {now}", f"--img-size {was}"


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without thresholds: what it has when nothing is attached."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if not name.startswith("ltmp.")
    }


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's own weights as a plain checkpoint of its library, e.g. after `ltmp.tune`.

    Args:
        path: a `.safetensors` file, replaced whole or left alone; of a classifier of transformers, a folder.

    Raises:
        LTMPError: it cannot be written.
    """
    if is_of_transformers(model):
        save_classifier(model, plain_state(model), path)
        return
    write_tensors(plain_state(model), path, {"format": "pt"})
