"""A budget in milliseconds: what a batch costs by the tokens that its blocks have, and the share that meets a time."""

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
    """Seconds of one shape of block for a batch, by tokens an image; [P] each.

    Attributes:
        tokens: rising.
        attention: of what comes before the reduction, by tokens that enter.
        reduction: of the reduction, by tokens that enter.
        mlp: of what comes after it, by tokens that leave.
        whole: of the host's own block with all tokens, a number.
    """

    tokens: Floats
    attention: Floats
    reduction: Floats
    mlp: Floats
    whole: float

    def seconds(self, entering: Floats, leaving: Floats, reduces: bool) -> Floats:
        """Seconds of a block for a batch, like `entering`."""
        before = self.attention + self.reduction if reduces else self.attention
        return np.interp(entering, self.tokens, before) + np.interp(leaving, self.tokens, self.mlp)


@dataclass(frozen=True)
class Costs:
    """Time for a batch on one device and engine.

    Attributes:
        images: of the batch that was measured.
        tokens: that enter the first block.
        blocks: for each block the costs of its shape; `reduces` says which of them reduce.
        factor, rest: seconds of the model = factor * those of its blocks + rest.
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
        """float64 [...], seconds for a batch.

        Args:
            kept: [..., L], mean tokens after each block, as `Dial.kept_at` gives them.
        """
        return torch.from_numpy(np.asarray(self.factor * self.blocks_alone(kept) + self.rest))

    def blocks_alone(self, kept: Tensor) -> Floats:
        """[...], seconds of all blocks as each took alone."""
        left = kept.double().numpy()
        total, entering, reduced = np.zeros(left.shape[:-1]), np.full(left.shape[:-1], float(self.tokens)), False
        for i, (block, reduces) in enumerate(zip(self.blocks, self.reduces, strict=True)):
            reduced |= reduces
            total += block.seconds(entering, left[..., i], reduces) if reduced else block.whole
            entering = left[..., i]
        return total

    def share_for(self, dial: Dial, seconds: float) -> float:
        """The largest share of `dial` that is predicted to take at most `seconds` a batch; 1 where dense does.

        Raises:
            UsageError: not a time.
            LTMPError: the dial's lowest share takes longer; the message says what can be reached.
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
        # a round number, rather a little faster
        return max(dial.lowest, int(1e4 * shares[fast[-1]]) / 1e4)


def speed(seconds: float, images: int) -> str:
    """A batch's time in words: 9.53 ms (839 images/s)."""
    return f"{_three(1e3 * seconds)} ms ({_three(images / seconds)} images/s)"


def _three(value: float) -> str:
    """Three digits, or the whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def set_latency(
    model: nn.Module, costs: Costs, *, milliseconds: float | None = None, images_per_second: float | None = None
) -> float:
    """Turn a model's dial to the largest budget that is predicted to be fast enough; all off where dense is.

    >>> costs = ltmp.measure_costs(model, images)
    >>> ltmp.set_latency(model, costs, milliseconds=12)

    Args:
        model: attached, with a dial.
        costs: measured on this model, device and batch size.
        milliseconds: for a batch of `costs.images`; or
        images_per_second: at that batch size.

    Returns:
        The share.

    Raises:
        UsageError: no dial, or not exactly one target.
        LTMPError: out of reach; the message says what can be reached, and the thresholds stay as they are.
    """
    if (milliseconds is None) == (images_per_second is None):
        raise UsageError("how fast? give either milliseconds a batch or images per second")
    if milliseconds is None:
        seconds = costs.images / images_per_second if images_per_second else float("nan")
    else:
        seconds = milliseconds / 1e3
    own = thresholds_of(model)
    share = costs.share_for(dial_of(own), seconds)
    own.set_budget(share)
    return share


def dial_of(own: Thresholds) -> Dial:
    """The dial that a time is met with.

    Raises:
        UsageError: there is none.
    """
    if own.dial is None:
        raise UsageError(
            "a time is met by turning the dial, and these thresholds have none: `ltmp dial` makes one (docs/dial.md)"
        )
    return own.dial
