"""Finite-sample tests of a mean loss: p-values, upper bounds, fixed-sequence testing, and how many images they need.

A test is of the null hypothesis that the mean loss of all images is at least `level`; a small p-value rejects it, so
that the level is certified. Nothing is asymptotic: the error rate holds at every number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

PValue = Callable[[Floats, float, float], float]
"""From losses [n], a level and a confidence to a p-value; the confidence may tune the test, but not its error rate."""

MAX_IMAGES = 1 << 21
"""Images beyond which `images_needed` gives up."""


def binomial_p_value(losses: Floats, level: float, confidence: float = 0.95) -> float:
    """Exact p-value for losses of 0 and 1: the chance of so few ones if the mean is `level` (Clopper & Pearson, 1934).

    Args:
        losses: [n], each 0 or 1.
    """
    return binomial_tail(int(losses.sum()), len(losses), level)


def binomial_tail(count: int, n: int, level: float) -> float:
    """P(X <= count) of a binomial X of n draws, by a sum of logarithms."""
    if count >= n or level <= 0:
        return 1.0
    if level >= 1:
        return 0.0
    k = np.arange(count)
    ratios = np.log((n - k) / (k + 1)) + np.log(level) - np.log1p(-level)
    terms = n * np.log1p(-level) + np.concatenate([[0.0], np.cumsum(ratios)])
    most = terms.max()
    return float(min(1.0, np.exp(most) * np.exp(terms - most).sum()))


def betting_p_value(losses: Floats, level: float, confidence: float = 0.95) -> float:
    """p-value for losses of at most 1, by betting (Waudby-Smith & Ramdas, JRSS B 2024, theorem 3 and section 4.2).

    A gambler stakes `b_t (level - loss_t)` of the capital on each image. Where the mean is at least `level` the capital
    is a nonnegative supermartingale, so that it reaches 1 / p with probability p at most (Ville). Stakes follow the
    variance of the losses before, which makes this far more powerful than Hoeffding's and Bentkus' bounds where losses
    vary little; a loss in [-1, 1] needs no other treatment, as mapping it to (1 + loss) / 2 only scales the stakes.

    Args:
        losses: [n], each at most 1, of images drawn independently. The order must not depend on the losses:
            images sorted by class have to be shuffled first.
        confidence: stakes are the best for about this confidence; any is valid.
    """
    n = len(losses)
    if losses.mean() >= level:
        return 1.0
    seen = np.arange(2, n + 2)
    mean = np.cumsum(losses) / seen
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / seen
    before = np.concatenate([[0.25], variance[:-1]])
    # below 1 / (1 - level), so that no loss can ruin the gambler
    stake = np.minimum(np.sqrt(2 * np.log(1 / (1 - confidence)) / (n * before)), 0.99 / (1 - level))
    return float(min(1.0, np.exp(-np.cumsum(np.log1p(stake * (level - losses))).max())))


def upper_bound(p_value: PValue, losses: Floats, confidence: float) -> float:
    """The smallest mean loss that the test rejects, to 1e-6, or 1: with `confidence` the mean is below.

    With `binomial_p_value` this is the bound of Clopper & Pearson.
    """
    low, high = max(0.0, float(losses.mean())), 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle, confidence) <= 1 - confidence else (middle, high)
    return high


def fixed_sequence(p_values: Sequence[float], confidence: float) -> int:
    """How many hypotheses are rejected, in their order up to the first that is not.

    Each is tested at the full level, and still no true one is rejected with more than probability 1 - confidence
    (fixed-sequence testing; Angelopoulos et al., Learn then Test, 2021, section 3.2).
    """
    passed = [p <= 1 - confidence for p in p_values]
    return passed.index(False) if False in passed else len(passed)


def images_needed(p_value: PValue, losses: Floats, level: float, confidence: float) -> int | None:
    """How many images like these would be enough; None where their mean is too close to the level, or above it."""

    def enough(n: int) -> bool:
        # repeated, they have the mean and the variance that they have
        return p_value(np.resize(losses, n), level, confidence) <= 1 - confidence

    if losses.mean() >= level:
        return None
    high = 1
    while not enough(high):
        high *= 2
        if high > MAX_IMAGES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def least_images(p_value: PValue, level: float, confidence: float) -> int:
    """Images without which not even losses of nothing but 0 certify `level`."""
    return images_needed(p_value, np.zeros(1), level, confidence) or MAX_IMAGES
