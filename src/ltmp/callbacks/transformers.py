"""A callback for the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .reduction import Reduction

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "callbacks", "The Trainer callback") from error


class TrainerReduction(TrainerCallback):
    """Keep the thresholds of an attached model fixed while a Trainer trains it, and log what the model costs.

    `share` and `budget` are added to the training logs, `eval_share` and `eval_budget` to those of evaluations.

    >>> ltmp.load(model, "thresholds.safetensors")
    >>> Trainer(model, arguments, train_dataset=images, callbacks=[TrainerReduction()]).train()

    Reporters that the Trainer calls before this callback, such as TensorBoard, do not get them; `state.log_history`
    has them.

    Args:
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.
    """

    def __init__(self, budget: float | None = None) -> None:
        self.requested_budget = budget
        self.reduction: Reduction | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.reduction = Reduction(model, self.requested_budget)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.reduction is None or not logs:
            return
        evaluated = any(name.startswith("eval_") for name in logs)
        if not (evaluated or "loss" in logs):
            # the summary after training
            return
        means = self.reduction.means(training=not evaluated)
        if evaluated:
            means = {f"eval_{name}": value for name, value in means.items()}
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.reduction is not None:
            reduction, self.reduction = self.reduction, None
            reduction.close()
