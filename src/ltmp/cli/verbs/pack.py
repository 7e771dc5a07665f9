"""`ltmp pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...files import check_writable
from ..options import Budget, ClassMap, PreprocessingOptions, ReducedModel, verb


@dataclass(frozen=True, kw_only=True)
class PackedModel(ReducedModel):
    """The model at a budget."""

    budget: Budget = None


@dataclass(frozen=True, kw_only=True)
class Reading(PreprocessingOptions):
    """How images and answers are read."""

    class_map: ClassMap = None


@verb
def pack_verb(
    out: Annotated[Path, typer.Argument(help="The folder to write.")], model: PackedModel, reading: Reading
) -> None:
    """Write one folder with weights, thresholds, preprocessing and class names; every verb opens it with one argument.

    Example: ltmp pack deit-0.6 --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: ltmp serve --thresholds deit-0.6
    """
    from ... import load, pack
    from ...data import class_names
    from ...data.transforms import eval_settings
    from ..screen import say, suggest

    check_writable(out)
    name = model.name(model.budget)
    network = model.build(name, budget=model.budget)
    load(network, model.thresholds, budget=model.budget)
    names = class_names(network, file=reading.class_map, pretrained=model.pretrained)
    settings = eval_settings(network, reading.transform)
    pack(network, out, model_name=name, class_names=names, preprocessing=settings)
    say(f"{out} holds all that it takes")
    suggest("ltmp", "serve", "--thresholds", out)
