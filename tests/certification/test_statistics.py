"""Tests of a mean against exact enumeration, against scipy where it is, and by how often they err."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from ltmp.certification.statistics import (
    betting_p_value,
    binomial_p_value,
    binomial_tail,
    fixed_sequence,
    images_needed,
    least_images,
    upper_bound,
)


def ones(count, n):
    return np.repeat([1.0, 0.0], [count, n - count])


@pytest.mark.parametrize(
    ("count", "n", "level"), [(0, 1, 0.5), (0, 300, 0.01), (3, 20, 0.3), (20, 20, 0.9), (7, 60, 0.2)]
)
def test_binomial_is_the_exact_sum(count, n, level):
    exact = sum(comb(n, k) * level**k * (1 - level) ** (n - k) for k in range(count + 1))
    assert binomial_p_value(ones(count, n), level) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("count", "n", "level"), [(450, 50_000, 0.01), (2, 10, 0.999), (0, 5, 1.0), (1, 5, 0.0)])
def test_binomial_agrees_with_scipy(count, n, level):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert binomial_tail(count, n, level) == pytest.approx(stats.binom.cdf(count, n, level), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("count", "n"), [(0, 299), (3, 1000), (40, 300)])
def test_upper_bound_is_clopper_pearson(count, n):
    bound = upper_bound(binomial_p_value, ones(count, n), 0.95)
    # at the bound so few ones have just the probability that may be erred with
    assert binomial_tail(count, n, bound) == pytest.approx(0.05, rel=1e-3)
    assert count or bound == pytest.approx(1 - 0.05 ** (1 / n), abs=2e-6)


def test_upper_bound_of_nothing_but_ones_is_one():
    assert upper_bound(binomial_p_value, ones(5, 5), 0.95) == 1


@pytest.mark.parametrize(
    ("draw", "level"),
    [
        (lambda rng: (rng.random(400) < 0.05).astype(float), 0.05),
        (lambda rng: rng.beta(0.1, 1.9, 400), 0.05),
        (lambda rng: rng.beta(2, 38, 400), 0.05),
        (lambda rng: rng.choice([1.0, -1.0, 0.0], 400, p=[0.06, 0.04, 0.9]), 0.02),
    ],
)
def test_betting_errs_no_more_often_than_it_says(draw, level):
    rng = np.random.default_rng(0)
    wrong = np.mean([betting_p_value(draw(rng), level, 0.9) <= 0.1 for _ in range(2000)])
    # four standard errors of 2,000 draws above 10 %
    assert wrong <= 0.1 + 4 * (0.09 / 2000) ** 0.5


def test_betting_sees_a_small_difference_of_paired_errors():
    """Where one image in fifty answers otherwise, as often for the better, Hoeffding's bound needs 60,000 images."""
    rng = np.random.default_rng(0)
    losses = rng.choice([1.0, -1.0, 0.0], 3000, p=[0.01, 0.01, 0.98])
    assert betting_p_value(losses, 0.01) <= 0.05
    assert upper_bound(betting_p_value, losses, 0.95) < 0.011


def test_betting_never_certifies_a_mean_above_the_level():
    lucky_first = np.concatenate([np.zeros(900), np.ones(100)])
    assert betting_p_value(lucky_first, 0.1) == 1


def test_fixed_sequence_stops_at_the_first_failure():
    assert fixed_sequence([0.0, 0.05, 0.2, 0.0], 0.95) == 2
    assert fixed_sequence([0.3, 0.0], 0.95) == 0
    assert fixed_sequence([0.01, 0.01], 0.95) == 2


@pytest.mark.parametrize("p_value", [binomial_p_value, betting_p_value])
def test_images_needed_are_the_fewest(p_value):
    losses = ones(6, 1000)
    needed = images_needed(p_value, losses, 0.01, 0.95)
    assert needed is not None
    assert needed > 1000
    assert p_value(np.resize(losses, needed), 0.01, 0.95) <= 0.05 < p_value(np.resize(losses, needed - 1), 0.01, 0.95)


def test_no_number_of_images_makes_a_high_risk_low():
    assert images_needed(binomial_p_value, ones(20, 1000), 0.01, 0.95) is None


def test_the_least_images_are_those_of_the_rule_of_three():
    assert least_images(binomial_p_value, 0.01, 0.95) == 299
    assert 299 <= least_images(betting_p_value, 0.01, 0.95) <= 310
