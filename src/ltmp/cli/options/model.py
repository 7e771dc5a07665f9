"""Which model: its name, its weights, and thresholds for it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from .groups import MODEL

if TYPE_CHECKING:
    from torch import nn

Name = Annotated[
    str,
    typer.Option(
        help="timm model name, e.g. deit_small_patch16_224, or hf:NAME_OR_FOLDER of a Hugging Face classifier, "
        "torchvision:NAME, or open_clip:NAME/WEIGHTS.",
        rich_help_panel=MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights, and what else is known of the model."""

    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the model (.safetensors, .pth, .pth.tar).", rich_help_panel=MODEL),
    ] = None
    pretrained: Annotated[bool, typer.Option(help="Take timm's pretrained weights instead.", rich_help_panel=MODEL)] = (
        False
    )
    num_classes: Annotated[int | None, typer.Option(help="Outputs of the model's head.", rich_help_panel=MODEL)] = None
    img_size: Annotated[
        int | None, typer.Option("--img-size", help="Pixels a side; default: the model's own.", rich_help_panel=MODEL)
    ] = None
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="More arguments of the model; may be repeated.", rich_help_panel=MODEL),
    ] = None

    def has_weights(self, name: str) -> bool:
        """Whether the model gets weights of its own, or else random ones."""
        from ...zoo.build import brings_weights

        return self.weights is not None or self.pretrained or brings_weights(name)

    def build(self, name: str, *, random: bool = False) -> nn.Module:
        """The model, with weights unless `random` ones will do: thresholds of a random model would mean nothing."""
        from ...zoo.build import build_model

        if not (random or self.has_weights(name)):
            raise UsageError("which weights? give --weights FILE, or --pretrained for timm's own")
        return build_model(
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

    model: Annotated[
        str | None,
        typer.Option(help="timm model name; default: the one in the thresholds file.", rich_help_panel=MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReducedModel(SavedModel):
    """A model and its thresholds."""

    thresholds: Annotated[Path, typer.Option(help="The file that `ltmp learn` wrote, its folder, or USER/REPO.")]

    def name(self, budget: float | None = None) -> str:
        """The model's name; refuses a budget that the thresholds cannot be set to."""
        return self.model or name_in(self.thresholds, budget)


def name_in(thresholds: Path, budget: float | None = None) -> str:
    """The model that a thresholds file says it is for; refuses a budget that it cannot be set to."""
    from ...checkpoint import read

    about = read(thresholds, budget=budget).metadata
    # the full name also says which weights; a file that Python saved knows the architecture only
    name = about.get("model_name") or about.get("architecture")
    if name is None:
        raise UsageError(f"{thresholds} does not say which model it is for: give --model NAME")
    return str(name)


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
