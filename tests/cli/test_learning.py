"""Runs of learn and dial: nothing that is finished is lost or done again, and nothing wrong is found out late."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import ltmp as package
from ltmp.checkpoint import read

LEARN = ("--views", 12, "--batch-size", 3, "--target", 0.7, "--out", "run")
DIAL = ("--low", 0.7, "--high", 0.9, "--target", 0.8, "--knots", 3, "--views", 0, "--batch-size", 3, "--out", "run")
VERBS = {
    "learn": (LEARN, "ltmp.cli.runs.evaluate", "learn"),
    "dial": (DIAL, "ltmp.evaluate.accuracy.evaluate_policies", "learn_dial"),
}


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize("verb", VERBS)
def test_what_was_learned_is_saved_before_it_is_evaluated(verb, ltmp, images, monkeypatch, capsys):
    options, evaluation, function = VERBS[verb]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, interrupted)
        assert ltmp(verb, "--data", images, *options) == 130
    assert "--resume to go on" in capsys.readouterr().err
    saved = read("run/thresholds.safetensors")
    assert ltmp(verb, "--data", images, *options) == 2
    assert "holds an interrupted run" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(package.learning, function, never)
        assert ltmp(verb, "--data", images, *options, "--resume", "--json", "result.json") == 0
    again = read("run/thresholds.safetensors")
    if verb == "learn":
        assert again.merge.tolist() == saved.merge.tolist()
        assert {"top1", "top1_dense"} <= again.metadata.keys()
        assert len(json.loads(Path("result.json").read_text())["history"]) == 4
    else:
        assert again.dial is not None
        assert len(again.metadata["budgets"]) == 1
    assert sorted(file.name for file in Path("run").iterdir()) == ["thresholds.safetensors"]


def test_a_run_with_other_settings_is_refused(ltmp, images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("ltmp.cli.runs.evaluate", interrupted)
        assert ltmp("learn", "--data", images, *LEARN) == 130
    capsys.readouterr()
    assert ltmp("learn", "--data", images, *LEARN, "--resume", "--seed", 3) == 1
    assert "other settings (seed 0, now 3)" in capsys.readouterr().err


def test_neither_tuned_weights_nor_their_evaluation_before_are_made_again(ltmp, images, monkeypatch, capsys):
    from ltmp.cli import runs

    evaluate, calls = runs.evaluate, []

    def second_is_interrupted(*args: object, **settings: object) -> object:
        calls.append(args)
        return interrupted() if len(calls) == 2 else evaluate(*args, **settings)

    monkeypatch.setattr(runs, "evaluate", second_is_interrupted)
    options = ("--data", images, *LEARN, "--tune", "norms")
    assert ltmp("learn", *options) == 130
    monkeypatch.setattr(package.learning, "learn", never)
    assert ltmp("learn", *options, "--resume") == 0
    assert len(calls) == 3
    about = read("run/thresholds.safetensors").metadata
    assert {"top1_dense", "top1_dense_tuned", "top1", "weights"} <= about.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        ("learn", *LEARN, "--target", 0.01),
        ("learn", *LEARN, "--target", 2),
        ("learn", *LEARN, "--num-classes", 5),
        ("learn", *LEARN, "--device", "cuda:99"),
        ("dial", *DIAL, "--low", 0.01),
        ("eval", "--thresholds", "gone"),
        ("compare", "--method", "ltmp", "--out", "run"),
    ],
    ids=lambda wrong: f"{wrong[0]} {wrong[-2]} {wrong[-1]}",
)
def test_failures_leave_no_folder(wrong, ltmp, images, tmp_path):
    before = sorted(tmp_path.iterdir())
    verb, *options = wrong
    assert ltmp(verb, "--data", images, *options) in (1, 2)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_says_what_would_be_done(verb, ltmp, images, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert ltmp(verb, "--data", images, *VERBS[verb][0], "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 4
    assert "would report accuracy" in said.out
    assert "on 6 images" in said.out
    assert "would write run/thresholds.safetensors" in said.out
    assert " s on cpu" in said.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", VERBS)
def test_without_evaluation(verb, ltmp, images, monkeypatch):
    options, evaluation, _ = VERBS[verb]
    monkeypatch.setattr(evaluation, never)
    assert ltmp(verb, "--data", images, *options, "--no-eval") == 0
    assert "top1" not in read("run/thresholds.safetensors").metadata


def test_a_limit_takes_all_classes(ltmp, images, capsys):
    assert ltmp("learn", "--data", images, *LEARN, "--limit", 3, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "of 3, in" in said
    assert "on 3 images" in said


def test_parts_of_other_classes_are_named(ltmp, images, capsys):
    (images / "val" / "cow").rename(images / "val" / "dog")
    assert ltmp("learn", "--data", images, *LEARN) == 1
    said = capsys.readouterr().err
    assert "its validation part lacks 1 of the classes (cow)" in said


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["app"], "gradio", "app"),
        (["demo"], "mlxtend", "demo"),
        (["export", "--thresholds", "x"], "onnxruntime", "export"),
        (["eval", "--data", "x", "--thresholds", "x", "--engine", "openvino"], "openvino", "export"),
        (["compare", "--data", "x", "--model", "x", "--method", "m"], "matplotlib", "plot"),
        (["report", "x.json"], "jinja2", "report"),
        (["learn", "--data", "x", "--model", "x", "--tune", "lora"], "peft", "tune"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_missing_package_is_found_out_first(arguments, package, extra, monkeypatch, tmp_path, capsys):
    from ltmp.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert f"needs the package '{package}'" in said
    assert f"ltmp[{extra}]" in said
    assert list(tmp_path.iterdir()) == []
