"""One run gives thresholds for every budget, each at its recorded cost, and a killed run ends like a complete one."""

from __future__ import annotations

import math
from dataclasses import astuple
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import ltmp
from helpers import random_images, tiny_vit
from ltmp.config import MATCHINGS, Scores
from ltmp.data import make_loader
from ltmp.errors import LTMPError, UsageError
from ltmp.learning import calibrate
from ltmp.learning import dial as module
from ltmp.learning.options import DialOptions
from ltmp.learning.schedule import DEFAULT_SHAPES, Shape, adapted_shape, default_shape, interpolated
from ltmp.learning.search import evolve
from ltmp.learning.start import SCORED

SETTINGS = {"knots": 5, "views": 0, "calibration": 48, "checked": 0}


def model_and_images(**settings: object) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, None]]]:
    model = ltmp.attach(tiny_vit(depth=4, img_size=32), **settings)
    return model, [(part, None) for part in random_images(48, size=32).split(16)]


def deployed(model: torch.nn.Module, batches: list[tuple[torch.Tensor, None]]) -> float:
    with ltmp.record() as calls, torch.inference_mode():
        for images, _ in batches:
            model(images)
    return float(calls.share().mean())


@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
def test_every_budget_costs_what_was_asked(variant: str) -> None:
    model, batches = model_and_images(config=ltmp.LTMPConfig(variant=variant))
    result = ltmp.learn_dial(model, batches, 0.55, 0.9, **SETTINGS)
    dial = model.ltmp.dial
    # each row says what these very images cost with it
    for share in dial.share.tolist():
        model.ltmp.set_budget(share)
        assert deployed(model, batches) == pytest.approx(share, abs=1e-5)
    assert dial.lowest == pytest.approx(0.55, abs=0.03)
    assert dial.highest == pytest.approx(0.9, abs=0.03)
    assert len(result.divergence) == len(dial.share)
    assert len(result.shapes) == module.ANCHORS


def test_shares_are_corrected_by_more_images() -> None:
    model, few = model_and_images()
    batches = [*few, *((part, None) for part in random_images(96, size=32, seed=9).mul(0.3).split(16))]
    ltmp.learn_dial(model, batches, 0.55, 0.9, **{**SETTINGS, "checked": 0})

    def misses() -> list[float]:
        found = []
        for share in model.ltmp.dial.share.tolist():
            model.ltmp.set_budget(share)
            found.append(abs(deployed(model, batches) - share))
        return found

    before = misses()
    assert min(before) > 0.004
    result = ltmp.learn_dial(model, batches, 0.55, 0.9, **{**SETTINGS, "checked": 1000})
    # three rows were looked at, and all others moved with them
    assert sorted(misses())[2] < 1e-5
    assert result.views == 48 * (1 + 6 + 5) + 3 * 144


def test_a_source_that_does_not_say_its_length_is_checked_on() -> None:
    class Streaming(list[Any]):
        images = 0

    model, few = model_and_images()
    more = [(part, None) for part in random_images(48, size=32, seed=9).split(16)]
    result = ltmp.learn_dial(model, Streaming([*few, *more]), 0.55, 0.9, **{**SETTINGS, "checked": 96})
    assert result.views == 48 * (1 + 6 + 5) + 3 * 96


def test_a_dial_needs_no_gradients_and_leaves_the_weights_alone() -> None:
    model, batches = model_and_images()
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("ltmp.")}
    ltmp.learn_dial(model, batches, 0.6, 0.9, **SETTINGS)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_searching_never_ends_behind_the_default_shape() -> None:
    model, batches = model_and_images()
    views = 3 * 8 * 48 * 2
    result = ltmp.learn_dial(model, batches, 0.55, 0.9, **{**SETTINGS, "views": views})
    assert len(result.shapes) == module.ANCHORS
    images = torch.cat([images for images, _ in batches])
    maker = module._Maker(model, images, DialOptions(), None)
    for share, shape in result.shapes.items():
        assert maker.score(shape, share, slice(0, 48)) <= maker.score(default_shape(share), share, slice(0, 48)) + 1e-6
    assert any(shape != default_shape(share) for share, shape in result.shapes.items())
    assert result.views <= views + (6 + 5 + 2 * 3 + 1) * 48


def test_seeds_reproduce_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "views": 3 * 8 * 48}
    model, batches = model_and_images()
    whole = ltmp.learn_dial(model, batches, 0.55, 0.9, **settings)
    expected = model.ltmp.dial.tensors()

    model, _ = model_and_images()
    search, searched = module._Maker.search, []

    def killed(self, share, *args):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(share)
        return search(self, share, *args)

    monkeypatch.setattr(module._Maker, "search", killed)
    with pytest.raises(KeyboardInterrupt):
        ltmp.learn_dial(model, batches, 0.55, 0.9, checkpoint=tmp_path / "run.pt", **settings)
    monkeypatch.setattr(module._Maker, "search", lambda self, *a: searched.append(a[0]) or search(self, *a))
    again = ltmp.learn_dial(model, batches, 0.55, 0.9, checkpoint=tmp_path / "run.pt", **settings)
    assert len(searched) == 3
    assert again.shapes == whole.shapes
    found = model.ltmp.dial.tensors()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    with pytest.raises(LTMPError, match="other settings"):
        ltmp.learn_dial(model, batches, 0.6, 0.9, checkpoint=tmp_path / "run.pt", **settings)


