"""`ltmp bench`: every way on one batch, checked before it is timed."""

from __future__ import annotations

import csv
import json

import pytest

from ltmp.cli import main
from ltmp.evaluate import bench

from .conftest import MODEL

QUICK = ("--seconds", "0.01", "--no-compile", "--device", "cpu")


def test_every_way_at_each_batch_size(ltmp, images, tmp_path):
    learn = ("--views", 0, "--calibration", 6, "--batch-size", 3, "--target", 0.7)
    assert ltmp("learn", "--data", images, "--out", tmp_path / "run", *learn) == 0
    file, table = tmp_path / "run" / "thresholds.safetensors", tmp_path / "bench.csv"
    for more in (("--scores", "best"), ("--every", 2)):
        assert ltmp("bench", "--thresholds", file, *more, *QUICK) == 2
    sizes = ("--batch-size", 1, "--batch-size", 4)
    assert ltmp("bench", "--data", images, "--thresholds", file, *sizes, *QUICK, "--csv", table) == 0
    rows = list(csv.DictReader(table.open()))
    assert {row["batch"] for row in rows} == {"1", "4"}
    assert {"dense", "dense, unfused", "packed", "fixed-rate merge"} <= {row["way"] for row in rows}
    assert all(float(row["images_per_second"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert all(float(row["share"]) < 1 for row in rows if row["way"] in ("packed", "fixed-rate merge"))


@pytest.mark.parametrize("scores", ["paper", "best"])
def test_needs_neither_weights_nor_images(tmp_path, scores):
    out = tmp_path / "bench.json"
    how = ["--share", "0.7", "--batch-size", "2", "--scores", scores]
    assert main(["bench", *MODEL, *how, *QUICK, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    shares = {row["way"]: row["share"] for row in found["rows"]}
    assert shares["dense"] == 1
    assert abs(shares["packed"] - 0.7) < 0.1
    assert (found["image_size"], found["dtype"]) == ([32, 32], "float32")
    assert found["scores"]["matching"] == {"paper": "bipartite", "best": "mutual"}[scores]


def test_half_precision(tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["--dtype", "bfloat16", "--batch-size", "2", *QUICK, "--json", str(out)]
    assert main(["bench", *MODEL, *arguments]) == 0
    assert all(row["images_per_second"] for row in json.loads(out.read_text())["rows"])


def test_a_red_way_fails_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "LOGITS", dict.fromkeys(bench.LOGITS, -1.0))
    out = tmp_path / "bench.json"
    assert main(["bench", *MODEL, "--batch-size", "2", *QUICK, "--json", str(out)]) == 1
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["packed"]["images_per_second"] is None
    assert rows["dense"]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dtype", "int8"], "no dtype 'int8': expected one of float32, bfloat16, float16"),
        (["--share", "1.5"], "--share is 1.5: expected a number above 0 and below 1"),
        (["--every", "12"], "every is 12: expected"),
        (["--scores", "worst"], "unknown scores 'worst': expected one of paper, attention, best"),
    ],
)
def test_says_what_is_wrong(arguments, sentence, capsys):
    assert main(["bench", *MODEL, *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "which model?" in capsys.readouterr().err
