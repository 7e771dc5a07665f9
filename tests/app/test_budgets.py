"""What the slider does to the thresholds."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import make_dial, random_images, tiny_vit
from ltmp.app import Budgets
from ltmp.errors import LTMPError, UsageError


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


@pytest.fixture
def dialled(model, tmp_path):
    model.ltmp.set_dial(make_dial(3))
    model.ltmp.set_budget(0.5)
    ltmp.save(model, tmp_path / "dial.safetensors")
    return tmp_path / "dial.safetensors"


def test_a_dial_needs_neither_samples_nor_mixing(dialled):
    model = tiny_vit()
    budgets = Budgets.from_files(model, [dialled])
    assert (budgets.lowest, budgets.start) == (0.3, 0.6)
    for share, set_to in ((0.55, 0.55), (1.0, 1.0), (0.1, 0.3), (0.98, 0.95)):
        budgets.set(share)
        assert model.ltmp.budget == set_to
    assert "every budget from 0.30 to 0.95" in budgets.explain()


def test_a_slider_begins_where_it_is_told_to(files, dialled):
    assert Budgets.from_files(tiny_vit(), [dialled], start=0.4).start == 0.4
    assert Budgets.from_files(tiny_vit(), files, start=0.7).start == 0.7
    with pytest.raises(UsageError, match=r"budget 0\.2: these thresholds go from 0\.3 to 1"):
        Budgets.from_files(tiny_vit(), [dialled], start=0.2)


def test_a_dial_stands_alone(files, dialled):
    with pytest.raises(UsageError, match="has a dial for every budget: give it alone"):
        Budgets.from_files(tiny_vit(), [*files, dialled])


def test_neither_is_refused(model, tmp_path):
    with pytest.raises(LTMPError, match="which thresholds"):
        Budgets(model, {})
    ltmp.save(model, tmp_path / "silent.safetensors")
    with pytest.raises(LTMPError, match="does not say which share"):
        Budgets.from_files(model, [tmp_path / "silent.safetensors"])
