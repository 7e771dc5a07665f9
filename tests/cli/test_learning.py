"""Runs of learn and dial: nothing that is finished is lost or done again, and nothing wrong is found out late."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    ("other", "said"),
    [(("--seed", 3), "seed 0, now 3"), (("--limit", 3), "limit None, now 3"), (("--amp",), "amp False, now True")],
)
def test_a_run_with_other_settings_is_refused(other, said, ltmp, images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("ltmp.cli.runs.evaluate", interrupted)
        assert ltmp("learn", "--data", images, *LEARN) == 130
    capsys.readouterr()
    assert ltmp("learn", "--data", images, *LEARN, "--resume", *other) == 1
    assert f"other settings ({said})" in capsys.readouterr().err


def other_weights(images: Path, weights: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(weights).items()}, "other.safetensors")


def other_images(images: Path, weights: Path) -> None:
    for file in images.rglob("*.png"):
        colour = (ord(file.parent.name[0]), 99 * int(file.stem), 0)
        Image.new("RGB", (80, 60), colour).save(file)


def other_thresholds(images: Path, weights: Path) -> None:
    tensors = load_file("run/thresholds.safetensors")
    save_file({name: value * 0.99 for name, value in tensors.items()}, "run/thresholds.safetensors")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_weights, "is of a run with other weights"),
        (other_images, "is of a run with other images"),
        (other_thresholds, "run/thresholds.safetensors is not of the run"),
    ],
)
def test_a_run_of_something_else_is_refused(verb, change, said, ltmp, images, weights, monkeypatch, capsys):
    options, evaluation, _ = VERBS[verb]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, interrupted)
        assert ltmp(verb, "--data", images, *options) == 130
    # learning is done, and what it saved on its way is gone or of no more use
    Path("run/run.pt").unlink(missing_ok=True)
    change(images, weights)
    capsys.readouterr()
    own = ("--weights", "other.safetensors") if change is other_weights else ()
    if own:
        record = Path("run/run.json")
        record.write_text(record.read_text().replace(str(weights), "other.safetensors"))
    assert ltmp(verb, "--data", images, *options, "--resume", *own) == 1
    assert said in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
from ltmp.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_share_a_folder(ltmp, images, tmp_path, capsys):
    Path("run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert ltmp("learn", "--data", images, *LEARN) == 1
        assert "another run is writing to run: wait for it" in capsys.readouterr().err
    finally:
        other.kill()
        other.communicate()


def test_an_earlier_file_is_replaced_with_a_word(ltmp, images, capsys):
    how = ("--data", images, *LEARN, "--no-eval", "--views", 0)
    assert ltmp("learn", *how) == 0
    assert "replaced" not in capsys.readouterr().err
    assert ltmp("learn", *how) == 0
    assert "replaced run/thresholds.safetensors of an earlier run" in capsys.readouterr().err


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
    assert "views of 3 images" in said
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
