"""The weights that light tuning trains: a few of the model's own, with an optimiser for them."""

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
        lr: of AdamW, at its highest; None is 1e-3 for `norms` and 3e-4 for `lora`.
        weight_decay: of AdamW.
        labels: part of the task loss that comes from labels, in [0, 1]; the rest is the divergence from the answers of
            the model as it was.
        rank: of the low-rank updates.
        joint_every: update thresholds every `joint_every` steps; the others train the weights only, on the packed
            (deployed) form, which costs less than half.

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
    """The weights that train along, as the optimiser sees them.

    Args:
        model: attached, and frozen; low-rank updates become part of it until `fold` or `undo`.
        dense: a copy of it as it was.
        steps: how many updates there will be.

    Raises:
        LTMPError: there is nothing to tune, or it is in half precision.
        MissingExtraError: peft is not installed.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, tuning: Tuning, steps: int) -> None:
        self.model = model
        self.dense = dense
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
        """One step of the optimiser from the gradients that the weights hold.

        Raises:
            LTMPError: they are not finite.
        """
        if not nn.utils.clip_grad_norm_(self.trained.values(), CLIP).isfinite():
            raise LTMPError("the gradients are not finite: tune with a lower lr, or without amp")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def fold(self) -> None:
        """Make what was learned part of the model's own weights, whose names and shapes are again what they were."""
        self._take_off(merge=True)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the model its weights back, bit for bit."""
        self._take_off(merge=False)
        for own, before in zip(_own(self.model), _own(self.dense), strict=True):
            own.copy_(before)

    def _take_off(self, merge: bool) -> None:
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
        """Go on where a saved run was.

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
def tuned(model: nn.Module, dense: nn.Module, tuning: Tuning | None, steps: int) -> Iterator[Weights | None]:
    """`Weights` to train inside, where there is `tuning`; undone where the run inside fails or is stopped."""
    weights = None if tuning is None else Weights(model, dense, tuning, steps)
    try:
        yield weights
    except BaseException:
        if weights is not None:
            weights.undo()
        raise


@contextmanager
def cut(thresholds: Thresholds) -> Iterator[None]:
    """Run as deployed inside, with gradients for the weights and none for the thresholds."""
    thresholds.requires_grad_(False)
    try:
        yield
    finally:
        thresholds.requires_grad_(True)


def _own(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters without its thresholds."""
    thresholds = set(thresholds_of(model).parameters())
    return [parameter for parameter in model.parameters() if parameter not in thresholds]


def _vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Norms, biases and layer scales."""
    own = set(_own(model))
    return _full(model, {name: p for name, p in model.named_parameters() if p in own and p.ndim == 1})


def _updates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The modules that peft added."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def _full(model: nn.Module, found: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """`found`, if there is something and a small step can move it."""
    if not found:
        raise LTMPError(f"this {type(model).__name__} has nothing of the kind that is to be tuned: choose other parts")
    half = next((name for name, parameter in found.items() if parameter.dtype != torch.float32), None)
    if half is not None:
        raise LTMPError(
            f"{half!r} is {found[half].dtype}, too coarse for small steps: call model.float(), and give amp for speed"
        )
    return found


def _adapt(model: nn.Module, rank: int) -> Any:
    """Low-rank updates, nothing yet, beside every plain linear layer of the blocks."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise MissingExtraError("peft", "tune", "tuning by LoRA") from error
    inside = {layer for block in attachment(model).body.blocks for layer in block.modules() if type(layer) is nn.Linear}
    layers = {name: layer.weight for name, layer in model.named_modules() if layer in inside}
    _full(model, layers)
    return LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers)), "ltmp")
