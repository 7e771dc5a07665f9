"""A budget in milliseconds: predicted times, the share that is chosen, and errors if no share is fast enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ltmp
from helpers import attach_reducing, make_dial, random_images, run_recorded, tiny_vit
from ltmp.errors import LTMPError, UsageError
from ltmp.evaluate import costs as costing
from ltmp.evaluate.costs import measure_costs
from ltmp.evaluate.latency import BlockCosts, Costs, set_latency
from ltmp.hosts.attach import attachment
from ltmp.method.dial import Dial, keep_on

IMAGES = 4


def linear_costs(reduces: tuple[bool, ...] = (True, True, True), **other: Any) -> Costs:
    """Ten tokens take 1 ms before the reduction, 0.5 ms in it and 2 ms after it; the host's own block takes 4 ms."""
    tokens = np.array([1.0, 10.0, 20.0])
    block = BlockCosts(tokens, tokens * 1e-4, tokens * 5e-5, tokens * 2e-4, 4e-3)
    return Costs(**{
        "images": IMAGES, "tokens": 20, "blocks": (block,) * len(reduces), "reduces": reduces, "factor": 1.0,
        "rest": 1e-3, "dense": 14e-3, **other,
    })  # fmt: skip


def test_prediction_adds_up_blocks_and_the_rest() -> None:
    costs = linear_costs()
    # entering 20, 10, 8 and leaving 10, 8, 4
    wanted = 1e-3 + 1.5e-4 * (20 + 10 + 8) + 2e-4 * (10 + 8 + 4)
    assert costs.predict_seconds(torch.tensor([10.0, 8.0, 4.0])).item() == pytest.approx(wanted)
    both = costs.predict_seconds(torch.tensor([[10.0, 8.0, 4.0], [20.0, 20.0, 20.0]]))
    assert both.shape == (2,)
    assert both[0].item() == pytest.approx(wanted)


def test_blocks_that_do_not_reduce_cost_no_reduction() -> None:
    costs = linear_costs((False, True, False))
    # the first is the host's own block, the last runs on what is left
    wanted = 1e-3 + 4e-3 + (1.5e-4 * 20 + 2e-4 * 10) + (1e-4 * 10 + 2e-4 * 10)
    assert costs.predict_seconds(torch.tensor([20.0, 10.0, 10.0])).item() == pytest.approx(wanted)


def dial_of_three() -> Dial:
    return make_dial(3, knots=2, lowest=0.4, highest=0.9)


@given(st.floats(0.0, 1.0))
@settings(max_examples=40)
def test_the_largest_share_that_is_fast_enough_is_taken(part: float) -> None:
    costs, dial = linear_costs(dense=1.0), dial_of_three()
    fast, slow = (float(costs.predict_seconds(dial.kept_at(share))) for share in (dial.lowest, dial.highest))
    target = fast + part * (slow - fast)
    share = costs.share_for(dial, target)
    assert float(costs.predict_seconds(dial.kept_at(share))) <= target + 1e-12
    if share < dial.highest - 2e-3:
        assert float(costs.predict_seconds(dial.kept_at(share + 2e-3))) > target


def test_where_dense_is_fast_enough_nothing_is_reduced() -> None:
    assert linear_costs(dense=2e-3).share_for(dial_of_three(), 2.1e-3) == 1
    assert linear_costs(dense=1.0).share_for(dial_of_three(), 0.5) == pytest.approx(0.9, abs=1e-4)


@pytest.fixture
def model() -> Any:
    model = ltmp.attach(tiny_vit())
    model.ltmp.set_dial(dial_of_three())
    model.ltmp.set_budget(0.5)
    return model


def test_out_of_reach_is_one_sentence_with_what_can_be_reached(model: Any) -> None:
    costs = linear_costs()
    with pytest.raises(LTMPError, match=r"1 ms \(4000 images/s\) are out of reach: for batches of 4 this") as no:
        set_latency(model, costs, milliseconds=1.0)
    assert str(no.value).endswith("and 14 ms (286 images/s) here")
    assert "\n" not in str(no.value)
    assert model.ltmp.budget == 0.5


def test_a_time_or_a_speed_turns_the_dial(model: Any) -> None:
    costs = linear_costs(dense=1.0)
    middle = float(costs.predict_seconds(model.ltmp.dial.kept_at(0.7)))
    by_time = set_latency(model, costs, milliseconds=1e3 * middle + 1e-3)
    assert by_time == pytest.approx(0.7, abs=2e-3)
    assert model.ltmp.budget == by_time
    assert set_latency(model, costs, images_per_second=IMAGES / (middle + 1e-6)) == by_time


