"""The weights that light tuning trains, and their optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import LTMPError, MissingExtraError, UsageError
from ..hosts.attach import attachment, thresholds_of
from ..method.thresholds import Thresholds
from ..ranges import PART, RANK, RATE, Range

PARTS = ("norms", "lora")
RATES = {"norms": 1e-3, "lora": 3e-4}
CLIP = 1.0


@dataclass(frozen=True)
class Tuning:
    """Which weights train along with the thresholds, and how.

    Args:
        parts: `norms` (every vector: norms, biases, layer scales) or `lora` (low-rank updates of the blocks' linear
            layers, Hu et al., ICLR 2022, by peft; folded into the layers at the end).
        lr: peak learning rate of AdamW; None is 1e-3 for `norms` and 3e-4 for `lora`.
        weight_decay: of AdamW.
        labels: weight of labels in the task loss, in [0, 1]; the rest is the divergence from the original model's
            answers.
        rank: of the low-rank updates.
        joint_every: train the thresholds in every `joint_every`th step; the other steps train the weights alone, on the
            packed (deployed) form, which costs less than half.

    Raises:
        UsageError: a value that makes no sense.
    """

    parts: str = "norms"
    lr: float | None = None
    weight_decay: float = 0.0
    labels: float = 0.0
    rank: int = 8
    joint_every: int = 4

    def __post_init__(self) -> None:
        if self.parts not in PARTS:
            raise UsageError(f"tuning knows no parts {self.parts!r}: choose one of {', '.join(PARTS)}")
        PART.check("labels", self.labels)
        if self.lr is not None:
            RATE.check("the tuning's lr", self.lr)
        Range(min=0).check("weight_decay", self.weight_decay)
        RANK.check("rank", self.rank)
        Range(min=1).check("joint_every", self.joint_every)


class Weights:
    """The weights that train along with the thresholds, and their optimiser.

    Args:
        model: attached, and frozen; low-rank updates become part of it until `fold` or `undo`.
        original: an untouched copy of the model.
        steps: number of updates that will be taken.

    Raises:
        LTMPError: there is nothing to tune, or it is in half precision.
        MissingExtraError: peft is not installed.
    """

    def __init__(self, model: nn.Module, original: nn.Module, tuning: Tuning, steps: int) -> None:
        self.model = model
        self.original = original
        self._adapted: Any = _adapt(model, tuning.rank) if tuning.parts == "lora" else None
        self.trained = _updates(model) if tuning.parts == "lora" else _vectors(model)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        rate = tuning.lr or RATES[tuning.parts]
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=rate, betas=(0.9, 0.99), weight_decay=tuning.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def update(self) -> None:
        """Take one step with the gradients that the weights hold.

        Raises:
            LTMPError: they are not finite.
        """
        if not nn.utils.clip_grad_norm_(self.trained.values(), CLIP).isfinite():
            raise LTMPError("the gradients are not finite: tune with a lower lr, or without amp")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def fold(self) -> None:
        """Fold low-rank updates into the model's own weights, restoring their names and shapes."""
        self._remove_updates(merge=True)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the model's original weights, bit for bit."""
        self._remove_updates(merge=False)
        for weight, before in zip(_weights_of(self.model), _weights_of(self.original), strict=True):
            weight.copy_(before)

    def _remove_updates(self, merge: bool) -> None:
        for parameter in self.trained.values():
            parameter.grad = None
        if self._adapted is not None:
            self._adapted.merge_and_unload() if merge else self._adapted.unload()
            self._adapted = None

    def state(self) -> dict[str, Any]:
        return {
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        for name, parameter in self.trained.items():
            if saved["weights"][name].shape != parameter.shape:
                raise ValueError(f"weights {name}")
            parameter.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])


@contextmanager
def tuned(model: nn.Module, original: nn.Module, tuning: Tuning | None, steps: int) -> Iterator[Weights | None]:
    """`Weights` to train inside, if there is `tuning`; undone if the run inside fails or is stopped."""
    weights = None if tuning is None else Weights(model, original, tuning, steps)
    try:
        yield weights
    except BaseException:
        if weights is not None:
            weights.undo()
        raise


@contextmanager
def weights_only(thresholds: Thresholds) -> Iterator[None]:
    """Remove tokens as deployed inside, with gradients for the weights and none for the thresholds."""
    thresholds.requires_grad_(False)
    try:
        yield
    finally:
        thresholds.requires_grad_(True)


def _weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters without its thresholds."""
    thresholds = set(thresholds_of(model).parameters())
    return [parameter for parameter in model.parameters() if parameter not in thresholds]


def _vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Norms, biases and layer scales."""
    weights = set(_weights_of(model))
    return _checked(model, {name: p for name, p in model.named_parameters() if p in weights and p.ndim == 1})


def _updates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The low-rank updates that peft added."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def _checked(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return `parameters`, if there are any and they are precise enough for small steps.

    Raises:
        LTMPError: there are none, or one is not float32.
    """
    if not parameters:
        raise LTMPError(f"this {type(model).__name__} has nothing of the kind that is to be tuned: choose other parts")
    half = next((name for name, parameter in parameters.items() if parameter.dtype != torch.float32), None)
    if half is not None:
        raise LTMPError(
            f"{half!r} is {parameters[half].dtype}, too coarse for small steps: call model.float(), and give amp for "
            "speed"
        )
    return parameters


def _adapt(model: nn.Module, rank: int) -> Any:
    """Add low-rank updates, initially zero, to every plain linear layer of the blocks."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise MissingExtraError("peft", "tune", "tuning by LoRA") from error
    inside = {layer for block in attachment(model).body.blocks for layer in block.modules() if type(layer) is nn.Linear}
    layers = {name: layer.weight for name, layer in model.named_modules() if layer in inside}
    _checked(model, layers)
    return LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers)), "ltmp")
