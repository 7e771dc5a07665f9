"""What the slider does to the thresholds."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import random_images
from ltmp.app import Budgets
from ltmp.errors import LTMPError


def cost(model, images):
    with torch.inference_mode(), ltmp.record() as calls:
        model(images)
    return calls.share().mean().item()


def test_learned_budgets_are_taken_as_they_are(model, files):
    budgets = Budgets.from_files(model, files)
    for path, share in zip(files, (0.8, 0.6), strict=True):
        budgets.set(share)
        wanted = ltmp.checkpoint.read(path)
        assert torch.equal(model.ltmp.merge, wanted.merge)
        assert torch.equal(model.ltmp.prune, wanted.prune)
    assert (budgets.lowest, budgets.start) == (0.6, 0.6)
    assert "0.80, 0.60" in budgets.explain()


def test_one_is_dense_and_less_than_the_lowest_is_the_lowest(model, files):
    budgets = Budgets.from_files(model, files)
    budgets.set(1.0)
    assert cost(model, random_images(8)) == 1
    budgets.set(0.1)
    assert torch.equal(model.ltmp.merge, budgets.learned[0.6][0])


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_mixtures_cost_the_samples_what_was_asked_for(model, files, share):
    samples = random_images(32)
    Budgets.from_files(model, files, samples).set(share)
    assert cost(model, samples) == pytest.approx(share, abs=0.03)


def test_mixtures_lie_between(model, files):
    budgets = Budgets.from_files(model, files)
    budgets.set(0.7)
    (high, _), (low, _) = budgets.learned.values()
    assert torch.allclose(model.ltmp.merge, (high + low) / 2)


def test_without_files_thresholds_are_calibrated(model):
    samples = random_images(64)
    budgets = Budgets(model, {}, samples)
    budgets.set(0.6)
    assert cost(model, samples) == pytest.approx(0.6, abs=0.05)
    assert "calibrated" in budgets.explain()


def test_neither_is_refused(model, tmp_path):
    with pytest.raises(LTMPError, match="which thresholds"):
        Budgets(model, {})
    ltmp.save(model, tmp_path / "silent.safetensors")
    with pytest.raises(LTMPError, match="does not say which share"):
        Budgets.from_files(model, [tmp_path / "silent.safetensors"])
