"""Settings of an attached model: validated, frozen, named, and read from files of earlier versions."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ltmp
from helpers import make_probe, tiny_vit
from ltmp.checkpoint import read
from ltmp.config import FIXED, LEARNED, SCORES, VARIANTS, LTMPConfig, Scores
from ltmp.errors import LTMPError
from ltmp.hosts.attach import thresholds_of
from ltmp.method.scores import Signals, importance
from ltmp.method.thresholds import Thresholds
from ltmp.method.tokens import Tokens
from ltmp.ops.match.reference import similarity_metric


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"variant": "ltxp"}, "unknown variant 'ltxp': expected one of ltmp, ltpm, ltm, ltp"),
        ({"variant": ["ltmp"]}, "unknown variant"),
        ({"engine": "warp"}, "expected one of auto"),
        ({"schedule": "rising"}, "expected one of constant, decreasing"),
        ({"scores": "worst"}, "unknown scores 'worst': expected one of paper, attention, best, or a Scores value"),
        ({"scores": 0.1}, "unknown scores 0.1"),
        ({"tau": 0.0}, "tau must be a positive number"),
        ({"tau": math.nan}, "tau must be a positive number"),
        ({"tau": "warm"}, "tau must be a positive number, got 'warm'"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"floor": -1}, "expected 0 <= floor <= ceiling"),
        ({"floor": 5, "ceiling": 4}, "expected 0 <= floor <= ceiling"),
        ({"ceiling": 0}, "expected 0 <= floor <= ceiling, ceiling > 0"),
        ({"floor": "few"}, "expected 0 <= floor <= ceiling"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        LTMPConfig(**values)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"similarity": "values"}, "unknown similarity 'values': expected one of mean, heads, probe"),
        ({"matching": "values"}, "unknown matching 'values': expected one of bipartite, mutual"),
        ({"importance": "values"}, "unknown importance 'values': expected one of received, probe"),
        ({"importance": None}, "unknown importance None"),
        ({"size_power": -0.1}, "size_power must be between 0 and 1"),
        ({"size_power": math.nan}, "size_power must be between 0 and 1"),
        ({"class_power": 1.5}, "class_power must be between 0 and 1"),
        ({"class_power": "half"}, "class_power must be between 0 and 1, got 'half'"),
    ],
)
def test_scores_are_checked(values: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        Scores(**values)


def test_unknown_kinds_are_refused_where_they_are_computed() -> None:
    """Rather than falling back to another kind."""
    with pytest.raises(ValueError, match="unknown similarity of keys 'probe': expected mean or heads"):
        similarity_metric(torch.rand(3, 2, 4), "probe")
    scores = Scores()
    object.__setattr__(scores, "importance", "values")
    thresholds = Thresholds(1, LTMPConfig())
    object.__setattr__(thresholds.config, "scores", scores)
    with pytest.raises(ValueError, match="unknown importance 'values'"):
        importance(thresholds, 0, Signals(Tokens.start(1, 3, torch.device("cpu"))))


def test_settings_are_frozen_and_travel() -> None:
    config = LTMPConfig(variant="ltm", tau=0.3)
    assert LTMPConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, engine="packed").tau == 0.3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tau = 0.5  # type: ignore[misc]
    with pytest.raises(ValueError, match="newer version"):
        LTMPConfig.from_dict({"variant": "ltm", "colour": "red"})
    with pytest.raises(ValueError, match="newer version"):
        LTMPConfig.from_dict({"scores": {"similarity": "mean", "colour": "red"}})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        LTMPConfig(colour="red")


@pytest.mark.parametrize("name", SCORES)
def test_scores_go_by_name_where_they_have_one(name: str) -> None:
    config = LTMPConfig(scores=name)
    assert config == LTMPConfig(scores=SCORES[name])
    assert str(config.scores) == config.scores.name == name
    written = config.to_dict()
    # the default is left out, so that earlier versions read it
    assert written.get("scores", "paper") == name
    assert LTMPConfig.from_dict(json.loads(json.dumps(written))) == config


def test_unnamed_scores_are_written_in_full() -> None:
    scores = Scores("heads", class_power=0.25)
    assert scores.name is None
    assert str(scores) == "Scores(similarity='heads', class_power=0.25)"
    config = LTMPConfig(scores=scores)
    assert config.to_dict()["scores"] == dataclasses.asdict(scores)
    assert LTMPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_travels_with_its_own_importance(variant: str) -> None:
    rates = {"r": 3} if variant in FIXED else {}
    for scores in (Scores(), Scores(size_power=0.5)):
        config = LTMPConfig(variant, scores, **rates)
        assert LTMPConfig.from_dict(config.to_dict()) == config
        assert replace(config, engine="packed").scores == config.scores
        assert config.scores.importance == (VARIANTS[variant].importance or "received")
    assert "scores" not in LTMPConfig(variant, **rates).to_dict()


@pytest.mark.parametrize("variant", LEARNED)
@pytest.mark.parametrize("importance", ["class", "random"])
def test_importance_of_fixed_rates_is_not_learned(variant: str, importance: str) -> None:
    with pytest.raises(
        ValueError, match=f"importance {importance!r} is for variants of fixed rates: {variant} prunes by"
    ):
        LTMPConfig(variant, Scores(importance=importance))


def test_fixed_rates_have_their_own_matching_and_importance() -> None:
    for scores in (Scores(matching="mutual"), Scores(importance="probe"), SCORES["attention"]):
        with pytest.raises(ValueError, match="matching and importance are for ltmp, ltpm, ltm, ltp; topk has its own"):
            LTMPConfig("topk", scores, r=3)
    with pytest.raises(ValueError, match="similarity by a probe is for ltmp, ltpm, ltm, ltp; m has nothing learned"):
        LTMPConfig("m", Scores("probe"), r=3)


NEEDS: dict[str, tuple[LTMPConfig, bool, bool]] = {
    "paper": (LTMPConfig(), False, False),
    "attention": (LTMPConfig(scores="attention"), True, False),
    "attention, merging": (LTMPConfig("ltm", "attention"), True, False),
    "attention, pruning": (LTMPConfig("ltp", "attention"), True, False),
    "best": (LTMPConfig(scores="best"), False, True),
    "best, merging": (LTMPConfig("ltm", "best"), False, True),
    "best, pruning": (LTMPConfig("ltp", "best"), False, True),
    "probe for merging alone, pruning": (LTMPConfig("ltp", Scores("probe")), False, False),
    "probe for pruning alone, merging": (LTMPConfig("ltm", Scores(importance="probe")), False, False),
    "class power beside a probe's importance, pruning": (
        LTMPConfig("ltp", Scores(importance="probe", class_power=0.5)), False, True
    ),
    "topk": (LTMPConfig("topk", r=1), True, False),
    "m": (LTMPConfig("m", r=1), False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_what_scores_need(name: str) -> None:
    config, attention, probe = NEEDS[name]
    assert config.needs_class_attention == attention
    assert config.needs_probe == probe
    assert not config.scores.needs_received(("merge",))
    assert config.scores.needs_received(("merge", "prune")) == (config.variant != "topk")


# -- settings of earlier versions

FORMER: dict[str, tuple[dict[str, Any], Scores]] = {
    "paper": ({}, SCORES["paper"]),
    "the paper's, written out": (
        {"similarity": "mean", "matching": "bipartite", "importance": None, "size_power": 1.0, "class_power": 0.0},
        SCORES["paper"],
    ),
    "similarity": ({"similarity": "heads"}, Scores("heads")),
    "matching": ({"matching": "mutual"}, Scores(matching="mutual")),
    "importance": ({"importance": "probe"}, Scores(importance="probe")),
    "importance received": ({"importance": "received"}, SCORES["paper"]),
    "size_power": ({"size_power": 0.3}, Scores(size_power=0.3)),
    "class_power": ({"class_power": 0.5}, Scores(class_power=0.5)),
    "attention": (
        {"similarity": "heads", "matching": "mutual", "size_power": 0.3, "class_power": 0.5}, SCORES["attention"]
    ),
    "best": (
        {"similarity": "probe", "matching": "mutual", "importance": "probe", "size_power": 0.3}, SCORES["best"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (settings, _) in FORMER.items() if settings])
def test_former_keyword_arguments_still_work(name: str) -> None:
    settings, scores = FORMER[name]
    with pytest.warns(DeprecationWarning, match=r"LTMPConfig\(.*=\.\.\.\) is deprecated: use scores=") as warned:
        config = LTMPConfig(variant="ltpm", **settings)
    assert config == LTMPConfig("ltpm", scores)
    assert warned[0].filename == __file__
    assert (scores.name or repr(scores)) in str(warned[0].message)


def test_the_former_temperature_is_ignored_and_best_is_a_name() -> None:
    with pytest.warns(DeprecationWarning, match="leave out prune_tau, which has no effect any more"):
        assert LTMPConfig(prune_tau=0.25) == LTMPConfig()
    with pytest.warns(DeprecationWarning, match=r'use LTMPConfig\(scores="best"\)'):
        assert LTMPConfig.best(floor=3) == LTMPConfig(scores="best", floor=3)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert LTMPConfig.best(class_power=0.4).scores == replace(SCORES["best"], class_power=0.4)


def test_former_attributes_are_those_of_the_scores() -> None:
    config = LTMPConfig(scores="attention")
    for name, value in dataclasses.asdict(SCORES["attention"]).items():
        with pytest.warns(DeprecationWarning, match=f"use config.scores.{name}"):
            assert getattr(config, name) == value
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = config.colour


def former_file(path: Path, config: dict[str, Any]) -> Path:
    """A file as version 0.1 wrote it."""
    about = {"depth": 3, "config": {"variant": "ltmp", "tau": 0.1, "prune_tau": 0.5, "engine": "auto", **config}}
    tensors = {"merge": torch.full((3,), 0.5), "prune": torch.full((3,), 0.01), "probe": make_probe(3).half()}
    save_file(tensors, path, metadata={"format": "ltmp-thresholds", "ltmp": json.dumps(about)})
    return path


@pytest.mark.parametrize("name", FORMER)
def test_former_files_still_load(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    settings, scores = FORMER[name]
    path = former_file(tmp_path / "before.safetensors", settings)
    assert read(path).config == LTMPConfig(scores=scores)
    model = tiny_vit()
    ltmp.load(model, path)
    assert thresholds_of(model).config.scores == scores
    assert thresholds_of(model).merge.tolist() == [0.5] * 3
    ltmp.load(ltmp.attach(tiny_vit(), LTMPConfig(scores=scores)), path)
    # a file is not the caller's to change
    assert not [warning for warning in recwarn if warning.category is DeprecationWarning and "ltmp" in warning.filename]


def test_files_of_a_learned_class_importance_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = former_file(tmp_path / "before.safetensors", {"importance": "class"})
    with pytest.raises(LTMPError, match="importance='class', which is no longer supported: learn them again"):
        read(path)
    model = tiny_vit()
    with pytest.raises(LTMPError, match="no longer supported"):
        ltmp.load(model, path)
    assert not hasattr(model, "ltmp")
