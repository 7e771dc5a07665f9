"""Learning: only thresholds change, the budget is met, and a killed run ends like an uninterrupted one."""

from __future__ import annotations

import inspect
from dataclasses import fields
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import ltmp
from helpers import random_images, tiny_vit
from ltmp.config import MATCHINGS, Scores
from ltmp.errors import LTMPError, UsageError
from ltmp.hosts.attach import thresholds_of
from ltmp.learning import calibrate, heldout
from ltmp.learning.answers import dense_answers
from ltmp.learning.budget import lowest_share
from ltmp.learning.heldout import HeldOut
from ltmp.learning.options import DialOptions, DialSettings, LearnOptions, LearnSettings
from ltmp.learning.schedule import default_shape
from ltmp.method.flops import Geometry, flops_share

TARGET = 0.65
SETTINGS = {"views": 96, "calibration": 48}


def model_and_batches(**kwargs: object) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = tiny_vit(depth=4, **kwargs)
    images = random_images(96)
    with torch.no_grad():
        labels = model(images).argmax(-1)
    return ltmp.attach(model), list(zip(images.split(16), labels.split(16), strict=True))


@pytest.mark.parametrize("distill", [False, True], ids=["labels", "distilled"])
@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
def test_meets_the_budget_on_other_images(variant: str, distill: bool) -> None:
    model, batches = model_and_batches()
    ltmp.attach(model, ltmp.LTMPConfig(variant=variant))
    target = 0.75 if variant == "ltm" else TARGET
    result = ltmp.learn(model, batches, target, distill=distill, **SETTINGS)
    assert abs(result.share - target) <= 0.01
    # 17 tokens a block: other images scatter more than those of a real model
    assert abs(HeldOut(model, random_images(128, seed=1), 64).share() - target) <= 0.04


def test_only_the_thresholds_change() -> None:
    model, batches = model_and_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ltmp.learn(model, batches, TARGET, **SETTINGS)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"ltmp.merge", "ltmp.prune"}
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not model.training
    assert not model.ltmp.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_move_both_thresholds_of_every_block_that_may_move() -> None:
    model, batches = model_and_batches()
    calibrate(model, torch.cat([images for images, _ in batches]), TARGET)
    start = {name: value.detach().clone() for name, value in thresholds_of(model).named_parameters()}
    ltmp.learn(model, batches, TARGET, **SETTINGS)
    assert (model.ltmp.merge != start["merge"])[:-1].all()
    assert (model.ltmp.prune != start["prune"])[:-1].all()
    # nothing reads the patches after the last attention of a class-token model: there it stays at "drop all"
    assert model.ltmp.prune[-1] == 1


def test_views_steps_and_progress_are_counted() -> None:
    model, batches = model_and_batches()
    seen = []
    result = ltmp.learn(model, batches, TARGET, views=64, calibration=32, accumulate=2, on_step=seen.append)
    assert [step.step for step in seen] == [1, 2]
    assert all(step.steps == 2 and step.loss > 0 and 0 < step.share < 1 for step in seen)
    # the dense model, a start with and one without pruning, and calibration; then some looks at each candidate
    assert 64 + 8 * 32 <= result.views <= 64 + 26 * 32
    assert result.history == seen


def test_progress_reaches_the_end_of_each_stage() -> None:
    model, batches = model_and_batches()
    seen: list[tuple[int, int, str]] = []
    ltmp.learn(model, batches, TARGET, views=32, calibration=32, progress=lambda *report: seen.append(report))
    stages = [list(reports) for _, reports in groupby(seen, key=lambda report: report[2])]
    assert [stage[0][2].split()[0] for stage in stages] == ["reading", "meeting", "learning,", "learning,", "meeting"]
    assert seen[:2] == [(16, 32, stages[0][0][2]), (32, 32, stages[0][0][2])]
    assert [report[:2] for stage in stages[2:4] for report in stage] == [(1, 2), (2, 2)]
    for meeting in (stages[1], stages[4]):
        assert all(0 < done <= total == 12 * 32 for done, total, _ in meeting)
        assert meeting[-1][0] == 12 * 32


