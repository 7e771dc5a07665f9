"""`ltmp certify`, `ltmp dial --certify`, and `--certified` wherever thresholds are loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from ltmp.certification import gain
from ltmp.checkpoint import read
from ltmp.cli import main

from .conftest import MODEL, NAME, SHAPE
from .test_budgets import dial as dial
from .test_budgets import run as run

VERBS = ("eval", "bench", "compare", "predict", "serve", "show", "export", "report", "app")
EASY = ("--at-most", 0.9, "--budget", 0.9, "--budget", 0.5, "--no-speed")


@pytest.fixture
def certify(ltmp, images, weights):
    """Runs `ltmp certify` on the tiny model and its six validation images."""

    def call(thresholds, *arguments):
        model = [*MODEL, "--weights", weights, "--device", "cpu"]
        return ltmp("certify", "--data", images, *model, "--thresholds", thresholds, *arguments)

    return call


def test_the_certificate_goes_into_the_file_and_says_so(certify, ltmp, dial, capsys, tmp_path):
    before = read(dial)
    assert certify(dial, *EASY, "--json", "c.json") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "Budget 0.5: with 95 % confidence at most 90 % of answers differ from the dense model's" in said
    file = read(dial)
    assert file.certificate.budget == 0.5
    assert file.certificate.images == 6
    assert torch.equal(file.dial.merge, before.dial.merge)
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["certificate"] == file.certificate.to_dict()
    assert ltmp("info", dial) == 0
    assert "certified: budget 0.5: with 95 % confidence" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """Every way is run once, and the n-th one named gives n images a second."""

    def timed(ways, images, seconds):
        return {name: float(1 + k) for k, name in enumerate(ways) if len(ways[name]()) == images}

    monkeypatch.setattr(gain, "timed", timed)


def test_speed_is_measured_against_dense_and_lower_resolution(certify, dial, tmp_path, capsys, clock):
    near = ("--risk", "embedding", "--distance", 1.99)
    assert certify(dial, *EASY[:-1], *near, "--json", "c.json") == 0
    told = json.loads((tmp_path / "c.json").read_text())["gain"]
    assert (told["dense"], told["reduced"], told["smaller"]) == (1, 2, 3)
    assert told["resolution"] == 24  # of 32 pixels, a patch of 8 less; the next one is half
    assert "lower resolution (24 pixels), certified alike, 3.00 times" in capsys.readouterr().out.replace("\n", " ")


def test_nothing_certified_is_exit_code_1_and_no_guarantee(certify, run, dial, capsys, monkeypatch):
    from ltmp.certification import risks

    monkeypatch.setattr(risks, "_disagree", lambda reduced, dense, labels: torch.ones(len(dense), dtype=torch.bool))
    assert certify(dial, *EASY) == 1
    assert "No budget is certified" in capsys.readouterr().out
    assert run("eval", dial, "--certified") == 2
    assert "certifies nothing" in capsys.readouterr().err


def test_eval_runs_at_the_certified_budget(certify, run, dial, tmp_path):
    assert certify(dial, *EASY) == 0
    assert run("eval", dial, "--certified", "--json", "eval.json") == 0
    assert json.loads((tmp_path / "eval.json").read_text())["budget"] == 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_certificate_the_call_is_wrong(verb, run, dial, capsys):
    assert run(verb, dial, "--certified") == 2
    said = capsys.readouterr().err
    assert "has no certificate: make one with `ltmp certify`" in said
    assert said.count("error: ") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_budget_and_the_certified_one_are_one_too_many(verb, run, dial, capsys):
    assert run(verb, dial, "--certified", "--budget", 0.5) == 2
    assert "each set the dial: give one of them" in capsys.readouterr().err


def test_other_precision_voids_it(certify, run, dial, capsys):
    assert certify(dial, *EASY) == 0
    assert run("eval", dial, "--certified", "--amp") == 1
    assert "is for float32, but the model runs in float32, autocast bfloat16" in capsys.readouterr().err
    assert run("export", dial, "--certified", "--int8") == 2
    assert "INT8 is not" in capsys.readouterr().err


def test_too_few_images_are_refused_with_the_number_it_takes(certify, dial, capsys):
    before = dial.read_bytes()
    assert certify(dial, "--at-most", 0.01, "--no-speed") == 2
    assert "6 images are too few: at most 0.01 with confidence 0.95 takes at least 299" in capsys.readouterr().err
    assert dial.read_bytes() == before


def test_images_without_labels_give_no_accuracy(certify, images, dial, capsys):
    for number, file in enumerate(sorted(images.glob("val/*/*.png"))):
        file.rename(images / f"{number}.png")
    shutil.rmtree(images / "train")
    shutil.rmtree(images / "val")
    before = dial.read_bytes()
    assert certify(dial, *EASY, "--risk", "error") == 2
    assert "needs labels, which these images lack" in capsys.readouterr().err
    assert dial.read_bytes() == before
    assert certify(dial, *EASY) == 0


def test_a_certificate_of_another_model_is_void(certify, dial, images, tmp_path, capsys):
    assert certify(dial, *EASY) == 0
    other = timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    asked = ("--weights", "other.safetensors", "--thresholds", dial, "--certified", "--no-speed", "--device", "cpu")
    capsys.readouterr()
    assert main(["eval", "--data", str(images), *MODEL, *map(str, asked)]) == 1
    assert "is for other weights than this model's" in capsys.readouterr().err


def test_the_report_says_what_is_certified(certify, run, dial, tmp_path):
    assert certify(dial, *EASY) == 0
    assert run("report", dial, "--certified", "--out", "r.html") == 0
    assert "certified, budget 0.5: with 95 % confidence" in (tmp_path / "r.html").read_text()


def test_a_file_of_others_needs_a_place(certify, capsys):
    assert certify("user/repo", *EASY) == 2
    assert "give --out FILE.safetensors" in capsys.readouterr().err


def test_dial_ends_with_what_is_guaranteed(ltmp, images, tmp_path, capsys, clock):
    few = ("--knots", 2, "--views", 0, "--calibration", 6, "--batch-size", 4, "--low", 0.7, "--high", 0.9)
    told = ("--target", 0.8, "--budget", 0.8, "--out", "here", "--json", "d.json")
    assert ltmp("dial", "--data", images, *few, *told, "--certify", 0.9) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["paragraph"] in said
    assert "times as fast as the dense model" in said
    file = read("here/thresholds.safetensors")
    assert file.certificate.learned == 6
    assert file.certificate.to_dict() == found["certificate"]


def test_dial_refuses_to_certify_on_what_it_learns_from(ltmp, images, capsys):
    assert ltmp("dial", "--data", images / "train", "--target", 0.8, "--certify", 0.9) == 2
    assert "give them as --val" in capsys.readouterr().err
    few = ("--knots", 2, "--views", 0, "--calibration", 6, "--batch-size", 4, "--low", 0.7, "--high", 0.9)
    same = ("--data", images / "train", "--val", images / "train", "--target", 0.8)
    assert ltmp("dial", *same, *few, "--certify", 0.9) == 1
    assert "6 of these 6 images are among those that the thresholds were learned on" in capsys.readouterr().err
