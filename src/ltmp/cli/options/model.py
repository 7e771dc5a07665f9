"""Which model: its name, its weights, and thresholds for it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from .groups import MODEL, option

if TYPE_CHECKING:
    from torch import nn

    from ...bundle import Bundle

Name = Annotated[
    str,
    option(
        "timm model name, e.g. deit_small_patch16_224, or hf:NAME_OR_FOLDER of a Hugging Face classifier, "
        "torchvision:NAME, or open_clip:NAME/WEIGHTS.",
        MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights, and what else is known of the model."""

    weights: Annotated[Path | None, option("Checkpoint of the model (.safetensors, .pth, .pth.tar).", MODEL)] = None
    pretrained: Annotated[bool, option("Take timm's pretrained weights instead.", MODEL)] = False
    num_classes: Annotated[int | None, option("Classes of the model's head.", MODEL)] = None
    img_size: Annotated[int | None, option("Image size in pixels; default: the model's own.", MODEL, "--img-size")] = (
        None
    )
    model_kwargs: Annotated[
        list[str] | None, option("More arguments of the model; may be repeated.", MODEL, metavar="NAME=VALUE")
    ] = None

    @property
    def source(self) -> Path | None:
        """The thresholds, or the first of several: a file says more of its model. None where there are none."""
        found = getattr(self, "thresholds", None)
        first = (found[0] if found else None) if isinstance(found, list) else found
        return None if first is None else Path(first)

    def opened(self, budget: float | None = None) -> Bundle:
        """The metadata of the thresholds file's model, and the weights beside it."""
        from ...about import About
        from ...bundle import Bundle

        return Bundle("", About()) if self.source is None else Bundle.open(self.source, budget=budget)

    def has_weights(self, name: str, bundle: Bundle) -> bool:
        """Whether the model gets weights of its own, or else random ones."""
        from ...zoo.build import brings_weights

        given = self.weights is not None or self.pretrained or brings_weights(name)
        return given or bundle.weights is not None

    def build(self, name: str, *, budget: float | None = None, random: bool = False) -> nn.Module:
        """The model, with weights unless `random` ones will do: thresholds of a random model would mean nothing.

        Args:
            budget: which of several thresholds files in a folder to ask about it.
        """
        bundle = self.opened(budget)
        if not (random or self.has_weights(name, bundle)):
            raise UsageError("which weights? give --weights FILE, or --pretrained for timm's own")
        return bundle.build(
            name,
            weights=self.weights,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            image_size=self.img_size,
            model_kwargs=parse_kwargs(self.model_kwargs or ()),
        )


@dataclass(frozen=True, kw_only=True)
class NamedModel(ModelOptions):
    """A model by its name."""

    model: Name


@dataclass(frozen=True, kw_only=True)
class SavedModel(ModelOptions):
    """A model that a thresholds file knows the name of."""

    model: Annotated[str | None, option("timm model name; default: the one in the thresholds file.", MODEL)] = None


@dataclass(frozen=True, kw_only=True)
class ReducedModel(SavedModel):
    """A model and its thresholds."""

    thresholds: Annotated[Path, option("What `ltmp pack` or `ltmp learn` wrote: the folder, the file, or USER/REPO.")]

    def name(self, budget: float | None = None) -> str:
        """The model's name; refuses a budget that the thresholds cannot be set to."""
        return self.model or name_in(self.thresholds, budget)


def name_in(thresholds: Path, budget: float | None = None) -> str:
    """The model that a thresholds file says it is for; refuses a budget that it cannot be set to."""
    from ...bundle import Bundle

    name = Bundle.open(thresholds, budget=budget).name
    if name is None:
        raise UsageError(f"{thresholds} does not say which model it is for: give --model NAME")
    return name


def parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["img_size=224 qk_norm=True"]` as a dict; values are Python literals, or else strings."""
    found = {}
    for pair in " ".join(pairs).split():
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals and text):
            raise UsageError(f"--model-kwargs {pair!r}: expected NAME=VALUE, e.g. img_size=224")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
