"""Thresholds for every budget of the slider: from a dial, interpolated between learned ones, or calibrated."""

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
from ..method.thresholds import Thresholds

LOWEST = 0.4
"""The smallest FLOPs share that thresholds are calibrated for."""

Pair = tuple[Tensor, Tensor]
"""Merge and prune thresholds, both [L]."""


class Budgets:
    """Sets an attached model's thresholds for a FLOPs share.

    Args:
        model: attached, in evaluation mode.
        learned: thresholds by FLOPs share; ignored if the model has a dial.
        samples: [B, C, H, W] images, as the model takes them. Between learned budgets, thresholds are mixed so that the
            samples cost the requested share; without learned budgets, thresholds are calibrated on the samples. Images
            that users upload never change thresholds.
        start: the initial share; None for one in the middle.

    Raises:
        UsageError: `start` is out of range.
        LTMPError: there are neither thresholds nor samples.
    """

    def __init__(
        self, model: nn.Module, learned: dict[float, Pair], samples: Tensor | None = None, start: float | None = None
    ) -> None:
        thresholds = thresholds_of(model)
        self.dial = thresholds.dial
        if not learned and samples is None and self.dial is None:
            raise LTMPError("which thresholds? give files that `ltmp learn` wrote, or images to calibrate on")
        self.model, self.samples = model, samples
        off = (torch.ones(thresholds.depth), torch.zeros(thresholds.depth))
        self.learned = dict(sorted(learned.items(), reverse=True))
        self._cache: dict[float, Pair] = {1.0: off, **self.learned}
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
        """Attach, and read the budgets from files that `ltmp learn` wrote: one with a dial, or several of one variant.

        Raises:
            UsageError: a file has fixed rates, or a dial although there are other files, or `start` is out of range.
            LTMPError: a file is not for this model, or has neither a measured share nor a target.
        """
        learned = {}
        for path in files:
            file = read(path)
            about = file.metadata
            if file.config.method.fixed:
                raise UsageError(
                    f"{path} holds fixed rates ({file.config.variant}), which have no slider: give thresholds that "
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
            learned[round(float(share), 3)] = _copy(thresholds_of(model))
        if not is_attached(model):
            attach(model)
        return cls(model, learned, samples, start)

    @property
    def lowest(self) -> float:
        """The smallest FLOPs share of the slider."""
        if self.dial is not None:
            return self.dial.lowest
        return min(self.learned) if self.learned else LOWEST

    def _middle(self) -> float:
        """The initial share: the middle one of the learned budgets, or 0.6, or the closest to it that the dial has."""
        if self.dial is not None:
            return self.dial.nearest(0.6)
        return list(self.learned)[len(self.learned) // 2] if self.learned else 0.6

    def set(self, share: float) -> None:
        """Set the model's thresholds for `share`, clamped to the range of the slider."""
        share = round(min(1.0, max(self.lowest, share)), 3)
        if self.dial is not None:
            thresholds_of(self.model).set_budget(share if share == 1 else self.dial.nearest(share))
            return
        if share not in self._cache:
            self._cache[share] = self._mixed(share) if self.learned else self._calibrated(share)
        thresholds_of(self.model).set(*self._cache[share])

    def explain(self) -> str:
        """Describe where the slider's thresholds come from, in a sentence or two."""
        if self.dial is not None:
            ends = f"from {self.dial.lowest:.2f} to {self.dial.highest:.2f}"
            return f"The thresholds were learned for every budget {ends}, as one dial; 1 turns reduction off."
        if not self.learned:
            return "No thresholds were learned: they are calibrated on the sample pictures for the budget you choose."
        shares = ", ".join(f"{share:.2f}" for share in self.learned)
        how = "linearly" if self.samples is None else "so that the sample pictures cost the budget on average"
        return f"The thresholds were learned at {shares}; between these and 1 (no reduction), they are mixed {how}."

    def _calibrated(self, share: float) -> Pair:
        assert self.samples is not None
        calibrate(self.model, self.samples, share)
        return _copy(thresholds_of(self.model))

    def _mixed(self, share: float) -> Pair:
        """Interpolate between the two budgets around `share`.

        With samples, a bisection finds the mixture at which they cost `share` on average.
        """
        budgets = [1.0, *self.learned]
        above, below = min(s for s in budgets if s > share), max(s for s in budgets if s < share)
        upper, lower = self._cache[above], self._cache[below]
        weight = (above - share) / (above - below)
        low, high = 0.0, 1.0
        for _ in range(6 if self.samples is not None else 0):
            too_expensive = self._cost(_mix(upper, lower, weight)) > share
            low, high = (weight, high) if too_expensive else (low, weight)
            weight = (low + high) / 2
        return _mix(upper, lower, weight)

    @torch.inference_mode()
    def _cost(self, pair: Pair) -> float:
        """The mean FLOPs share of the samples."""
        thresholds_of(self.model).set(*pair)
        with record() as calls:
            self.model(self.samples)
        return calls.share().mean().item()


def _copy(thresholds: Thresholds) -> Pair:
    return thresholds.merge.detach().cpu().clone(), thresholds.prune.detach().cpu().clone()


def _mix(first: Pair, second: Pair, weight: float) -> Pair:
    """`first` at weight 0, `second` at weight 1."""
    return torch.lerp(first[0], second[0], weight), torch.lerp(first[1], second[1], weight)
