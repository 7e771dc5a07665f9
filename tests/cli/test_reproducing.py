"""`ltmp reproduce`: every part once, whatever stops it; everything is checked first."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from ltmp.cli import main, reproduction
from ltmp.cli.options import RunOptions, as_arguments
from ltmp.cli.verbs import compare, reproduce
from ltmp.evaluate.published import published

from .conftest import MODEL

FEW = ("--budget", 0.8, "--budget", 0.7, "--views", 0, "--calibration", 6, "--batch-size", 2, "--no-speed")
PARTS = ["paper-0.8", "paper-0.7", "dial-paper", "dial-best", "compare-0.8", "compare-0.7", "certify"]
METHODS = ["paper's recipe", "dial, paper's scores", "dial, best scores", "fixed-rate merging"]


@pytest.fixture
def call(images, weights, monkeypatch, tmp_path):
    """Runs `ltmp reproduce imagenet` on the tiny model."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, data=images, model=MODEL, weights=weights, certify=0.5):
        own = [*model, "--weights", weights, "--device", "cpu", "--certify", certify, *FEW, *arguments]
        return main(["reproduce", "imagenet", str(data), *map(str, own)])

    return run


def done():
    return [name.partition("/")[2] for name in json.loads(Path("reproduce/run.json").read_text())["done"]]


