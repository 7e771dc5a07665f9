"""On a CPU `auto` runs dense if reduction does not pay, unless the caller relies on reduced outputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import ltmp
from helpers import assert_close, attach_reducing, random_images, run_recorded, tiny_vit
from ltmp.engines import packed, trial
from ltmp.engines.body import Body
from ltmp.hosts.attach import attachment

CALLS = trial.FIRST + trial.PAIRS
MARGIN = trial.MARGIN  # as it is before the fixture of all tests changes it


class Clock:
    """A clock that advances only by the fixed durations of wrapped calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.now += seconds
            return call(*args)

        return timed


def set_durations(monkeypatch: pytest.MonkeyPatch, *, reduced: float, dense: float) -> None:
    """Fix the duration of reduced and dense calls."""
    clock = Clock()
    monkeypatch.setattr(trial, "MARGIN", MARGIN)
    monkeypatch.setattr(trial, "perf_counter", clock)
    monkeypatch.setattr(packed, "run", clock.takes(reduced, packed.run))
    monkeypatch.setattr(Body, "dense_blocks", clock.takes(dense, Body.dense_blocks))


def model_and_outputs() -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model, images, and its reduced and dense outputs."""
    images = random_images(3)
    model = attach_reducing(tiny_vit(), images)
    with torch.inference_mode():
        reduced, _ = run_recorded(model, images)
        with ltmp.dense():
            dense = model(images)
    assert (reduced - dense).abs().max() > 1e-3
    return model, images, reduced, dense


@torch.inference_mode()
def test_dense_runs_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, images, reduced, dense = model_and_outputs()
    set_durations(monkeypatch, reduced=1.2, dense=1.0)
    for _ in range(CALLS):
        assert_close(model(images), reduced, 1e-6)
    for _ in range(3):
        assert_close(model(images), dense, 1e-6)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "does not pay for batches of 3 on this CPU (1200.00 ms against 1000.00 ms dense): running dense" in message
    assert_close(copy.deepcopy(model)(images), reduced, 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("reduced_seconds", [0.6, 1.04])
def test_reduction_runs_where_it_pays_or_costs_no_more_than_noise(
    reduced_seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, images, reduced, _ = model_and_outputs()
    set_durations(monkeypatch, reduced=reduced_seconds, dense=1.0)
    for _ in range(CALLS + 2):
        assert_close(model(images), reduced, 1e-6)
    assert not caplog.records


@torch.inference_mode()
def test_other_shapes_and_thresholds_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, reduced, dense = model_and_outputs()
    set_durations(monkeypatch, reduced=2.0, dense=1.0)
    for _ in range(CALLS):
        model(images)
    assert_close(model(images), dense, 1e-6)
    assert_close(model(images[:2]), reduced[:2], 1e-5)
    model.ltmp.set([0.5] * 3, [0.04] * 3)
    assert (model(images) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["record", "trace", "unmerge", "gradients", "engine"])
def test_calls_that_rely_on_reduction_never_switch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, reduced, dense = model_and_outputs()
    set_durations(monkeypatch, reduced=2.0, dense=1.0)
    with torch.inference_mode():
        for _ in range(CALLS):
            model(images)
        assert_close(model(images), dense, 1e-6)
    if how == "engine":
        model.ltmp.config = replace(model.ltmp.config, engine="packed")
    inside = {"record": ltmp.record, "trace": ltmp.trace, "unmerge": ltmp.unmerge}.get(how)
    with torch.set_grad_enabled(how == "gradients"):
        if inside is None:
            found = model(images)
        else:
            with inside():
                found = model(images)
    assert_close(found.detach(), reduced, 1e-5)


@torch.inference_mode()
def test_few_trials_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_MAX_TRIALS", 2)
    model, images, _, _ = model_and_outputs()
    for count in (1, 2, 3):
        model(images[:count])
    assert len(trial._TRIALS[attachment(model).host].by_kind) == 2
