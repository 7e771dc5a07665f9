"""Names of a model's classes that people can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from .dataset import read_names

_WORDNET = re.compile(r"n\d{8}")


def class_names(model: nn.Module, dataset: Any = None, file: str | Path | None = None) -> list[str]:
    """Class names in the order of the model's outputs; empty where nobody knows them.

    Args:
        model: one of transformers with `id2label`, or of timm with an ImageNet head, brings its own.
        dataset: its folder names go before the model's; those of ImageNet are put into words.
        file: a text file with one name a line, which goes before everything.

    Raises:
        UsageError: the file cannot be read.
    """
    if file is not None:
        return read_names(file)
    return _folders(dataset) or _own(model)


def _folders(dataset: Any) -> list[str]:
    known = getattr(dataset, "class_to_index", None) or {}
    if not getattr(dataset, "labelled", True):
        return []
    found = {index: name for name, index in known.items()}
    names = [found.get(index, f"class {index}") for index in range(1 + max(found, default=-1))]
    return _in_words(names) if any(map(_WORDNET.fullmatch, names)) else names


def _own(model: nn.Module) -> list[str]:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels and not all(str(name).startswith("LABEL_") for name in labels.values()):
        return [str(labels[index]) for index in sorted(labels)]
    if not getattr(model, "pretrained_cfg", None):
        return []
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return _in_words(ImageNetInfo(subset).label_names()) if subset else []


def _in_words(names: list[str]) -> list[str]:
    """ImageNet's folder names (n01443537) as words (goldfish), without the synonyms; others as they are."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()

    def words(name: str) -> str:
        try:
            return str(info.label_name_to_description(name)).partition(",")[0]
        except KeyError:
            return name

    return [words(name) for name in names]


def known_names(model: nn.Module, pretrained: bool) -> tuple[str, ...] | None:
    """The class names that came with the weights."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if not pretrained or config.get("num_classes") != getattr(model, "num_classes", None):
        return None
    if isinstance(config.get("label_names"), list | tuple):
        return tuple(map(str, config["label_names"]))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return tuple(map(str, ImageNetInfo(subset).label_descriptions())) if subset else None
