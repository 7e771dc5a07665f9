"""Settings of a learning run: keyword arguments of `ltmp.learn` and `ltmp.learn_dial`, declared and checked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import nn

from ..distributed import rank
from ..errors import UsageError
from ..method.thresholds import Thresholds
from ..ranges import BATCH, CALIBRATION, FACTOR, KNOTS, SEED, SHARE, VIEWS, Range
from .answers import Loss
from .inputs import Images, pixels_of
from .log import Logger
from .optimiser import Step
from .paper import SMOOTHING
from .progress import Progress
from .resume import load_run, save_run, subject
from .weights import Tuning

RECIPES = ("ltmp", "paper")
"""See `ltmp.learn`."""

Function = TypeVar("Function", bound=Callable[..., Any])


class RunSettings(TypedDict, total=False):
    """Keyword arguments of every learning run."""

    views: int
    calibration: int
    every: int
    seed: int
    device: str | torch.device | None
    amp: torch.dtype | None
    loss: Loss | None
    checkpoint: str | Path | None
    progress: Progress | bool | None


class LearnSettings(RunSettings, total=False):
    """Keyword arguments of `ltmp.learn`."""

    recipe: str
    accumulate: int
    lr: float
    distill: bool
    budget_weight: float
    save_every: int
    on_step: Callable[[Step], None] | None
    log: Logger | None
    tuning: Tuning | None


class DialSettings(RunSettings, total=False):
    """Keyword arguments of `ltmp.learn_dial`."""

    knots: int
    checked: int


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Settings of every learning run, with defaults; checked when created."""

    views: int
    calibration: int = 512
    every: int = 1
    seed: int = 0
    device: str | torch.device | None = None
    amp: torch.dtype | None = None
    loss: Loss | None = None
    checkpoint: str | Path | None = None
    progress: Progress | bool | None = None

    def __post_init__(self) -> None:
        self._check(views=VIEWS, calibration=CALIBRATION, seed=SEED)

    def _check(self, **ranges: Range) -> None:
        for name, numbers in ranges.items():
            numbers.check(name, getattr(self, name))

    @property
    def spacing(self) -> dict[str, int]:
        """`every`, unless it is 1 (the default is not saved), for the settings that identify a run."""
        return {"every": self.every} if self.every != 1 else {}

    def device_for(self, thresholds: Thresholds) -> torch.device:
        """The device to learn on; by default that of the thresholds."""
        return torch.device(self.device) if self.device is not None else thresholds.merge.device

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast to `amp`, or no context."""
        return torch.autocast(device.type, self.amp) if self.amp is not None else nullcontext()

    def subject(self, model: nn.Module, loader: Any, images: Images) -> dict[str, Any]:
        """Fingerprints of the run's model and data, saved among its settings; see `resume.subject`."""
        if self.checkpoint is None:
            return {}
        loss = {} if self.loss is None else {"loss": getattr(self.loss, "__qualname__", type(self.loss).__name__)}
        return subject(model, loader, pixels_of(images), self.amp) | loss

    def save(self, settings: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the run's state to the checkpoint, if there is to be one; on rank 0 only."""
        if self.checkpoint is not None and rank() == 0:
            save_run(self.checkpoint, settings, state)

    def load(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The saved state of a run with these settings, or None if there is none; on rank 0 only."""
        return load_run(self.checkpoint, settings) if self.checkpoint is not None and rank() == 0 else None


@dataclass(frozen=True, kw_only=True)
class LearnOptions(LoopOptions):
    """Settings of `ltmp.learn`."""

    views: int = 16_000
    recipe: str = "ltmp"
    accumulate: int = 1
    lr: float = 1.0
    distill: bool = False
    budget_weight: float = 10.0
    save_every: int = 20
    on_step: Callable[[Step], None] | None = None
    log: Logger | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(accumulate=BATCH, lr=FACTOR, budget_weight=Range(min=0), save_every=Range(min=1))
        check_recipe(self.recipe)
        if self.paper and (self.distill or self.tuning is not None):
            raise UsageError("the paper's recipe learns thresholds alone, from labels: leave out distill and tuning")
        if self.paper and self.every != 1:
            raise UsageError("the paper's recipe removes tokens in every block: leave out every")
        if self.paper and not self.views:
            raise UsageError("the paper's recipe has no calibrated start: give it views, one epoch in the paper")

    @property
    def paper(self) -> bool:
        """Whether to learn by the paper's own training; see `learning.paper`."""
        return self.recipe == "paper"

    @property
    def smoothing(self) -> float:
        """Label smoothing."""
        return SMOOTHING if self.paper else 0.0

    @property
    def label_weight(self) -> float:
        """Weight of the cross-entropy with labels in the task loss."""
        return float(not self.distill) * (1.0 if self.tuning is None else self.tuning.labels)


@dataclass(frozen=True, kw_only=True)
class DialOptions(LoopOptions):
    """Settings of `ltmp.learn_dial`."""

    views: int = 9_000
    knots: int = 14
    checked: int = 2816

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(knots=KNOTS, checked=VIEWS)

    @staticmethod
    def check(low: float, high: float) -> None:
        """Refuse a range that no dial can have.

        Raises:
            UsageError: an end is not a share, or `low` is not below `high`.
        """
        SHARE.check("low", low)
        SHARE.check("high", high)
        if not low < high:
            raise UsageError(f"low is {low:g}, and high is {high:g}: a dial goes from a smaller share to a larger one")


def check_recipe(name: str) -> None:
    """Refuse an unknown recipe.

    Raises:
        UsageError: it is not one of `RECIPES`.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")


def with_keywords(options: type) -> Callable[[Function], Function]:
    """Decorate a function that takes `**settings`: its signature shows the fields of `options` instead."""
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=field.type,
        )
        for field in fields(options)
    ]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate
