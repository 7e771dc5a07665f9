"""Names of a model's classes that people can read."""

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
    """Class names in the order of the model's outputs; empty where nobody knows them.

    Args:
        model: its thresholds may bring names; one of transformers brings its `id2label`, one of timm the names of
            ImageNet's classes or of its own.
        dataset: its folder names go before the model's; those of ImageNet are put into words.
        file: a text file with one name a line, which goes before everything.
        pretrained: whether a model of timm has timm's weights: the names belong to these, not to the architecture.

    Raises:
        UsageError: the file cannot be read, or does not hold one name for each of the model's classes.
    """
    if file is not None:
        names = read_names(file)
        check_names(names, classes_of(model))
        return names
    own = metadata_of(model).class_names or labels_of(model)
    labelled = getattr(dataset, "labelled", True)
    return (folder_names(dataset) if labelled else []) or list(own) or (_timms(model) if pretrained else [])


def folder_names(dataset: Any) -> list[str]:
    """Names of a dataset's class folders in the order of their labels, those of ImageNet in words."""
    known = getattr(dataset, "class_to_index", None) or {}
    found = {index: name for name, index in known.items()}
    names = [found.get(index, f"class {index}") for index in range(1 + max(found, default=-1))]
    return _in_words(names) if any(map(_WORDNET.fullmatch, names)) else names


def _timms(model: Any) -> list[str]:
    """Names that timm knows of its own weights; none for a head of another size."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not config or config.get("num_classes") != getattr(model, "num_classes", None):
        return []
    if isinstance(config.get("label_names"), list | tuple):
        return [str(name) for name in config["label_names"]]
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
