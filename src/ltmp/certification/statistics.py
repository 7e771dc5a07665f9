"""Finite-sample tests of a mean loss: p-values, upper bounds, fixed-sequence testing, and how many images they need.

The null hypothesis is that the mean loss over all images is at least `level`; a small p-value rejects it and so
certifies the level. Nothing is asymptotic: the error rate holds for any number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

PValue = Callable[[Floats, float, float], float]
"""From losses [n], a level and a confidence to a p-value; the confidence may tune the test, but not its error rate."""

MAX_IMAGES = 1 << 21
"""Number of images beyond which `images_needed` gives up."""


def binomial_p_value(losses: Floats, level: float, confidence: float = 0.95) -> float:
    """Exact p-value for losses of 0 and 1: the chance of so few ones if the mean is `level` (Clopper & Pearson, 1934).

    Args:
        losses: [n], each 0 or 1.
    """
    return binomial_tail(int(losses.sum()), len(losses), level)


def binomial_tail(count: int, n: int, level: float) -> float:
    """P(X <= count) for X ~ Binomial(n, level), summed in log space."""
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

    On each image a gambler wins `b_t (level - loss_t)` of the capital. If the mean is at least `level`, the capital is
    a nonnegative supermartingale, so it reaches 1 / p with probability at most p (Ville). Stakes follow the variance of
    the earlier losses, which makes the test far more powerful than Hoeffding's and Bentkus' bounds if losses vary
    little. A loss in [-1, 1] needs no special treatment: mapping it to (1 + loss) / 2 only scales the stakes.

    Args:
        losses: [n], each at most 1, of images drawn independently. The order must not depend on the losses:
            images sorted by class have to be shuffled first.
        confidence: stakes are optimal for roughly this confidence, but valid for any.
    """
    n = len(losses)
    if losses.mean() >= level:
        return 1.0
    # a prior observation: mean 0, variance 1/4
    counts = np.arange(2, n + 2)
    mean = np.cumsum(losses) / counts
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / counts
    before = np.concatenate([[0.25], variance[:-1]])
    # below 1 / (1 - level), so that no loss can ruin the gambler
    stake = np.minimum(np.sqrt(2 * np.log(1 / (1 - confidence)) / (n * before)), 0.99 / (1 - level))
    return float(min(1.0, np.exp(-np.cumsum(np.log1p(stake * (level - losses))).max())))


def upper_bound(p_value: PValue, losses: Floats, confidence: float) -> float:
    """Upper confidence bound of the mean loss: the smallest level that the test rejects, to 1e-6, or 1.

    With `binomial_p_value` this is the Clopper-Pearson bound.
    """
    low, high = max(0.0, float(losses.mean())), 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle, confidence) <= 1 - confidence else (middle, high)
    return high


def fixed_sequence(p_values: Sequence[float], confidence: float) -> int:
    """Number of hypotheses rejected in order, up to the first that is not.

    Each is tested at the full level, and yet a true one is rejected with probability at most 1 - confidence
    (fixed-sequence testing; Angelopoulos et al., Learn then Test, 2021, section 3.2).
    """
    passed = [p <= 1 - confidence for p in p_values]
    return passed.index(False) if False in passed else len(passed)


def images_needed(p_value: PValue, losses: Floats, level: float, confidence: float) -> int | None:
    """Number of images like these that would be enough; None if their mean is above the level or too close to it."""

    def enough(n: int) -> bool:
        # repeating the losses keeps their mean and variance
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
    """Fewest images that can certify `level`: those needed if all losses are 0."""
    return images_needed(p_value, np.zeros(1), level, confidence) or MAX_IMAGES
