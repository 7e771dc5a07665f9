"""`every`: only some blocks remove tokens, at the rates of those between them, and the budget is met all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ltmp
from helpers import random_images, tiny_vit
from ltmp.errors import LTMPError, UsageError
from ltmp.learning import calibrate
from ltmp.learning.schedule import concentrated, idle_blocks

DEPTH, TARGET = 6, 0.7
FEW = {"views": 96, "calibration": 48}


def model_and_batches(**settings: Any) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = tiny_vit(depth=DEPTH, img_size=32, global_pool=settings.pop("global_pool", "token"))
    images = random_images(96, size=32)
    with torch.no_grad():
        labels = model(images).argmax(-1)
    return ltmp.attach(model, ltmp.LTMPConfig(**settings)), list(zip(images.split(16), labels.split(16), strict=True))


def by_calibration(model: nn.Module, batches: list[tuple[Tensor, Tensor]], every: int) -> None:
    calibrate(model, torch.cat([images for images, _ in batches]), TARGET, every)


def by_learning(model: nn.Module, batches: list[tuple[Tensor, Tensor]], every: int) -> None:
    ltmp.learn(model, batches, TARGET, every=every, **FEW)


def by_dialling(model: nn.Module, batches: list[tuple[Tensor, Tensor]], every: int) -> None:
    ltmp.learn_dial(model, batches, 0.6, 0.9, knots=4, views=0, calibration=96, checked=0, every=every)
    model.ltmp.set_budget(TARGET)


WAYS = (by_calibration, by_learning, by_dialling)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize(("variant", "pool"), [("ltmp", "token"), ("ltmp", "avg"), ("ltpm", "token"), ("ltp", "avg")])
def test_blocks_between_remove_nothing(way: Callable[..., None], every: int, variant: str, pool: str) -> None:
    model, batches = model_and_batches(variant=variant, global_pool=pool)
    way(model, batches, every)
    with ltmp.record() as calls, torch.inference_mode():
        for images, _ in batches:
            model(images)
    assert float(calls.share().mean()) == pytest.approx(TARGET, abs=0.04)
    kept = torch.cat(calls.kept)
    before = torch.cat([torch.full_like(kept[:, :1], 65), kept[:, :-1]], 1)
    loses = (kept < before).any(0)
    between = idle_blocks(DEPTH, every)
    # a head that reads the class token alone lets the last block drop all others
    between[-1] &= pool == "avg"
    assert not loses[between].any()
    assert loses[~between].any()
    assert [any(on) for on in model.ltmp.active()] == (~between).tolist()


@given(st.lists(st.floats(0, 2), min_size=1, max_size=24), st.integers(1, 6))
def test_rates_of_idle_blocks_are_those_of_the_next(rates: list[float], every: int) -> None:
    given = torch.tensor(rates, dtype=torch.float64)
    found = concentrated(given, every)
    assert (found[idle_blocks(len(rates), every)] == 0).all()
    last = (len(rates) - 1) // every * every
    torch.testing.assert_close(found.cumsum(0)[::every], given.cumsum(0)[::every])
    assert float(found.sum()) == pytest.approx(float(given[: last + 1].sum()))
    if every == 1:
        torch.testing.assert_close(found, given)


def test_a_broken_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, batches = model_and_batches()
    ltmp.learn(whole, batches, TARGET, every=2, **FEW)

    def stop(step: Any) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    run: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "save_every": 2, **FEW}
    broken, batches = model_and_batches()
    with pytest.raises(KeyboardInterrupt):
        ltmp.learn(broken, batches, TARGET, every=2, on_step=stop, **run)
    again, batches = model_and_batches()
    with pytest.raises(LTMPError, match=r"other settings \(every 2, now None\)"):
        ltmp.learn(again, batches, TARGET, **run)
    ltmp.learn(again, batches, TARGET, every=2, **run)
    assert torch.equal(again.ltmp.merge, whole.ltmp.merge)
    assert torch.equal(again.ltmp.prune, whole.ltmp.prune)


@pytest.mark.parametrize("every", [0, -1, DEPTH])
@pytest.mark.parametrize("way", WAYS)
def test_what_leaves_no_blocks_is_refused(way: Callable[..., None], every: int) -> None:
    model, batches = model_and_batches()
    with pytest.raises(UsageError, match=rf"every is {every}: expected .* 1 \(all do\) to 5 in this model of 6"):
        way(model, batches, every)
    assert not any(map(any, model.ltmp.active()))


def test_the_papers_recipe_has_no_such_thing() -> None:
    model, batches = model_and_batches(tau=0.5)
    with pytest.raises(UsageError, match="removes tokens in every block"):
        ltmp.learn(model, batches, TARGET, recipe="paper", every=2, **FEW)
