"""Shared by the callbacks: freeze the thresholds, and average the FLOPs share of the calls since the last log."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Record, record, recording
from ..errors import LTMPError
from ..hosts.attach import attachment
from ..method.facts import policy_facts
from ..method.thresholds import Thresholds


class Reduction:
    """Freeze the thresholds of an attached model while it is trained, and meter its cost.

    Thresholds are frozen until `close`. The FLOPs shares of all images are summed, separately for calls with gradients
    (training, whatever mode the model is in) and without. Nothing synchronises with a device until `means` is called.

    Args:
        model: attached, or a module that holds such a model.
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.

    Raises:
        LTMPError: nothing is attached, or the thresholds cannot be set to `budget`.
    """

    def __init__(self, model: nn.Module, budget: float | None = None) -> None:
        attached = attachment(model)
        self.policy = attached.policy
        if budget is not None:
            attached.thresholds.set_budget(budget)
        self._trained = {parameter: parameter.requires_grad for parameter in self.policy.parameters()}
        self._trains = self.policy.trains
        self._values = [parameter.detach().clone() for parameter in self._trained]
        self.policy.requires_grad_(False)
        self._sums: dict[bool, Tensor] = {}
        self._counts: dict[bool, int] = {}
        self._open: list[tuple[AbstractContextManager[Record], Record]] = []
        self._hooks = [
            attached.host.register_forward_pre_hook(self._enter),
            attached.host.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def budget(self) -> float | None:
        """The budget of the dial, or else the share that the thresholds were learned for."""
        budget = self.policy.budget if isinstance(self.policy, Thresholds) else None
        return budget if budget is not None else policy_facts(self.policy).get("target")

    def means(self, *, training: bool) -> dict[str, float]:
        """`share`, the mean over all images since the last call, and `budget`; unknown ones are left out."""
        count = self._counts.pop(training, 0)
        values = {"share": self._sums.pop(training).item() / count if count else None, "budget": self.budget}
        return {name: value for name, value in values.items() if value is not None}

    def close(self) -> None:
        """Remove the hooks and unfreeze the thresholds.

        Raises:
            LTMPError: the values of the thresholds changed in the meantime.
        """
        for hook in self._hooks:
            hook.remove()
        unchanged = all(
            torch.equal(parameter.detach().cpu(), value.cpu())
            for parameter, value in zip(self._trained, self._values, strict=True)
        )
        self.policy.trains = self._trains
        for parameter, before in self._trained.items():
            parameter.requires_grad_(before)
        if not unchanged:
            raise LTMPError(
                "the thresholds changed while the model was trained: leave set_budget and the optimiser off them, or "
                "learn them with ltmp.learn"
            )

    def _enter(self, *_: Any) -> None:
        context = record()
        self._open.append((context, context.__enter__()))

    def _leave(self, host: nn.Module, *_: Any) -> None:
        context, calls = self._open.pop()
        context.__exit__(None, None, None)
        # pass the calls on to a record of the user's own
        outer = recording()
        if outer is not None:
            for kept, geometry in zip(calls.kept, calls.geometry, strict=True):
                outer.add(kept, geometry)
            outer.texts.extend(calls.texts)
        if calls.kept:
            share = calls.share().detach()
            training = torch.is_grad_enabled()
            self._sums[training] = self._sums.get(training, 0) + share.sum()
            self._counts[training] = self._counts.get(training, 0) + len(share)
