"""A callback for Lightning."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .reduction import Reduction

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingExtraError("lightning", "callbacks", "The Lightning callback") from error


class LightningReduction(Callback):
    """Keep the thresholds of an attached model fixed while Lightning trains it, and log what the model costs.

    `share` and `budget` are logged every `every` training steps, `val_share` and `val_budget` after each validation.

    >>> ltmp.load(module.model, "thresholds.safetensors")
    >>> Trainer(max_epochs=3, callbacks=[LightningReduction()]).fit(module, loader)

    Args:
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.
        every: steps between log entries, since reading values from a GPU synchronises; None is the Trainer's setting.
    """

    def __init__(self, budget: float | None = None, every: int | None = None) -> None:
        self.requested_budget, self.every = budget, every
        self.reduction: Reduction | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.reduction is None:
            self.reduction = Reduction(pl_module, self.requested_budget)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.every or trainer.log_every_n_steps
        if self.reduction is not None and (batch_idx + 1) % every == 0:
            pl_module.log_dict(self.reduction.means(training=True))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.reduction is not None:
            means = self.reduction.means(training=False)
            pl_module.log_dict({f"val_{name}": value for name, value in means.items()})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.reduction is not None:
            reduction, self.reduction = self.reduction, None
            reduction.close()
