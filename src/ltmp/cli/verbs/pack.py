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
    """A model at a budget."""

    budget: Budget = None


@dataclass(frozen=True, kw_only=True)
class PackedData(PreprocessingOptions):
    """Preprocessing and class names."""

    class_map: ClassMap = None


@verb
def pack_verb(
    out: Annotated[Path, typer.Argument(help="Folder to write.")], model: PackedModel, data: PackedData
) -> None:
    """Write weights, thresholds, preprocessing and class names to one folder, which --thresholds takes everywhere.

    Example: ltmp pack deit-0.6 --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: ltmp serve --thresholds deit-0.6
    """
    from ... import load, pack
    from ...data import class_names
    from ...data.transforms import eval_settings
    from ..screen import print_result, suggest

    check_writable(out)
    name = model.name(model.budget)
    network = model.build(name, budget=model.budget)
    load(network, model.thresholds, budget=model.budget)
    names = class_names(network, file=data.class_map, pretrained=model.pretrained)
    settings = eval_settings(network, data.transform)
    pack(network, out, model_name=name, class_names=names, preprocessing=settings)
    print_result(f"{name} with its thresholds written to {out}")
    suggest("ltmp", "serve", "--thresholds", out)
