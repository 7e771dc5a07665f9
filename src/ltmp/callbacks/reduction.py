"""The common part of the callbacks: thresholds that stay as they are, and the share of the calls meanwhile."""

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
    """An attached model while somebody trains it.

    Thresholds are frozen until `close`, and the FLOPs share of each image is added up, apart in calls with gradients
    (training, whatever mode the model is in) and without. Nothing waits for a device until a mean is asked for.

    Args:
        model: attached, or a module that holds such a model.
        budget: a FLOPs share to set the dial to; None leaves the thresholds as they are.

    Raises:
        LTMPError: nothing is attached, or the thresholds cannot be set to `budget`.
    """

    def __init__(self, model: nn.Module, budget: float | None = None) -> None:
        made = attachment(model)
        self.policy = made.policy
        if budget is not None:
            made.thresholds.set_budget(budget)
        self._trained = {parameter: parameter.requires_grad for parameter in self.policy.parameters()}
        self._trains = self.policy.trains
        self._values = [parameter.detach().clone() for parameter in self._trained]
        self.policy.requires_grad_(False)
        self._sums: dict[bool, Tensor] = {}
        self._counts: dict[bool, int] = {}
        self._inside: list[tuple[AbstractContextManager[Record], Record]] = []
        self._hooks = [
            made.host.register_forward_pre_hook(self._enter),
            made.host.register_forward_hook(self._leave, always_call=True),
        ]

    @property
    def budget(self) -> float | None:
        """The budget of the dial, or else the share that the thresholds were learned for."""
        own = self.policy.budget if isinstance(self.policy, Thresholds) else None
        return own if own is not None else policy_facts(self.policy).get("target")

    def means(self, *, training: bool) -> dict[str, float]:
        """`share`, a mean over the images since the last question, and `budget`; without what is not known."""
        count = self._counts.pop(training, 0)
        found = {"share": self._sums.pop(training).item() / count if count else None, "budget": self.budget}
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """Leave the model as it was.

        Raises:
            LTMPError: something else than `requires_grad` of the thresholds has changed meanwhile.
        """
        for hook in self._hooks:
            hook.remove()
        same = all(torch.equal(p.detach().cpu(), v.cpu()) for p, v in zip(self._trained, self._values, strict=True))
        self.policy.trains = self._trains
        for parameter, before in self._trained.items():
            parameter.requires_grad_(before)
        if not same:
            raise LTMPError(
                "the thresholds changed while the model was trained: leave set_budget and the optimiser off them, or "
                "learn them with ltmp.learn"
            )

    def _enter(self, *_: Any) -> None:
        calls = record()
        self._inside.append((calls, calls.__enter__()))

    def _leave(self, host: nn.Module, *_: Any) -> None:
        calls, found = self._inside.pop()
        calls.__exit__(None, None, None)
        outer = recording()
        for kept, geometry in zip(found.kept, found.geometry, strict=True):
            if outer is not None:
                outer.add(kept, geometry)
        if found.kept:
            share = found.share().detach()
            mode = torch.is_grad_enabled()
            self._sums[mode] = self._sums.get(mode, 0) + share.sum()
            self._counts[mode] = self._counts.get(mode, 0) + len(share)
