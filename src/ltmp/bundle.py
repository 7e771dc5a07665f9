"""Everything for one deployment in one folder: weights, thresholds, preprocessing and class names."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import read, save
from .checkpoint.describe import MODEL_FACTS, classes_of, collect_metadata, record_build
from .checkpoint.metadata import Metadata
from .data.dataset import check_names
from .errors import UsageError
from .files import staged
from .locate import BUNDLE, locate
from .zoo.build import build_model, is_safe_name, model_name_in, save_weights
from .zoo.hugging_face import PREFIX, is_transformers_model

THRESHOLDS = "thresholds.safetensors"
WEIGHTS = "weights.safetensors"
MODEL = "model"
"""Folder of a transformers model, with its config and image processor."""

log = logging.getLogger("ltmp")


@dataclass(frozen=True)
class Bundle:
    """The metadata of a thresholds file's model, with the weights beside the file if it is part of a bundle.

    Attributes:
        source: what was opened, for messages.
        about: the metadata of the file.
        name: of the model, as `build_model` takes it; None if the metadata has none.
        weights: a checkpoint beside the file, or None.
    """

    source: str
    about: Metadata
    name: str | None = None
    weights: Path | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, budget: float | None = None, **hub: Any) -> Bundle:
        """Open the bundle at `source`: a thresholds file, its folder, or a repository; see `locate`.

        Raises:
            UsageError: the file names a model with a source of weights, or its dial does not reach the budget.
            LTMPError: as `read`.
        """
        file = locate(source, budget=budget, **hub)
        about = read(file, budget=budget).about
        folder = file.parent if (file.parent / BUNDLE).is_file() else None
        if folder is not None and (folder / MODEL).is_dir():
            return cls(os.fspath(source), about, f"{PREFIX}{folder / MODEL}")
        weights = folder / WEIGHTS if folder is not None and (folder / WEIGHTS).is_file() else None
        name = model_name_in(about, source)
        if weights is not None and name is not None and name.startswith("open_clip:"):
            # without the pretrained tag: the weights are in the bundle
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
        """Build the model with `build_model`, taking from the file what the caller leaves out.

        Arguments override the file, with a warning if they differ.

        Raises:
            UsageError: neither the file nor the caller names the model.
        """
        requested = name or self.name
        if requested is None:
            raise UsageError(f"{self.source} does not say which model it is for: give --model NAME")
        described = self._describes(requested)
        stored = self._stored_options(requested, pretrained) if described else {}
        options = {"num_classes": num_classes, "image_size": image_size}
        for option, value in options.items():
            default = stored.get(option)
            if value is None:
                options[option] = default
            elif default not in (None, value):
                log.warning(f"{option} {value} overrides {default} from {self.source}")
        packed_weights = self.weights if described and not pretrained else None
        if weights is not None and packed_weights is not None:
            log.warning(f"the weights in {os.fspath(weights)} override those in {packed_weights}")
        kwargs = {**(self.about.model_kwargs if described else {}), **(model_kwargs or {})}
        model = build_model(
            requested,
            weights=packed_weights if weights is None else weights,
            pretrained=pretrained,
            **options,
            model_kwargs=kwargs,
            classifier=classifier,
        )
        record_build(model, self.about, kwargs)
        return model

    def _describes(self, name: str) -> bool:
        """Whether `name` is the model that the file's metadata is about, whatever its pretrained tag."""
        own_names = (self.name, self.about.model_name, self.about.architecture)
        return name.partition(".")[0] in {own.partition(".")[0] for own in own_names if own is not None}

    def _stored_options(self, name: str, pretrained: bool) -> dict[str, int | None]:
        """Number of classes and image size from the file, as far as a model of this name accepts them."""
        if name.startswith(PREFIX):
            # transformers models come with their own
            return {}
        size = self.about.input_size or ()
        # pretrained weights come with their own head, and open_clip's towers have none
        has_head = not pretrained and not name.startswith("open_clip:")
        return {
            "num_classes": self.about.num_classes if has_head else None,
            "image_size": size[0] if len(set(size)) == 1 else None,
        }


def pack(model: nn.Module, folder: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write a folder that is all `ltmp serve`, `show`, `eval`, `export` and others need to run an attached model.

    It holds the model's own weights (`weights.safetensors`, or the folder `model` for transformers), `bundle.json` with
    the model's name and arguments, preprocessing and class names, and `thresholds.safetensors`. They replace those of
    an earlier bundle once all are written, `thresholds.safetensors` last.

    >>> ltmp.pack(model, "deit-small-0.6")
    >>> model = ltmp.from_pretrained("deit-small-0.6")

    Args:
        model: attached, with thresholds or fixed rates.
        metadata: as in `ltmp.save`, such as `class_names`, `preprocessing`, or `model_kwargs` if building the model
            takes more than its name.

    Returns:
        The folder.

    Raises:
        UsageError: the model's name is unknown, the metadata is invalid, or the folder already holds weights of another
            kind, which would be mistaken for these.
        LTMPError: nothing is attached, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        about = Metadata.from_dict({**collect_metadata(model), **{k: v for k, v in metadata.items() if v is not None}})
    except ValueError as error:
        raise UsageError(f"cannot pack {folder}: {error}") from error
    from_transformers = is_transformers_model(model)
    # a transformers model is loaded from the folder, and no longer from where its name says
    name = None if from_transformers else _buildable_name(about)
    facts = {key: value for key, value in replace(about, model_name=name).to_dict().items() if key in MODEL_FACTS}
    check_names(about.class_names, classes_of(model))
    other = folder / (WEIGHTS if from_transformers else MODEL)
    if other.exists():
        raise UsageError(f"{other} is of another bundle, or of none: remove it, or pack into another folder")
    with staged(folder / THRESHOLDS) as thresholds:
        save_weights(model, folder / MODEL if from_transformers else thresholds.with_name(WEIGHTS))
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        thresholds.with_name(BUNDLE).write_text(text, encoding="utf-8")
        save(model, thresholds, **{**metadata, "model_name": name})
    return folder


def _buildable_name(about: Metadata) -> str:
    """The name to build the model by: the first that chooses no other source of weights.

    Raises:
        UsageError: there is none.
    """
    for name in (about.model_name, about.architecture):
        if name and is_safe_name(name):
            return name
    raise UsageError("by which name is this model built? give model_name, as for --model")
