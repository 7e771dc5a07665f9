"""`ltmp.summary` and the repr of `model.ltmp` give the state of an attached model."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import attach_reducing, make_dial, random_images, tiny_vit
from ltmp.hosts.attach import thresholds_of


def test_summary_gives_settings_budget_and_tokens() -> None:
    images = random_images(4)
    model = attach_reducing(tiny_vit(), images)
    dial = make_dial(3)
    thresholds_of(model).set_dial(dial)
    model.ltmp.set_budget(0.6)
    found = ltmp.summary(model)
    assert (found.variant, found.scores, found.budget) == ("ltmp", "paper", 0.6)
    assert found.dial == (dial.lowest, dial.highest)
    assert found.tokens == pytest.approx(dial.kept_at(0.6).tolist())
    with ltmp.record() as calls:
        model(images)
    measured = ltmp.summary(model, images)
    assert measured.share == pytest.approx(calls.share().mean().item())
    assert measured.tokens == pytest.approx(calls.kept[0].float().mean(0).tolist())
    lines = str(measured).splitlines()
    assert "budget    0.6" in lines
    assert lines[-4].split() == ["block", "merge", "prune", "tokens"]
    assert lines[-1].split()[0] == "3"


def test_repr_shows_metadata_until_the_thresholds_change(tmp_path) -> None:
    model = attach_reducing(tiny_vit(), random_images(4))
    ltmp.save(model, tmp_path / "t.safetensors", target=0.6, share=0.598)
    ltmp.load(model, tmp_path / "t.safetensors")
    assert repr(model.ltmp) == "Thresholds(ltmp, scores=paper, depth=3, target=0.6, share=0.598)"
    assert ltmp.summary(model).target == 0.6
    model.ltmp.set(merge=torch.full((3,), 0.9))
    assert "target" not in repr(model.ltmp)
    thresholds_of(model).set_dial(make_dial(3))
    assert repr(model.ltmp) == "Thresholds(ltmp, scores=paper, depth=3, dial=0.3 to 0.95)"
    model.ltmp.set_budget(0.6)
    assert "budget=0.6, tokens=[10, 7, 3]" in repr(model.ltmp)
    assert repr(model.ltmp) in repr(model)


def test_fixed_rates_have_a_summary_too() -> None:
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant="m", r=2))
    assert repr(model.ltmp) == "Rates(m, r=2, depth=3)"
    found = ltmp.summary(model, random_images(2))
    assert found.merge is None
    assert found.tokens == (15.0, 13.0, 11.0)
    with pytest.raises(ltmp.LTMPError, match="nothing is attached"):
        ltmp.summary(tiny_vit())
