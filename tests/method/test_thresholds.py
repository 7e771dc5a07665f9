"""Learned thresholds: their values, their decision and its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltmp.config import LEARNED, VARIANTS, LTMPConfig, Scores
from ltmp.method.thresholds import Thresholds, log_over, over


@given(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32), st.floats(0.001, 10))
def test_over_is_exactly_the_hard_decision(score: float, threshold: float, tau: float) -> None:
    """With or without a gradient, 0 or 1 in float32 without rounding error."""
    s = torch.tensor([score])
    for requires_grad in (False, True):
        t = torch.tensor(threshold, requires_grad=requires_grad)
        assert over(s, t, tau).item() == float(score > threshold)


@given(st.floats(0, 1, width=32), st.floats(-1, 1, width=32), st.floats(0.1, 2))
def test_log_over_is_exactly_the_hard_decision(score: float, threshold: float, tau: float) -> None:
    s = torch.tensor([score])
    for requires_grad in (False, True):
        t = torch.tensor(threshold, requires_grad=requires_grad)
        assert log_over(s, t, tau).item() == float(score > threshold)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_gradients_are_those_of_the_sigmoids(tau: float) -> None:
    score = torch.tensor([0.02, 0.005, 0.3])
    for decide, transform in ((over, torch.Tensor.double), (log_over, torch.log)):
        threshold = torch.tensor(0.01, requires_grad=True)
        decide(score, threshold, tau).sum().backward()
        soft = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        ((transform(score.double()) - transform(soft)) / tau).sigmoid().sum().backward()
        assert threshold.grad.item() == pytest.approx(soft.grad.item(), rel=1e-5)


def test_gradient_stays_finite_at_the_edges() -> None:
    threshold = torch.tensor(0.0, requires_grad=True)
    log_over(torch.tensor([0.0, 1e-38, 1.0]), threshold, 0.5).sum().backward()
    assert threshold.grad.isfinite()
    threshold = torch.tensor(0.9, requires_grad=True)
    over(torch.tensor([float("-inf"), 1.0]), threshold, 0.1).sum().backward()
    assert threshold.grad.isfinite()


def test_new_thresholds_are_off() -> None:
    thresholds = Thresholds(3, LTMPConfig())
    assert thresholds.active() == ((False, False),) * 3
    assert [thresholds.steps(thresholds.active(), i) for i in range(3)] == [()] * 3


def test_active_steps_are_those_that_can_select() -> None:
    thresholds = Thresholds(4, LTMPConfig(variant="ltpm"))
    thresholds.set([1.0, 0.999, 2.0, 0.5], [0.0, 0.0, 1e-6, 0.1])
    active = thresholds.active()
    assert active == ((False, False), (True, False), (False, True), (True, True))
    assert [thresholds.steps(active, i) for i in range(4)] == [(), ("merge",), ("prune",), ("prune", "merge")]


@pytest.mark.parametrize(("variant", "steps"), [(name, VARIANTS[name].steps) for name in LEARNED])
def test_a_variant_has_its_own_steps_only(variant: str, steps: tuple[str, ...]) -> None:
    thresholds = Thresholds(1, LTMPConfig(variant=variant))
    thresholds.set([0.0], [0.5])
    assert thresholds.steps(thresholds.active(), 0) == steps


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"merge": [0.5] * 2}, "for 2 blocks, but this model has 3"),
        ({"prune": [0.5, float("nan"), 0.1]}, "NaN or infinity"),
        ({"merge": [float("inf")] * 3}, "NaN or infinity"),
        ({"merge": [0.5] * 3, "prune": [0.5] * 4}, "for 4 blocks"),
        ({"merge": [[0.5] * 3]}, "this model has 3"),
    ],
)
def test_set_refuses_and_changes_nothing(values: dict[str, list[float]], fragment: str) -> None:
    thresholds = Thresholds(3, LTMPConfig())
    with pytest.raises(ValueError, match=fragment):
        thresholds.set(**values)
    assert thresholds.merge.tolist() == [1.0] * 3
    assert thresholds.prune.tolist() == [0.0] * 3


def test_set_leaves_a_vector_that_is_none() -> None:
    thresholds = Thresholds(2, LTMPConfig())
    thresholds.set(prune=torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert thresholds.merge.tolist() == [1.0, 1.0]
    assert thresholds.prune.tolist() == pytest.approx([0.1, 0.2])


def test_conversion_keeps_the_bits_and_the_parameters() -> None:
    thresholds = Thresholds(2, LTMPConfig())
    value = 0.1234567
    thresholds.set([value] * 2, [value / 100] * 2)
    before = [parameter.clone() for parameter in thresholds.parameters()]
    optimizer = torch.optim.SGD(thresholds.parameters(), lr=1.0)
    thresholds.half().to("cpu").bfloat16()
    for parameter, held, old in zip(thresholds.parameters(), optimizer.param_groups[0]["params"], before, strict=True):
        assert parameter is held
        assert torch.equal(parameter, old)


# -- sizes


def test_size_power_rises_with_the_block() -> None:
    size = torch.tensor([1.0, 4.0])
    constant, rising = Thresholds(3, LTMPConfig()), Thresholds(3, LTMPConfig(scores=Scores(size_power=0.5)))
    assert all(constant.weight(block, size) is size for block in range(3))
    weights = [rising.weight(block, size).tolist() for block in range(3)]
    assert weights == [pytest.approx(row) for row in ([1, 2], [1, 4**0.75], [1, 4])]
    assert Thresholds(1, LTMPConfig(scores=Scores(size_power=0.5))).size_power(0) == 0.5


def test_class_power_rises_with_the_block() -> None:
    rising = Thresholds(4, LTMPConfig(scores=Scores(class_power=0.5)))
    assert [rising.class_power(block) for block in range(4)] == [0.125, 0.25, 0.375, 0.5]
    assert Thresholds(1, LTMPConfig(scores=Scores(class_power=0.5))).class_power(0) == 0.5
