"""From options to a model, its data and a device."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed, load
from ..data import Loader, check_classes, eval_transform, input_channels, make_loader, open_dataset
from ..errors import UsageError
from ..zoo.build import brings_weights, build_model


@dataclass(frozen=True)
class ModelOptions:
    """Which model, with which weights."""

    name: str
    weights: Path | None
    pretrained: bool
    num_classes: int | None
    image_size: int | None
    kwargs: Sequence[str]

    @property
    def has_weights(self) -> bool:
        """Whether the model gets weights of its own, or else random ones."""
        return self.weights is not None or self.pretrained or brings_weights(self.name)

    def build(self, *, random: bool = False) -> nn.Module:
        """The model, with weights unless `random` ones will do: thresholds of a random model would mean nothing."""
        if not (self.has_weights or random):
            raise UsageError("which weights? give --weights FILE, or --pretrained for timm's own")
        return build_model(
            self.name,
            weights=self.weights,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            image_size=self.image_size,
            model_kwargs=parse_kwargs(self.kwargs),
        )


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read."""

    root: Path | None = None
    class_map: Path | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    strict: bool = False
    batch_size: int = 64
    workers: int = 0

    def open(
        self,
        source: str,
        model: nn.Module,
        *,
        split: str,
        labelled: bool = True,
        shuffle: bool = False,
        seed: int = 0,
    ) -> Loader:
        """Batches of `source` as `model` takes them, after checking that its classes fit the head."""
        transform = eval_transform(model, **self.transform)
        dataset = open_dataset(
            source,
            split=split,
            transform=transform,
            mode="L" if input_channels(model) == 1 else "RGB",
            labelled=labelled,
            class_map=self.class_map,
            root=self.root,
        )
        check_classes(dataset, int(getattr(model, "num_classes", 0)), self.class_map)
        return make_loader(
            dataset, self.batch_size, shuffle=shuffle, seed=seed, workers=self.workers, strict=self.strict
        )

    @property
    def transform(self) -> dict[str, Any]:
        """The options of `eval_transform`."""
        return {
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


def build_reduced(
    options: ModelOptions, thresholds: Path | None, engine: str | None, budget: float | None = None
) -> nn.Module:
    """The model with its thresholds attached, or as it is without any; a function, so that it can be pickled."""
    model = options.build()
    if thresholds is not None:
        load(model, thresholds, engine=engine, budget=budget)
    return model


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


def pick_device(name: str) -> torch.device:
    """The named device; auto is the first CUDA device, or else the CPU. Under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.started():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}: expected cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"no device {name!r} here: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu"
        )
    return device


def autocast_type(amp: bool) -> torch.dtype | None:
    """The type that --amp computes in."""
    return torch.bfloat16 if amp else None
