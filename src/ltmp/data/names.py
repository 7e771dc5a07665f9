"""Human-readable names of a model's classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.describe import classes_of, labels_of, metadata_of
from .dataset import check_names, read_names

_WORDNET = re.compile(r"n\d{8}")


def class_names(
    model: nn.Module, dataset: Any = None, file: str | Path | None = None, *, pretrained: bool = True
) -> list[str]:
    """Return class names in the order of the model's outputs, or an empty list if they are unknown.

    The first of these sources that has names is used: `file`, the folders of `dataset`, the model's metadata, the
    `id2label` of a transformers model, and timm's names for its pretrained weights.

    Args:
        model: the classifier, with or without thresholds attached.
        dataset: its class folders name the classes; ImageNet's folders are replaced by words.
        file: a text file with one name per line.
        pretrained: whether a timm model has timm's weights: timm's names belong to these, not to the architecture.

    Raises:
        UsageError: the file cannot be read, or does not hold one name for each of the model's classes.
    """
    if file is not None:
        names = read_names(file)
        check_names(names, classes_of(model))
        return names
    labelled = getattr(dataset, "labelled", True)
    from_folders = folder_names(dataset) if labelled else []
    from_model = metadata_of(model).class_names or labels_of(model)
    return from_folders or list(from_model) or (_timm_names(model) if pretrained else [])


def folder_names(dataset: Any) -> list[str]:
    """Return the names of a dataset's class folders in the order of their labels, with words for ImageNet's folders."""
    class_to_index = getattr(dataset, "class_to_index", None) or {}
    by_index = {index: name for name, index in class_to_index.items()}
    names = [by_index.get(index, f"class {index}") for index in range(1 + max(by_index, default=-1))]
    return _in_words(names) if any(map(_WORDNET.fullmatch, names)) else names


def _timm_names(model: Any) -> list[str]:
    """Return timm's class names for its own weights; none if the head has another number of classes."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not config or config.get("num_classes") != getattr(model, "num_classes", None):
        return []
    if isinstance(config.get("label_names"), list | tuple):
        return [str(name) for name in config["label_names"]]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return _in_words(ImageNetInfo(subset).label_names()) if subset else []


def _in_words(names: list[str]) -> list[str]:
    """Replace ImageNet's folder names (n01443537) by words (goldfish) without synonyms; keep other names."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()

    def words(name: str) -> str:
        try:
            return str(info.label_name_to_description(name)).partition(",")[0]
        except KeyError:
            return name

    return [words(name) for name in names]
