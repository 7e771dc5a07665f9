"""`ltmp predict` from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from ltmp.cli import main

from .conftest import MODEL
from .test_cli import error, learn_nothing


@pytest.fixture
def thresholds(ltmp, tmp_path):
    learn_nothing(tmp_path / "off.safetensors")
    return tmp_path / "off.safetensors"


@pytest.fixture
def predict(weights, tmp_path, monkeypatch):
    """Runs `ltmp predict` with the tiny model and gives the exit code."""
    monkeypatch.chdir(tmp_path)
    own = ["--weights", str(weights), "--device", "cpu", "--workers", "0"]

    def run(*arguments: object, model: bool = True) -> int:
        return main(["predict", *(MODEL if model else MODEL[2:]), *own, *map(str, arguments)])

    return run


def test_dense_then_continued_then_refused(predict, images, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    (images / "val" / "ant" / "broken.jpg").write_bytes(b"?")
    options = ("--out", "scores", "--top", 2, "--shard-size", 5, "--class-map", "names.txt")
    assert predict(images, *options, "--json", "-") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert (summary["images"], summary["broken"], summary["shards"], summary["continued"]) == (12, 1, 3, 0)
    assert "(13 of 13)" in said.err
    assert "images/s" in said.err
    table = pq.read_table(tmp_path / "scores")
    assert table.column_names == ["key", "row", "classes", "names", "probabilities", "tokens", "share"]
    assert table["key"][0].as_py() == "train/ant/0.png"
    assert set(table["names"].to_pylist()[0]) < {"ant", "bee", "cow"}

    assert predict(images, *options) == 0
    said = capsys.readouterr()
    assert "scores written to" in said.out
    assert "unreadable images: 1" in said.err
    assert predict(images, *options, "--embeddings") == 2
    assert "embeddings: False then, True now; continue with" in error(capsys)
    assert predict(images, *options, "--embeddings", "--overwrite") == 0
    assert "embedding" in pq.read_table(tmp_path / "scores").column_names


def test_thresholds_name_the_model(predict, images, thresholds, tmp_path):
    assert predict(images, "--out", "scores", "--thresholds", thresholds, "--engine", "packed", model=False) == 0
    assert set(pq.read_table(tmp_path / "scores")["tokens"].to_pylist()) == {17}


def test_thresholds_may_come_from_the_hub(predict, images, thresholds, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    thresholds.rename(tmp_path / "cache" / "thresholds.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path / "cache"))
    assert predict(images, "--out", "scores", "--thresholds", "user/repo", model=False) == 0
    assert set(pq.read_table(tmp_path / "scores")["tokens"].to_pylist()) == {17}


def test_wrong_calls_are_one_sentence(predict, images, thresholds, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    out = ("--out", "scores")
    for arguments, code, told in [
        (("nowhere", *out), 2, "nowhere does not exist"),
        ((images, *out, "--top", 4), 2, "top is 4: expected 1 to 3"),
        ((images, *out, "--engine", "packed"), 2, "--engine is for reduced models"),
        ((images, *out, "--engine", "fast"), 2, "unknown engine 'fast'"),
        ((images, *out, "--runner", "slurm"), 2, "unknown runner 'slurm'"),
        ((images, *out, "--actors", 2), 2, "are for --runner ray"),
        ((images, *out, "--class-map", "none.txt"), 2, "class map none.txt: expected"),
        ((images, *out, "--class-map", "two.txt"), 2, "2 class names for a model with 3 classes"),
        ((images, *out, "--thresholds", thresholds, "--model-kwargs", "depth=3 embed_dim=48"), 1, "does not fit"),
        ((images, "--out", images / "scores"), 2, "lies inside the source"),
        ((images,), 2, "--out"),
    ]:
        assert predict(*arguments) == code, arguments
        assert told in error(capsys)
    assert main(["predict", str(images), *out]) == 2
    assert "which model?" in error(capsys)
    assert not list(tmp_path.glob("scores/*.parquet"))


def test_missing_pyarrow_is_said(predict, images, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert predict(images, "--out", "scores") == 1
    assert "pip install 'ltmp[predict]'" in error(capsys)


def test_interrupted_then_continued(predict, weights, images, tmp_path):
    command = [sys.executable, "-m", "ltmp.cli", "predict", str(images), "--out", "scores", "--shard-size", "1"]
    own = [*MODEL, "--weights", str(weights), "--device", "cpu", "--workers", "1", "--batch-size", "1"]
    process = subprocess.Popen([*command, *own], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("scores/*.parquet")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.skip("this machine scored twelve images before the signal came")
    assert process.returncode == 130
    assert "error: interrupted: the same command goes on" in told
    assert "Traceback" not in told
    before = len(list(tmp_path.glob("scores/*.parquet")))
    assert predict(images, "--out", "scores", "--shard-size", 1, "--batch-size", 1, "--json", "again.json") == 0
    summary = json.loads((tmp_path / "again.json").read_text())
    assert (summary["continued"], summary["images"]) == (before, 12)


def test_source_of_images_named_on_the_command_line_may_be_many(predict, images, tmp_path):
    import tarfile

    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(images / name, arcname=name)
    assert predict("train.tar", "val.tar", "--out", "scores") == 0
    assert len(pq.read_table(tmp_path / "scores")) == 12
    assert os.listdir(tmp_path / "scores").count("_errors") == 0