@pytest.mark.parametrize(
    ("asked", "terminal", "drawn"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_a_bar_is_drawn_where_somebody_looks(
    asked: bool | None, terminal: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, views=32, calibration=32, progress=asked)
    assert ("meeting the budget" in capsys.readouterr().err) is drawn


def test_the_dense_model_looks_at_the_images_kept_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = []
    monkeypatch.setattr(heldout, "dense_answers", lambda by, x, judge: taught.append(x) or dense_answers(by, x, judge))
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, **SETTINGS)
    assert torch.equal(torch.cat(taught), torch.cat([images for images, _ in batches])[:48])


@pytest.mark.parametrize(("every", "saved"), [(2, [2, 4, 6]), (4, [4, 6])])
def test_the_run_is_saved_every_few_steps_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, saved: list[int]
) -> None:
    found = []
    monkeypatch.setattr("ltmp.learning.options.save_run", lambda path, settings, state: found.append(state["step"]))
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, checkpoint=tmp_path / "run.pt", save_every=every, **SETTINGS)
    assert found == saved


def test_accumulated_batches_are_one_large_batch() -> None:
    ends = []
    for accumulate in (1, 2):
        model, batches = model_and_batches()
        if accumulate == 1:
            pairs = zip(batches[::2], batches[1::2], strict=True)
            batches = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]
        ltmp.learn(model, batches, TARGET, views=32, calibration=32, accumulate=accumulate, budget_weight=0.0)
        ends.append(model.ltmp.merge.detach().clone())
    assert (ends[0] - ends[1]).abs().max() < 1e-4


class Killed(BaseException):
    """What no handler in the loop may swallow."""


@pytest.mark.parametrize("signal", [KeyboardInterrupt, Killed], ids=["ctrl-c", "killed"])
def test_a_broken_run_ends_where_an_unbroken_one_does(tmp_path, signal: type[BaseException]) -> None:  # type: ignore[no-untyped-def]
    whole, batches = model_and_batches()
    ltmp.learn(whole, batches, TARGET, checkpoint=tmp_path / "whole.pt", save_every=2, **SETTINGS)

    def stop(step) -> None:  # type: ignore[no-untyped-def]
        if step.step == 5:
            raise signal

    broken, batches = model_and_batches()
    run = tmp_path / "run.pt"
    with pytest.raises(signal):
        ltmp.learn(broken, batches, TARGET, checkpoint=run, save_every=2, on_step=stop, **SETTINGS)
    broken, batches = model_and_batches()
    result = ltmp.learn(broken, batches, TARGET, checkpoint=run, save_every=2, **SETTINGS)
    assert [step.step for step in result.history] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(broken.ltmp.merge, whole.ltmp.merge)
    assert torch.equal(broken.ltmp.prune, whole.ltmp.prune)


