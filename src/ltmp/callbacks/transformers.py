"""A callback for the Trainer of Hugging Face."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError
from .reduction import Reduction

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "callbacks", "The Trainer callback") from error


class TrainerReduction(TrainerCallback):
    """Keeps the thresholds of an attached model as they are while a Trainer trains it, and logs what it costs.

    `share` and `budget` join what the Trainer logs, `eval_share` what it evaluates.

    >>> ltmp.load(model, "thresholds.safetensors")
    >>> Trainer(model, arguments, train_dataset=images, callbacks=[TrainerReduction()]).train()

    Reporters that the Trainer calls first, such as TensorBoard, do not see them; `state.log_history` does.

    Args:
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.
    """

    def __init__(self, budget: float | None = None) -> None:
        self.asked = budget
        self.reduction: Reduction | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.reduction = Reduction(model, self.asked)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.reduction is None or not logs:
            return
        evaluated = any(name.startswith("eval_") for name in logs)
        if not (evaluated or "loss" in logs):
            # the summary at the end
            return
        found = self.reduction.means(training=not evaluated)
        if evaluated:
            found = {f"eval_{name}": value for name, value in found.items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.reduction is not None:
            done, self.reduction = self.reduction, None
            done.close()
