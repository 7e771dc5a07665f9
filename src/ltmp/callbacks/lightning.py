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
    """Keeps the thresholds of an attached model as they are while Lightning trains it, and logs what it costs.

    `share` and `budget` are logged every `every` training steps, `val_share` at the end of each validation.

    >>> ltmp.load(module.model, "thresholds.safetensors")
    >>> Trainer(max_epochs=3, callbacks=[LightningReduction()]).fit(module, loader)

    Args:
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.
        every: steps between two lines of the log, as reading a GPU waits for it; None is the Trainer's own.
    """

    def __init__(self, budget: float | None = None, every: int | None = None) -> None:
        self.asked, self.every = budget, every
        self.reduction: Reduction | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.reduction is None:
            self.reduction = Reduction(pl_module, self.asked)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.every or trainer.log_every_n_steps
        if self.reduction is not None and (batch_idx + 1) % every == 0:
            pl_module.log_dict(self.reduction.means(training=True))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.reduction is not None:
            found = self.reduction.means(training=False)
            pl_module.log_dict({f"val_{name}": value for name, value in found.items()})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.reduction is not None:
            done, self.reduction = self.reduction, None
            done.close()
