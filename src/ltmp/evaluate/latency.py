"""A budget in milliseconds: predict the time of a batch from its token counts, and find the share that meets a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LTMPError, UsageError
from ..hosts.attach import thresholds_of
from ..method.dial import Dial
from ..method.thresholds import Thresholds

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class BlockCosts:
    """Seconds that a block of one shape takes for a batch, at several numbers of tokens per image.

    Attributes:
        tokens: [P], the numbers of tokens, ascending.
        attention: [P], time before the reduction, by tokens entering the block.
        reduction: [P], time of the reduction, by tokens entering the block.
        mlp: [P], time after the reduction, by tokens leaving the block.
        whole: time of the host's own block with all tokens.
    """

    tokens: Floats
    attention: Floats
    reduction: Floats
    mlp: Floats
    whole: float

    def seconds(self, entering: Floats, leaving: Floats, reduces: bool) -> Floats:
        """Seconds that the block takes for a batch, in the shape of `entering`."""
        before = self.attention + self.reduction if reduces else self.attention
        return np.interp(entering, self.tokens, before) + np.interp(leaving, self.tokens, self.mlp)


@dataclass(frozen=True)
class Costs:
    """Time for a batch on one device and engine.

    Attributes:
        images: size of the measured batch.
        tokens: number of tokens entering the first block.
        blocks: for each block, the costs of its shape.
        reduces: for each block, whether it reduces.
        factor, rest: seconds of the model = factor * seconds of its blocks + rest.
        dense: seconds with all reduction off.
    """

    images: int
    tokens: int
    blocks: tuple[BlockCosts, ...]
    reduces: tuple[bool, ...]
    factor: float
    rest: float
    dense: float

    def predict_seconds(self, kept: Tensor) -> Tensor:
        """Predict the seconds for a batch, float64 [...].

        Args:
            kept: [..., L], mean number of tokens after each block, as `Dial.kept_at` returns.
        """
        return torch.from_numpy(np.asarray(self.factor * self.blocks_alone(kept) + self.rest))

    def blocks_alone(self, kept: Tensor) -> Floats:
        """Sum of the seconds that each block takes when it is timed alone, [...]."""
        left = kept.double().numpy()
        total, entering, reduced = np.zeros(left.shape[:-1]), np.full(left.shape[:-1], float(self.tokens)), False
        for i, (block, reduces) in enumerate(zip(self.blocks, self.reduces, strict=True)):
            reduced |= reduces
            total += block.seconds(entering, left[..., i], reduces) if reduced else block.whole
            entering = left[..., i]
        return total

    def share_for(self, dial: Dial, seconds: float) -> float:
        """The largest share of `dial` predicted to take at most `seconds` per batch; 1 if dense is fast enough.

        Raises:
            UsageError: `seconds` is not positive and finite.
            LTMPError: every share of the dial takes longer; the message gives the range that can be reached.
        """
        if not (np.isfinite(seconds) and seconds > 0):
            raise UsageError(f"a batch cannot take {1e3 * seconds:g} ms: give a positive time or speed")
        if self.dense <= seconds:
            return 1.0
        shares = np.linspace(dial.lowest, dial.highest, 512)
        predicted = self.predict_seconds(torch.stack([dial.kept_at(share) for share in shares.tolist()])).numpy()
        fast = np.flatnonzero(predicted <= seconds)
        if len(fast) == 0:
            first, last = float(predicted.min()), max(float(predicted.max()), self.dense)
            raise LTMPError(
                f"{speed(seconds, self.images)} are out of reach: for batches of {self.images} this model takes "
                f"between {speed(first, self.images)} and {speed(last, self.images)} here"
            )
        # rounded down, which is a little faster
        return max(dial.lowest, int(1e4 * shares[fast[-1]]) / 1e4)


def speed(seconds: float, images: int) -> str:
    """The time of a batch as text: 9.53 ms (839 images/s)."""
    return f"{_three_digits(1e3 * seconds)} ms ({_three_digits(images / seconds)} images/s)"


def _three_digits(value: float) -> str:
    """Three significant digits, or the integer part if that is longer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def set_latency(
    model: nn.Module, costs: Costs, *, milliseconds: float | None = None, images_per_second: float | None = None
) -> float:
    """Set a model's dial to the largest budget predicted to be fast enough; all reduction off if dense is fast enough.

    >>> costs = ltmp.measure_costs(model, images)
    >>> ltmp.set_latency(model, costs, milliseconds=12)

    Args:
        model: attached, with a dial.
        costs: measured for this model, device and batch size.
        milliseconds: target time for a batch of `costs.images`. Give either this or
        images_per_second: target speed at that batch size.

    Returns:
        The FLOPs share that was set.

    Raises:
        UsageError: the model has no dial, or not exactly one target is given.
        LTMPError: the target is out of reach; the message gives the range that can be reached, and the thresholds are
            left unchanged.
    """
    if (milliseconds is None) == (images_per_second is None):
        raise UsageError("how fast? give either milliseconds per batch or images per second")
    if milliseconds is None:
        seconds = costs.images / images_per_second if images_per_second else float("nan")
    else:
        seconds = milliseconds / 1e3
    thresholds = thresholds_of(model)
    share = costs.share_for(dial_of(thresholds), seconds)
    thresholds.set_budget(share)
    return share


def dial_of(thresholds: Thresholds) -> Dial:
    """The dial of these thresholds.

    Raises:
        UsageError: they have none.
    """
    if thresholds.dial is None:
        raise UsageError(
            "a time is met by turning the dial, and these thresholds have none: `ltmp dial` makes one (docs/dial.md)"
        )
    return thresholds.dial
