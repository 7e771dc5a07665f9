"""`ltmp dial`: one run, one file, every budget; a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ltmp.checkpoint import read
from ltmp.config import SCORES as NAMED
from ltmp.config import Scores
from ltmp.learning import dial as job

FEW = ("--knots", 3, "--views", 0, "--calibration", 6, "--batch-size", 4, "--low", 0.7, "--high", 0.9)


def test_one_file_for_every_budget(ltmp, images, tmp_path, capsys) -> None:
    assert (
        ltmp("dial", "--data", images, "--target", 0.8, "--budget", 0.72, "--budget", 0.78, "--json", "d.json", *FEW)
        == 0
    )
    path = Path("runs") / "vit_tiny_patch16_224-ltmp-dial" / "thresholds.safetensors"
    file = read(path)
    assert file.dial is not None
    assert len(file.dial.share) <= 3
    assert "dial from 0.7" in capsys.readouterr().out
    told = json.loads((tmp_path / "d.json").read_text())
    assert [row["budget"] for row in told["budgets"]] == [0.72, 0.78]
    assert all(abs(row["share"] - row["budget"]) < 0.1 and "top1" in row for row in told["budgets"])
    assert file.metadata["views"] == told["views"] == 6 * (1 + 6 + 3)
    # the file goes on to the verbs that run it
    assert ltmp("eval", "--data", images, "--thresholds", path, "--no-speed", "--budget", 0.8) == 0
    assert not path.with_name("run.pt").exists()


SCORES = {"similarity": "heads", "matching": "mutual", "importance": "received", "size_power": 0.2, "class_power": 0.5}


@pytest.mark.parametrize("verb", [("dial", *FEW), ("learn", "--views", 0, "--calibration", 6, "--batch-size", 4)])
def test_what_thresholds_go_by_is_asked_for_and_kept(ltmp, images, verb) -> None:
    scores = [part for name, value in SCORES.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert ltmp(*verb, "--data", images, "--out", "here", "--target", 0.8, *scores) == 0
    assert read("here/thresholds.safetensors").config.scores == Scores(**SCORES)


@pytest.mark.parametrize("verb", [("dial", *FEW), ("learn", "--views", 0, "--calibration", 6, "--batch-size", 4)])
def test_all_that_helps_is_one_word(ltmp, images, verb) -> None:
    # what is told goes first, the paper's own value, too
    told = ("--scores", "best", "--size-power", 0.5, "--importance", "received", "--matching", "bipartite")
    assert ltmp(*verb, "--data", images, "--out", "here", "--target", 0.8, *told) == 0
    assert read("here/thresholds.safetensors").config.scores == replace(
        NAMED["best"], size_power=0.5, importance="received", matching="bipartite"
    )


@pytest.mark.parametrize("verb", [("dial", *FEW), ("learn", "--views", 4, "--calibration", 6, "--batch-size", 4)])
def test_every_other_block(ltmp, images, verb, capsys) -> None:
    asked = (*verb, "--data", images, "--target", 0.8, "--no-eval", "--every")
    assert ltmp(*asked, 2, "--out", "here") == 0
    # the last one only drops what the head does not read
    assert (read("here/thresholds.safetensors").merge < 1).tolist() == [True, False, False]
    assert read("here/thresholds.safetensors").prune[1] == 0
    assert ltmp(*asked, 3, "--out", "there") == 2
    assert "every is 3: expected" in capsys.readouterr().err
    assert not Path("there").exists()


def test_without_labels_or_anything_to_check_on(ltmp, images, capsys) -> None:
    assert ltmp("dial", "--data", images / "train", "--out", "here", "--target", 0.8, *FEW) == 0
    assert "divergence" in capsys.readouterr().out
    assert read("here/thresholds.safetensors").dial is not None


def test_an_interrupted_run_goes_on(ltmp, images, capsys, monkeypatch) -> None:
    many = [*FEW[:3], 3 * 8 * 6, *FEW[4:], "--target", 0.8, "--out", "here"]
    search = job._Maker.search
    searched: list[float] = []

    def interrupted(self, share, *rest):
        if searched:
            raise KeyboardInterrupt
        searched.append(share)
        return search(self, share, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job._Maker, "search", interrupted)
        assert ltmp("dial", "--data", images, *many) == 130
    assert "--resume to go on" in capsys.readouterr().err
    assert ltmp("dial", "--data", images, *many) == 2
    assert "interrupted run" in capsys.readouterr().err
    assert ltmp("dial", "--data", images, "--resume", *many) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--target", 0.5), "--target 0.5 is not on the dial"),
        (("--target", 0.8, "--budget", 0.01), "--budget 0.01 is not on the dial"),
        (("--low", 0), "--low is 0: expected a number above 0"),
        (("--high", "nan"), "--high is nan"),
        (("--low", 0.95), "--low 0.95 is not below --high 0.9"),
        (("--target", 0.8, "--certify", 5), "--certify is 5: expected a number above 0 and below 1"),
        (("--target", 0.8, "--low", 0.1), "out of reach"),
        (("--target", 0.8, "--variant", "best"), "unknown variant"),
        (("--target", 0.8, "--scores", "all"), "expected one of paper, attention, best"),
        (("--target", 0.8, "--similarity", "values"), "expected one of mean, heads"),
        (("--target", 0.8, "--size-power", 2), "size_power must be between 0 and 1"),
        (("--target", 0.8, "--class-power", -1), "class_power must be between 0 and 1"),
    ],
)
def test_bad_settings_are_one_sentence(ltmp, images, capsys, wrong, said) -> None:
    assert ltmp("dial", "--data", images, *FEW, *wrong) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
