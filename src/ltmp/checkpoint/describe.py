"""Metadata of a model, for the thresholds files that are saved from it."""

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

_BUILT = "ltmp_metadata"
"""The attribute of a model that was built as a file says, until thresholds are loaded."""

MODEL_FACTS = (
    "model_name", "architecture", "library", "base_model", "model_kwargs", "num_classes", "input_size", "preprocessing",
    "class_names",
)  # fmt: skip
"""What is said of the model, and holds whatever its thresholds are."""

_COMPUTED = ("architecture", "depth", "width", "input_size", "budget", "dial", "certificate")


@dataclass(frozen=True)
class Noted:
    """Metadata of thresholds, with their fingerprint: for other thresholds only the model's part of it holds.

    Attributes:
        merge, prune: [L] on the CPU; None of fixed rates.
    """

    about: Metadata
    merge: Tensor | None
    prune: Tensor | None

    def held(self, policy: Policy) -> Metadata:
        """The part of it that still holds."""
        same = all(map(_same, (self.merge, self.prune), _vectors(policy)))
        return self.about if same else Metadata(**{name: getattr(self.about, name) for name in MODEL_FACTS})


def facts_of(model: nn.Module) -> dict[str, Any]:
    """All that is known of an attached model and its thresholds, JSON types; what was noted goes first."""
    return {**attachment(model).describe(), **_found(model).to_dict(), **metadata_of(model).to_dict()}


def note(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Remember what `ltmp.save` should say of an attached model's thresholds as they are now.

    Args:
        facts: as in `Metadata`, and others; None and what `save` finds out itself are left out.
    """
    policy = attachment(model).policy
    new = {name: value for name, value in facts.items() if value is not None and name not in _COMPUTED}
    about = Metadata.from_dict({**metadata_of(model).to_dict(), **new})
    policy.noted = Noted(about, *_vectors(policy))


def metadata_of(model: nn.Module) -> Metadata:
    """Metadata noted for a model: by `note`, by loading thresholds, or when it was built from a file."""
    if isinstance(model, nn.Module) and is_attached(model):
        policy = attachment(model).policy
        if policy.noted is not None:
            return cast("Metadata", policy.noted.held(policy))
    built: Metadata | None = getattr(model, _BUILT, None)
    return built or Metadata()


def built_as(model: nn.Module, about: Metadata, model_kwargs: dict[str, Any]) -> None:
    """Note of a model that was just built what a file says of it, and its arguments, where a file can say them."""
    setattr(model, _BUILT, replace(about, model_kwargs=_said({"model_kwargs": model_kwargs}).model_kwargs))


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """Names in the config of a model of transformers; those that the library makes up do not count."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, dict) or all(str(name).startswith("LABEL_") for name in labels.values()):
        return ()
    return tuple(str(labels[index]) for index in sorted(labels))


def classes_of(model: Any) -> int | None:
    """Outputs of the head, as far as the model says."""
    count = getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
    return count if isinstance(count, int) else None


def _found(model: Any) -> Metadata:
    """Metadata that the model itself holds."""
    roots = {cls.__module__.partition(".")[0] for cls in type(attachment(model).host).__mro__}
    config = getattr(model, "pretrained_cfg", None) or {}
    names = labels_of(model) or tuple(map(str, config.get("label_names") or ()))
    place = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    known = {
        # a folder of this machine is nobody else's business
        "model_name": f"hf:{place}" if place and not os.path.exists(place) else None,
        "library": next((name for name in LIBRARIES if name in roots), None),
        "num_classes": classes_of(model),
        "class_names": names if len(names) == classes_of(model) else None,
    }
    return replace(_said(known), preprocessing=_preprocessing(config))


def _said(known: dict[str, Any]) -> Metadata:
    """The class names, if a file can hold them: a model may use anything as a name."""
    found = Metadata()
    for name, value in known.items():
        try:
            found = replace(found, **{name: getattr(Metadata.from_dict({name: value}), name)})
        except ValueError:
            continue
    return found


def _preprocessing(config: Any) -> Preprocessing:
    try:
        return Preprocessing.from_dict(config)
    except ValueError:
        return Preprocessing()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _vectors(policy: Policy) -> list[Tensor | None]:
    """Thresholds [L] on the CPU, where there are any."""
    values = [getattr(policy, name, None) for name in ("merge", "prune")]
    return [None if value is None else value.detach().cpu().clone() for value in values]