def test_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, checkpoint=tmp_path / "run.pt", **SETTINGS)
    with pytest.raises(LTMPError, match=r"other settings \(target 0.65, now 0.7\)"):
        ltmp.learn(model, batches, 0.7, checkpoint=tmp_path / "run.pt", **SETTINGS)
    (tmp_path / "run.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:1000])
    with pytest.raises(LTMPError, match="truncated or not a learning run"):
        ltmp.learn(model, batches, TARGET, checkpoint=tmp_path / "run.pt", **SETTINGS)


@pytest.mark.parametrize("target", [0, 1, -0.5, 1.5, float("nan"), "half"])
def test_a_target_outside_the_open_interval_is_refused(target: object) -> None:
    model, batches = model_and_batches()
    with pytest.raises(UsageError, match="between 0 and 1"):
        ltmp.learn(model, batches, target, **SETTINGS)  # type: ignore[arg-type]


def test_a_target_out_of_reach_is_refused_with_the_least() -> None:
    model, batches = model_and_batches()
    with pytest.raises(UsageError, match=r"out of reach: .* ask for more than 0\.\d{3}"):
        ltmp.learn(model, batches, 0.05, **SETTINGS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_images_or_weights_is_said(bad: float) -> None:
    model, batches = model_and_batches()
    images = batches[0][0].clone()
    images[0, 0, 0, 0] = bad
    with pytest.raises(LTMPError, match="an image holds NaN or infinity"):
        ltmp.learn(model, [(images, batches[0][1])], TARGET, **SETTINGS)
    model, batches = model_and_batches()
    with torch.no_grad():
        model.head.weight[0, 0] = bad
    with pytest.raises(LTMPError, match="NaN or infinity"):
        ltmp.learn(model, batches, TARGET, **SETTINGS)


def test_no_images_and_nothing_attached_are_said() -> None:
    model, batches = model_and_batches()
    with pytest.raises(LTMPError, match="no images to learn from"):
        ltmp.learn(model, [], TARGET)
    with pytest.raises(LTMPError, match=r"call ltmp.attach\(model\) first"):
        ltmp.learn(ltmp.detach(model), batches, TARGET)


@pytest.mark.parametrize("matching", ["bipartite", "mutual"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_calibration_alone_is_near_the_budget(pool: str, matching: str) -> None:
    config = ltmp.LTMPConfig(scores=Scores(matching=matching))
    model = ltmp.attach(tiny_vit(depth=4, img_size=32, global_pool=pool), config)
    images = random_images(64, size=32)
    calibrate(model, images, 0.7)
    assert abs(HeldOut(model, images, 64).share() - 0.7) < 0.03
    # a pooled head reads every token: the last block may not drop all of them
    assert (model.ltmp.prune[-1] == 1) == (pool == "token")


def test_the_schedule_costs_the_target() -> None:
    geometry = Geometry(tokens=197, width=384, mlp_ratio=(4.0,) * 12)
    for target, matching in product((0.9, 0.6, 0.4, 0.3), MATCHINGS):
        for last_free in (False, True):
            schedule = default_shape(target, matching).schedule(12, ("merge", "prune"), last_free)
            kept = schedule.scaled_to(target, geometry, 1).kept(geometry, 1)
            assert float(flops_share(kept, geometry)) == pytest.approx(target, abs=1e-3)
            assert all(b <= a for a, b in pairwise(kept.tolist()))
    # the first block's attention, and from there on the class token alone
    first, alone, dense = 4 * 197 + 2 * 197**2 / 384, 4 + 2 / 384, 12 * 197 + 2 * 197**2 / 384
    assert lowest_share(geometry, 1) == pytest.approx((first + 11 * alone + 12 * 8) / (12 * dense), rel=1e-4)


def test_accuracy_survives_a_learned_half() -> None:
    """Labels are the dense model's own: after learning, most answers are still those."""
    model, batches = model_and_batches()
    ltmp.learn(model, batches, 0.6, **SETTINGS)
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.inference_mode():
        agreement = float((model(images).argmax(-1) == labels).float().mean())
    assert agreement >= 0.8


def test_learning_never_ends_behind_its_calibrated_start() -> None:
    model, batches = model_and_batches()
    images = torch.cat([images for images, _ in batches])[:48]
    calibrate(model, images, TARGET)
    HeldOut(model, images, 16).meet_budget(TARGET)
    start = {name: value.detach().clone() for name, value in thresholds_of(model).named_parameters()}
    # steps so large that what they learn is worthless
    ltmp.learn(model, batches, TARGET, lr=1000.0, **SETTINGS)
    assert torch.equal(model.ltmp.merge, start["merge"])
    assert torch.equal(model.ltmp.prune, start["prune"])


def test_no_views_is_the_calibrated_start() -> None:
    model, batches = model_and_batches()
    result = ltmp.learn(model, batches, TARGET, views=0, calibration=48)
    assert result.history == []
    assert abs(result.share - TARGET) <= 0.01
    assert result.views <= 48 * 13


def test_the_callers_random_numbers_stay() -> None:
    model, batches = model_and_batches()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ltmp.learn(model, batches, TARGET, views=32, calibration=32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("function", "keywords", "settings"),
    [(ltmp.learn, LearnSettings, LearnOptions), (ltmp.learn_dial, DialSettings, DialOptions)],
    ids=["learn", "learn_dial"],
)
def test_keywords_are_shown_with_their_defaults(function: Any, keywords: Any, settings: Any) -> None:
    shown = inspect.signature(function).parameters
    assert {field.name: field.default for field in fields(settings)}.items() <= {
        name: one.default for name, one in shown.items()
    }.items()
    assert get_type_hints(keywords) == get_type_hints(settings)
    with pytest.raises(TypeError, match="eposh"):
        function(*model_and_batches(), eposh=3)
