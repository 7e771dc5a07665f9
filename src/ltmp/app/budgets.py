"""Thresholds for every budget of a slider: from a dial or learned where there are files, mixed, or calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calls import record
from ..checkpoint import load, read
from ..errors import LTMPError, UsageError
from ..hosts.attach import attach, is_attached, thresholds_of
from ..learning.calibrate import calibrate

LOWEST = 0.4
"""The smallest share that thresholds are calibrated for."""

Pair = tuple[Tensor, Tensor]
"""Merge and prune thresholds, [L] both."""


class Budgets:
    """Sets an attached model's thresholds for a FLOPs share.

    Args:
        model: attached, in evaluation mode.
        learned: share to thresholds; a model with a dial needs none, and its dial alone is asked.
        samples: [B, C, H, W] images, as the model takes them. They place mixtures between learned budgets, and without
            learned ones thresholds are calibrated on them; images that people upload change nothing.
        start: a share to begin with; None for one in the middle.

    Raises:
        UsageError: `start` is not among the shares that can be asked for.
        LTMPError: neither thresholds nor samples.
    """

    def __init__(
        self, model: nn.Module, learned: dict[float, Pair], samples: Tensor | None = None, start: float | None = None
    ) -> None:
        own = thresholds_of(model)
        self.dial = own.dial
        if not learned and samples is None and self.dial is None:
            raise LTMPError("which thresholds? give files that `ltmp learn` wrote, or images to calibrate on")
        self.model, self.samples = model, samples
        off = (torch.ones(own.depth), torch.zeros(own.depth))
        self.learned = dict(sorted(learned.items(), reverse=True))
        self._known: dict[float, Pair] = {1.0: off, **self.learned}
        if start is not None and not self.lowest <= start <= 1:
            raise UsageError(f"budget {start:g}: these thresholds go from {self.lowest:g} to 1")
        self.start = self._middle() if start is None else start

    @classmethod
    def from_files(
        cls,
        model: nn.Module,
        files: Sequence[str | Path],
        samples: Tensor | None = None,
        start: float | None = None,
    ) -> Budgets:
        """Attach, and take the budgets from files that `ltmp learn` wrote: one with a dial, or several of one variant.

        Raises:
            UsageError: fixed rates, a dial beside other files, or one that does not reach `start`.
            LTMPError: a file is not for this model, or does not say its share.
        """
        learned = {}
        for path in files:
            file = read(path)
            about = file.metadata
            if file.config.method.fixed:
                raise UsageError(
                    f"{path} holds fixed rates ({file.config.variant}), which no slider turns: give thresholds that "
                    "`ltmp learn` or `ltmp dial` wrote"
                )
            if file.dial is not None:
                if len(files) > 1:
                    raise UsageError(f"{path} has a dial for every budget: give it alone, or files of one budget each")
                load(model, path)
                break
            share = about.get("share") or about.get("target")
            if share is None:
                raise LTMPError(f"{path} does not say which share it was learned for: learn it again with `ltmp learn`")
            load(model, path)
            own = thresholds_of(model)
            learned[round(float(share), 3)] = (own.merge.detach().cpu().clone(), own.prune.detach().cpu().clone())
        if not is_attached(model):
            attach(model)
        return cls(model, learned, samples, start)

    @property
    def lowest(self) -> float:
        """The smallest share that can be asked for."""
        if self.dial is not None:
            return self.dial.lowest
        return min(self.learned) if self.learned else LOWEST

    def _middle(self) -> float:
        """A share to begin with: a learned one in the middle, or 0.6 as far as there is that."""
        if self.dial is not None:
            return self.dial.nearest(0.6)
        return list(self.learned)[len(self.learned) // 2] if self.learned else 0.6

    def set(self, share: float) -> None:
        """Set the model's thresholds for `share`, which is clamped to what can be asked for."""
        share = round(min(1.0, max(self.lowest, share)), 3)
        if self.dial is not None:
            thresholds_of(self.model).set_budget(share if share == 1 else self.dial.nearest(share))
            return
        if share not in self._known:
            self._known[share] = self._mixed(share) if self.learned else self._calibrated(share)
        thresholds_of(self.model).set(*self._known[share])

    def explain(self) -> str:
        """The effect of the slider, in a sentence or two."""
        if self.dial is not None:
            ends = f"from {self.dial.lowest:.2f} to {self.dial.highest:.2f}"
            return f"Thresholds were learned for every budget {ends}, as one dial; 1 is all off."
        if not self.learned:
            return "Thresholds are calibrated on the sample pictures for the share that you ask for; none were learned."
        shares = ", ".join(f"{share:.2f}" for share in self.learned)
        between = "in proportion" if self.samples is None else "so that the sample pictures cost the share on average"
        return f"Thresholds were learned at {shares}; between these and 1 (all off) they are mixed, {between}."

    def _calibrated(self, share: float) -> Pair:
        assert self.samples is not None
        calibrate(self.model, self.samples, share)
        own = thresholds_of(self.model)
        return own.merge.detach().cpu().clone(), own.prune.detach().cpu().clone()

    def _mixed(self, share: float) -> Pair:
        """Between the two budgets around `share`, at the place where the samples cost it."""
        budgets = [1.0, *self.learned]
        above, below = min(s for s in budgets if s > share), max(s for s in budgets if s < share)
        first, second = self._known[above], self._known[below]
        part = (above - share) / (above - below)
        low, high = 0.0, 1.0
        for _ in range(6 if self.samples is not None else 0):
            too_dear = self._cost(_mix(first, second, part)) > share
            low, high = (part, high) if too_dear else (low, part)
            part = (low + high) / 2
        return _mix(first, second, part)

    @torch.inference_mode()
    def _cost(self, pair: Pair) -> float:
        """Mean share of the samples."""
        thresholds_of(self.model).set(*pair)
        with record() as calls:
            self.model(self.samples)
        return calls.share().mean().item()


def _mix(first: Pair, second: Pair, part: float) -> Pair:
    return torch.lerp(first[0], second[0], part), torch.lerp(first[1], second[1], part)