def test_one_table_of_everything(call, capsys, tmp_path, monkeypatch):
    known = published("deit_small_patch16_224")
    monkeypatch.setattr("ltmp.cli.reproduction.published", lambda name: known)
    assert call("--json", "all.json") == 0
    streams = capsys.readouterr()
    assert "paper's recipe, 0.8" in streams.out
    assert "next: ltmp pack" in streams.err.splitlines()[-1]
    assert streams.err.count("next: ") == 1
    assert done() == PARTS
    told = json.loads(Path("all.json").read_text())
    assert told == json.loads(Path("reproduce/table.json").read_text())
    rows = told["rows"]
    here = [row["method"] for row in rows if row["source"] == "here"]
    small = "dense at 24 pixels"
    assert here == [
        "dense", *(f"{method}, 0.8" for method in METHODS), small, *(f"{method}, 0.7" for method in METHODS), small,
    ]  # fmt: skip
    for row in rows:
        assert row["drop"] == pytest.approx(rows[0]["top1"] - row["top1"]) or row["source"] != "here"
        assert row["trained_share"] is None or 0 < row["trained_share"] <= 1
    assert [row["trained_share"] is not None for row in rows[1:3]] == [True, False]
    others = rows[len(here) :]
    assert [(row["method"], row["source"], row["top1"]) for row in others] == [
        (row.method, row.source, row.top1) for row in known
    ]
    table = list(csv.DictReader(Path("reproduce/table.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert "| fixed-rate merging, 0.7 |" in Path("reproduce/table.md").read_text()
    (certified,) = told["certified"].values()
    assert certified["certificate"]["images"] == 6
    assert certified["paragraph"] in streams.out.replace("\n", " ")


@pytest.fixture
def calls(monkeypatch):
    """The verbs that run, each with whether it was resumed."""
    seen, whole = [], reproduction.call

    def call(arguments):
        seen.append((arguments[0], "--resume" in arguments))
        return whole(arguments)

    monkeypatch.setattr(reproduction, "call", call)
    return seen


def test_what_is_done_is_not_done_again(call, calls, capsys, monkeypatch):
    """Stopped in a learning run, which is saved, and in an evaluation, which is not."""
    from ltmp.learning.loop import _Job

    step = _Job._step

    def stop_after_one(job, weights):
        if job.run.step == 1:
            raise KeyboardInterrupt
        step(job, weights)

    with monkeypatch.context() as stopped:
        stopped.setattr(_Job, "_step", stop_after_one)
        assert call() == 130
    assert "interrupted in vit_tiny_patch16_224/paper-0.8: give the same command again" in capsys.readouterr().err
    with monkeypatch.context() as stopped:
        stopped.setattr(compare, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call() == 130
    assert done() == PARTS[:4]
    assert "interrupted in vit_tiny_patch16_224/compare-0.8" in capsys.readouterr().err
    assert [call for call in calls if call[0] == "learn"] == [("learn", False), ("learn", True), ("learn", False)]
    calls.clear()
    assert call() == 0
    assert done() == PARTS
    assert [verb for verb, _ in calls] == ["compare", "compare", "certify"]
    calls.clear()
    assert call() == 0
    assert calls == []
    assert capsys.readouterr().out.count("fixed-rate merging") == 2 * 2


def test_of_other_settings_nothing_goes_on(call, capsys):
    assert call("--dry-run") == 0
    Path("reproduce").mkdir()
    Path("reproduce/run.json").write_text(json.dumps({"settings": {"path": "elsewhere"}, "done": {}}))
    assert call() == 1
    assert "is of a run with other settings" in capsys.readouterr().err


def test_a_dry_run_lists_the_commands_and_writes_nothing(call, capsys):
    assert call("--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("would run: ltmp ") == len(PARTS)
    assert "ltmp learn --data" in said
    assert "--recipe paper --target 0.8" in said
    assert "--method m --method resize:24" in said
    assert "vit_tiny_patch16_224, all parts: about " in said
    assert not Path("reproduce").exists()


def test_too_few_images_for_a_certificate_are_told(call, capsys):
    assert call("--dry-run", certify=0.01) == 0
    streams = capsys.readouterr()
    assert "no certificate: 0.01 takes at least 299 images, not 6" in streams.err
    assert "ltmp certify" not in streams.out


def without(folder, *names):
    for name in names:
        shutil.rmtree(folder / name)
    return folder


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        (lambda call, images: call(data=images / "nowhere"), 2, "nowhere"),
        (lambda call, images: call(data=without(images, "val")), 2, "has no val/ folder to report on: give --val"),
        (lambda call, images: call(data=without(images, "val/ant")), 1, "val has 2 classes"),
        (lambda call, images: call(weights="gone.safetensors"), 2, "gone.safetensors"),
        (lambda call, images: call("--model", "vit_base_patch16_224"), 2, "1 --weights for 2 models"),
        (lambda call, images: call("--budget", 0.2), 2, "expected shares from 0.3 to 0.95"),
        (lambda call, images: call("--budget", 0.31), 2, "drop the budget 0.31"),
        (lambda call, images: call("--num-classes", 4), 1, "4"),
        (lambda call, images: main(["reproduce", "coco", str(images)]), 2, "expected imagenet"),
        (lambda call, images: main(["reproduce", "imagenet", str(images)]), 2, "which weights?"),
    ],
)
def test_everything_is_checked_before_the_first_part(call, images, calls, capsys, change, code, sentence):
    assert change(call, images) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("error: ") == 1
    assert calls == []
    assert not Path("reproduce").exists()


@pytest.fixture
def flat(images):
    """The same images without class folders."""
    folder = images.parent / "flat"
    folder.mkdir()
    for number, file in enumerate(images.glob("train/*/*.png")):
        shutil.copy(file, folder / f"{number}.png")
    return folder


def test_images_without_labels_are_refused(call, images, flat, capsys):
    assert call("--val", images / "val", data=flat) == 2
    assert "has no labels, which the paper's recipe learns from" in capsys.readouterr().err


def test_learn_takes_them_from_the_dense_model_instead(ltmp, images, flat, capsys):
    assert ltmp("learn", "--data", flat, "--val", images / "val", "--dry-run") == 0
    assert "from the predictions of the dense model" in capsys.readouterr().out


def test_a_missing_extra_is_told_first(call, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert call() == 1
    assert "pip install 'ltmp[plot]'" in capsys.readouterr().err


def test_published_figures_name_their_table():
    for model in reproduce.MODELS:
        found = published(f"{model}.fb_in1k")
        assert {row.method.partition(",")[0] for row in found} == {"DiffRate", "DTEM", "ToMe"}
        assert all("table" in row.source and 0.4 < row.share < 0.7 and row.top1 < row.dense for row in found)
    assert published("vit_tiny_patch16_224") == []


def test_options_as_words():
    assert as_arguments(RunOptions(device="cpu", amp=True)) == ["--device", "cpu", "--amp"]
    asked = reproduce.ReproducedData(mean=(0.5, 0.4, 0.3), batch_size=2, limit=7)
    assert as_arguments(asked) == ["--mean", "0.5", "0.4", "0.3", "--batch-size", "2", "--limit", "7"]
    assert as_arguments(reproduce.ReproduceOptions(speed=False, budget=[0.5, 0.4])) == [
        "--budget", "0.5", "--budget", "0.4", "--no-speed",
    ]  # fmt: skip
