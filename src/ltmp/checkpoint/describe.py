"""Collect the metadata of a model, for the thresholds files that are saved from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..hosts.attach import attachment, is_attached
from ..method.policy import Policy
from .metadata import LIBRARIES, Metadata, Preprocessing

_BUILD_METADATA = "ltmp_metadata"
"""Attribute of a model built from a file that holds the file's metadata; used until thresholds are loaded."""

MODEL_FACTS = (
    "model_name", "architecture", "library", "base_model", "model_kwargs", "num_classes", "input_size", "preprocessing",
    "class_names",
)  # fmt: skip
"""Fields of `Metadata` that describe the model and hold for any thresholds."""

_COMPUTED = ("architecture", "depth", "width", "input_size", "budget", "dial", "certificate")
"""Fields that `save` reads from the attached model itself, and which are therefore not recorded."""


@dataclass(frozen=True)
class RecordedMetadata:
    """Metadata recorded for a model, with a copy of the thresholds that it describes.

    Attributes:
        merge, prune: [L] on the CPU; None for fixed rates.
    """

    metadata: Metadata
    merge: Tensor | None
    prune: Tensor | None

    def valid_for(self, policy: Policy) -> Metadata:
        """Return the metadata, or only the facts about the model if the thresholds have changed since."""
        unchanged = all(map(_equal, (self.merge, self.prune), _threshold_vectors(policy)))
        return self.metadata if unchanged else Metadata(**{name: getattr(self.metadata, name) for name in MODEL_FACTS})


def collect_metadata(model: nn.Module) -> dict[str, Any]:
    """Return all metadata of an attached model and its thresholds as JSON types; recorded metadata takes precedence."""
    return {**attachment(model).describe(), **_own_metadata(model).to_dict(), **metadata_of(model).to_dict()}


def note(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Record metadata of an attached model's current thresholds, for `ltmp.save`.

    Args:
        facts: fields of `Metadata`, or other names with JSON values. None, and whatever `save` computes itself, is
            ignored.
    """
    policy = attachment(model).policy
    new = {name: value for name, value in facts.items() if value is not None and name not in _COMPUTED}
    about = Metadata.from_dict({**metadata_of(model).to_dict(), **new})
    policy.recorded_metadata = RecordedMetadata(about, *_threshold_vectors(policy))


def metadata_of(model: nn.Module) -> Metadata:
    """Return the metadata recorded for a model: by `note`, by loading thresholds, or when it was built from a file."""
    if isinstance(model, nn.Module) and is_attached(model):
        policy = attachment(model).policy
        if policy.recorded_metadata is not None:
            return cast("Metadata", policy.recorded_metadata.valid_for(policy))
    built: Metadata | None = getattr(model, _BUILD_METADATA, None)
    return built or Metadata()


def record_build(model: nn.Module, about: Metadata, model_kwargs: dict[str, Any]) -> None:
    """Record, on a model that was just built from a file, the file's metadata and the arguments it was built with.

    Arguments that a file cannot hold are left out, all of them.
    """
    storable = _storable({"model_kwargs": model_kwargs}).model_kwargs
    setattr(model, _BUILD_METADATA, replace(about, model_kwargs=storable))


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """Return the class names in a transformers config, or () if they are the library's placeholders (LABEL_0, ...)."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, dict) or all(str(name).startswith("LABEL_") for name in labels.values()):
        return ()
    return tuple(str(labels[index]) for index in sorted(labels))


def classes_of(model: Any) -> int | None:
    """Return the number of outputs of the model's head, or None if the model does not state it."""
    count = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
    return count if isinstance(count, int) else None


def _own_metadata(model: Any) -> Metadata:
    """Metadata from the model's class and its timm or transformers config."""
    packages = {cls.__module__.partition(".")[0] for cls in type(attachment(model).host).__mro__}
    config = getattr(model, "pretrained_cfg", None) or {}
    names = labels_of(model) or tuple(map(str, config.get("label_names") or ()))
    source = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    facts = {
        # a local folder is of no use on another machine, and private
        "model_name": f"hf:{source}" if source and not os.path.exists(source) else None,
        "library": next((name for name in LIBRARIES if name in packages), None),
        "num_classes": classes_of(model),
        "class_names": names if len(names) == classes_of(model) else None,
    }
    return replace(_storable(facts), preprocessing=_preprocessing(config))


def _storable(facts: dict[str, Any]) -> Metadata:
    """The facts that a file can hold: a model may use anything as a name."""
    about = Metadata()
    for name, value in facts.items():
        try:
            about = replace(about, **{name: getattr(Metadata.from_dict({name: value}), name)})
        except ValueError:
            continue
    return about


def _preprocessing(config: Any) -> Preprocessing:
    try:
        return Preprocessing.from_dict(config)
    except ValueError:
        return Preprocessing()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _threshold_vectors(policy: Policy) -> list[Tensor | None]:
    """Copies of the merge and prune thresholds, [L] on the CPU; None for fixed rates."""
    values = [getattr(policy, name, None) for name in ("merge", "prune")]
    return [None if value is None else value.detach().cpu().clone() for value in values]