@pytest.mark.parametrize(
    ("target", "fragment"),
    [
        ({}, "either milliseconds per batch or images per second"),
        ({"milliseconds": 1.0, "images_per_second": 1.0}, "either milliseconds"),
        ({"milliseconds": -1.0}, "cannot take -1 ms"),
        ({"milliseconds": float("nan")}, "give a positive time"),
        ({"images_per_second": 0.0}, "give a positive time"),
        ({"images_per_second": float("inf")}, "give a positive time"),
    ],
)
def test_invalid_targets_are_refused(model: Any, target: dict[str, float], fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        set_latency(model, linear_costs(), **target)


def test_a_dial_is_needed() -> None:
    plain = ltmp.attach(tiny_vit())
    for call in (
        lambda: measure_costs(plain, random_images(2)),
        lambda: set_latency(plain, linear_costs(), milliseconds=9),
    ):
        with pytest.raises(UsageError, match=r"have none: `ltmp dial` makes one"):
            call()


def counted(ways: dict[str, Callable[[], Any]], images: int, seconds: float) -> dict[str, float]:
    """Replaces the clock: every floating-point operation takes a nanosecond, on any machine."""
    found = {}
    for name, call in ways.items():
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = images / (1e-9 * max(counter.get_total_flops(), 1))
    return found


def real_dial(model: Any, images: torch.Tensor) -> Dial:
    rows = []
    for at in (0.5, 0.7, 0.9):
        attach_reducing(model, images, at=at)
        rows.append((model.ltmp.merge.detach().clone(), model.ltmp.prune.detach().clone()))
    merge, prune = keep_on(*(torch.stack(column) for column in zip(*rows, strict=True)))
    kept = []
    for values in zip(merge, prune, strict=True):
        model.ltmp.set(*values)
        kept.append(run_recorded(model, images)[1].mean(0))
    return Dial(torch.tensor([0.5, 0.7, 0.9]), merge, prune, torch.stack(kept))


@torch.no_grad()
def test_blocks_measured_alone_predict_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With operations as time: within 1 % at budgets that were not measured, given the token counts."""
    monkeypatch.setattr(costing, "timed", counted)
    images = random_images(8, size=32).double()
    model = tiny_vit(img_size=32, embed_dim=32)
    dial = real_dial(model, images.float())
    # float64, because the counter does not support oneDNN's float32 operator
    model = model.double()
    model.ltmp.set_dial(dial)
    costs = measure_costs(model, images)
    for share in (0.55, 0.6, 0.75, 0.85):
        model.ltmp.set_budget(share)
        measured = 1 / counted({"model": lambda: model(images)}, 1, 0)["model"]
        kept = run_recorded(model, images)[1].mean(0)
        assert costs.predict_seconds(kept).item() == pytest.approx(measured, rel=0.01)
    model.ltmp.set_budget(1.0)
    assert costs.dense == pytest.approx(1 / counted({"model": lambda: model(images)}, 1, 0)["model"])


# NumPy warns about the undefined rows past the end
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@torch.inference_mode()
def test_pieces_of_the_triton_engine_run() -> None:
    """The calls that are timed on a GPU, here in the interpreter and without CUDA graphs."""
    pytest.importorskip("triton")
    from ltmp.engines.select import unavailable

    if unavailable(torch.device("cpu")):
        pytest.skip("neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1)")
    model = ltmp.attach(tiny_vit())
    body, x = attachment(model).body, torch.randn(2, 9, 16)
    model.ltmp.set([0.5] * 3, [0.01] * 3)
    calls, left = costing._triton_pieces(body, 1, x, None, ((True, True),) * 3)
    assert left == 9
    assert calls["plain"]().cu.tolist() == [0, 9, 18]
    assert calls["reduced"]().cu[-1] < 18
    assert calls["mlp"]().shape == (18, 16)


def test_measuring_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()
    images = random_images(IMAGES)
    steps: list[tuple[int, int]] = []
    with ltmp.record() as calls:
        costs = measure_costs(model, images, seconds=1e-3, progress=lambda done, total: steps.append((done, total)))
    assert not calls.kept
    assert model.training
    assert model.ltmp.budget == 0.5
    assert (costs.images, costs.tokens, len(costs.blocks)) == (IMAGES, 17, 3)
    assert costs.blocks[0] is costs.blocks[1], "blocks of one shape are measured once"
    assert steps[-1] == (2, 2)
    assert costs.dense > 0
    assert costs.factor >= 0
    assert costs.rest >= 0


def test_blocks_of_other_shapes_are_measured_separately() -> None:
    model = tiny_vit()
    model.blocks[1].mlp = type(model.blocks[1].mlp)(16, 128)
    ltmp.attach(model).ltmp.set_dial(dial_of_three())
    costs = measure_costs(model, random_images(2), seconds=1e-3)
    assert costs.blocks[0] is costs.blocks[2]
    assert costs.blocks[0] is not costs.blocks[1]
