"""One folder for one deployment: a model's weights, its thresholds, and how images and answers are read."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import read, save
from .checkpoint.describe import MODEL_FACTS, record_build, classes_of, facts_of
from .checkpoint.metadata import Metadata
from .data.dataset import check_names
from .errors import UsageError
from .files import staged
from .locate import BUNDLE, locate
from .zoo.build import build_model, is_safe_name, name_in_file, save_weights
from .zoo.hugging_face import PREFIX, is_of_transformers

THRESHOLDS = "thresholds.safetensors"
WEIGHTS = "weights.safetensors"
MODEL = "model"
"""The folder of a model of transformers, with its config and image processor."""

log = logging.getLogger("ltmp")


@dataclass(frozen=True)
class Bundle:
    """The metadata of a thresholds file's model, with the weights beside it if it is part of a bundle.

    Attributes:
        source: what was opened, for messages.
        about: what the file says.
        name: of the model, as `build_model` takes it; None where the file does not say.
        weights: a checkpoint beside it, or None.
    """

    source: str
    about: Metadata
    name: str | None = None
    weights: Path | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, budget: float | None = None, **hub: Any) -> Bundle:
        """The bundle at `source`: a thresholds file, its folder, or a repository; see `locate`.

        Raises:
            UsageError: it names a model with a source of weights, or its dial does not reach the budget.
            LTMPError: as `read`.
        """
        file = locate(source, budget=budget, **hub)
        about = read(file, budget=budget).about
        folder = file.parent if (file.parent / BUNDLE).is_file() else None
        if folder is not None and (folder / MODEL).is_dir():
            return cls(os.fspath(source), about, f"{PREFIX}{folder / MODEL}")
        weights = folder / WEIGHTS if folder is not None and (folder / WEIGHTS).is_file() else None
        name = name_in_file(about, source)
        if weights is not None and name is not None and name.startswith("open_clip:"):
            # its weights are here
            name = name.partition("/")[0]
        return cls(os.fspath(source), about, name, weights)

    def build(
        self,
        name: str | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
        image_size: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        classifier: bool = True,
    ) -> nn.Module:
        """`build_model`, where nothing is given as the file says; what is given goes before it, and it is said so.

        Raises:
            UsageError: neither the file nor the caller says which model it is.
        """
        wanted = name or self.name
        if wanted is None:
            raise UsageError(f"{self.source} does not say which model it is for: give --model NAME")
        mine = self._is_mine(wanted)
        said = self._said(wanted, pretrained) if mine else {}
        given = {"num_classes": num_classes, "image_size": image_size}
        for option, value in given.items():
            if None not in (value, said.get(option)) and said[option] != value:
                log.warning(f"{option} {value} goes before {said[option]}, which {self.source} says")
        beside = self.weights if mine and not pretrained else None
        if weights is not None and beside is not None:
            log.warning(f"the weights in {os.fspath(weights)} go before those in {beside}")
        kwargs = {**(self.about.model_kwargs if mine else {}), **(model_kwargs or {})}
        model = build_model(
            wanted,
            weights=beside if weights is None else weights,
            pretrained=pretrained,
            **{option: said.get(option) if value is None else value for option, value in given.items()},
            model_kwargs=kwargs,
            classifier=classifier,
        )
        record_build(model, self.about, kwargs)
        return model

    def _is_mine(self, name: str) -> bool:
        """Whether a name is that of the file's own model, which the rest of what it says is about."""
        known = (self.name, self.about.model_name, self.about.architecture)
        return name.partition(".")[0] in {each.partition(".")[0] for each in known if each is not None}

    def _said(self, name: str, pretrained: bool) -> dict[str, int | None]:
        """Head and image size, as far as the file knows them and a model of this name takes them."""
        if name.startswith(PREFIX):
            # it brings its own
            return {}
        size = self.about.input_size or ()
        # pretrained weights have a head of their own, and towers have none
        headed = not pretrained and not name.startswith("open_clip:")
        return {
            "num_classes": self.about.num_classes if headed else None,
            "image_size": size[0] if len(set(size)) == 1 else None,
        }


def pack(model: nn.Module, folder: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write one folder that serves, shows, evaluates and exports an attached model with no more to be said.

    It holds the model's own weights (`weights.safetensors`, of transformers the folder `model`), `bundle.json` with
    preprocessing, class names and what the model is built by, and `thresholds.safetensors`. They replace an earlier
    bundle's when all are written, `thresholds.safetensors` last.

    >>> ltmp.pack(model, "deit-small-0.6")
    >>> model = ltmp.from_pretrained("deit-small-0.6")

    Args:
        model: attached, with thresholds or fixed rates.
        metadata: as in `ltmp.save`, such as `class_names`, `preprocessing`, or `model_kwargs` where the model was not
            built with its name alone.

    Returns:
        The folder.

    Raises:
        UsageError: nobody knows by which name the model is built, metadata that make no sense, or weights in the folder
            that would be taken for these.
        LTMPError: nothing is attached, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        about = Metadata.from_dict({**facts_of(model), **{k: v for k, v in metadata.items() if v is not None}})
    except ValueError as error:
        raise UsageError(f"cannot pack {folder}: {error}") from error
    whole = is_of_transformers(model)
    # the weights are here, and no longer where a name may say
    name = next((each for each in (about.model_name, about.architecture) if each and is_safe_name(each)), None)
    if whole:
        name = None
    elif name is None:
        raise UsageError("by which name is this model built? give model_name, as for --model")
    said = {key: value for key, value in replace(about, model_name=name).to_dict().items() if key in MODEL_FACTS}
    check_names(about.class_names, classes_of(model))
    other = folder / (WEIGHTS if whole else MODEL)
    if other.exists():
        raise UsageError(f"{other} is of another bundle, or of none: remove it, or pack into another folder")
    with staged(folder / THRESHOLDS) as thresholds:
        save_weights(model, folder / MODEL if whole else thresholds.with_name(WEIGHTS))
        text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        thresholds.with_name(BUNDLE).write_text(text, encoding="utf-8")
        save(model, thresholds, **{**metadata, "model_name": name})
    return folder