def test_a_dial_takes_thirty_thousand_views_at_most() -> None:
    default = DialOptions()
    generation = module.ANCHORS * module.POPULATION * SCORED
    # views are rounded to whole generations
    assert generation * round(default.views / generation) - default.views + module.max_views(default, 10**6) <= 30_000


def test_evolution_finds_a_shape() -> None:
    wanted = torch.tensor([0.6, -0.5, -1.0, 1.5, 0.5])

    def judge(shape: Shape) -> float:
        return float((torch.tensor([*vars(shape).values()]) - wanted).square().sum())

    start = default_shape(0.5)
    found = evolve(judge, start, 25, torch.Generator().manual_seed(0))
    assert judge(found) < 0.02 < judge(start)


def test_shapes_between_and_beyond_budgets() -> None:
    shapes = DEFAULT_SHAPES["bipartite"]
    (first, low), (second, high) = list(shapes.items())[:2]
    assert interpolated(shapes, 0.1) == low
    assert interpolated(shapes, 0.99) == shapes[max(shapes)]
    middle = interpolated(shapes, (first + second) / 2)
    assert middle.prune_slope == pytest.approx((low.prune_slope + high.prune_slope) / 2)
    schedule = low.schedule(12, ("merge", "prune"), last_free=True)
    assert math.isinf(schedule.prune[-1])
    assert schedule.merge[-1] == 0


def test_shapes_are_searched_closer_together_at_small_budgets() -> None:
    first, second, third = module.anchors_of(0.3, 0.95)
    assert 0.3 < first < 0.37, "what is found is moved to smaller budgets as it is, so that they have to be near"
    assert second - first < third - second
    assert third < 0.95


@pytest.mark.parametrize("matching", MATCHINGS)
def test_default_shapes_depend_on_the_matching(matching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltmp.attach(tiny_vit(depth=4, img_size=32), ltmp.LTMPConfig(scores=Scores(matching=matching)))
    images, followed = random_images(4, size=32), []
    calibrating = import_module("ltmp.learning.calibrate")
    monkeypatch.setattr(calibrating, "follow", lambda model, images, shape, *_, **__: followed.append(shape))
    share = min(DEFAULT_SHAPES[matching])
    calibrate(model, images, share)
    assert followed == [DEFAULT_SHAPES[matching][share]]
    assert module._Maker(model, images, DialOptions(), None).default_shape(share) == DEFAULT_SHAPES[matching][share]
    assert default_shape(share, "mutual") != default_shape(share, "bipartite")


def test_beyond_what_was_searched_the_default_shape_moves_as_it_did_there() -> None:
    move = Shape(0.1, -0.2, 0.3, -0.4, 0.5)
    found = {0.45: default_shape(0.45).plus(move), 0.6: default_shape(0.6)}
    for share, part in {0.3: 1.0, 0.45: 1.0, 0.525: 0.5, 0.6: 0.0, 0.9: 0.0}.items():
        expected = default_shape(share).plus(move, part)
        assert astuple(adapted_shape(default_shape, found, share)) == pytest.approx(astuple(expected)), share
    assert adapted_shape(default_shape, {}, 0.4) == default_shape(0.4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.9, "high": 0.5},
        {"low": 0},
        {"knots": 1},
        {"knots": 1000},
        {"calibration": 1},
        {"views": -1},
        {"seed": 2**64},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    model, batches = model_and_images()
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is "):
        ltmp.learn_dial(model, batches, **{**SETTINGS, **wrong})
    with pytest.raises(UsageError, match="out of reach"):
        ltmp.learn_dial(model, batches, 0.05, 0.9, **SETTINGS)
    assert model.ltmp.dial is None


@pytest.mark.parametrize("knots", [3, 5])
def test_progress_ends_at_all_there_is_to_do(knots: int) -> None:
    model, _ = model_and_images()
    loader = make_loader(TensorDataset(random_images(96, size=32), torch.zeros(96)), 16)
    seen: list[tuple[int, int, str]] = []
    settings = {"knots": knots, "views": 1000, "calibration": 32, "checked": 64}
    ltmp.learn_dial(model, loader, 0.55, 0.9, progress=lambda *report: seen.append(report), **settings)
    *_, before, last = seen
    assert before[0] == before[1] == last[0] == last[1]
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(seen[2:]))
