"""`ltmp compare`: methods at budgets, learned here or from files, in one table and one plot."""

from __future__ import annotations

import csv
import json


def test_writes_table_and_plot(ltmp, images, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--data", images, "--out", out, "--batch-size", "4"]
    learned = ["--method", "ltmp", "--learn-data", images, "--calibration", "6"]
    fixed = ["--method", "m", "--method", "m:2", "--method", "random", "--budget", "0.8"]
    assert ltmp("compare", *common, *learned, *fixed) == 0
    table = list(csv.DictReader((out / "compare.csv").open()))
    assert [row["name"] for row in table] == ["dense", "ltmp 0.8", "m 0.8", "m:2", "random 0.8"]
    assert all(abs(float(row["share"]) - 0.8) < 0.06 for row in table if row["target"])
    assert all(float(row["images_per_second"]) > 0 for row in table)
    found = json.loads((out / "compare.json").read_text())
    assert found["evaluations"]["m:2"]["config"]["r"] == 2
    assert found["rows"][0]["name"] == "dense"
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_files_take_part(ltmp, images, tmp_path):
    learn = ("--views", 0, "--calibration", 6, "--batch-size", 3, "--target", 0.7)
    assert ltmp("learn", "--data", images, "--out", tmp_path / "run", *learn) == 0
    file = tmp_path / "run" / "thresholds.safetensors"
    out = tmp_path / "out"
    assert ltmp("compare", "--data", images, "--out", out, "--thresholds", file, "--no-speed") == 0
    table = list(csv.DictReader((out / "compare.csv").open()))
    assert [(row["name"], row["method"], row["target"]) for row in table] == [
        ("dense", "dense", ""),
        ("run/thresholds.safetensors", "ltmp", "0.7"),
    ]


def test_says_what_is_missing(ltmp, images, capsys):
    assert ltmp("compare", "--data", images, "--method", "ltmp") == 2
    assert "give --learn-data" in capsys.readouterr().err
    assert ltmp("compare", "--data", images, "--method", "tome") == 2
    assert "no method 'tome': expected one of ltmp" in capsys.readouterr().err
