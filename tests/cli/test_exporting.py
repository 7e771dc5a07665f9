"""`ltmp export` writes a file that `ltmp eval` runs, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os

import pytest
from timm import create_model

import ltmp as package
from ltmp.cli import main
from ltmp.hosts.attach import thresholds_of

from .conftest import MODEL, NAME, SHAPE
from .test_cli import error

pytest.importorskip("onnxscript", reason="needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="needs the extra 'export'")


@pytest.fixture
def run(weights, monkeypatch, tmp_path):
    """Runs a verb with the tiny model and thresholds that prune; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    model = package.attach(create_model(NAME, img_size=32, num_classes=3, **SHAPE))
    thresholds_of(model).set(merge=[0.5, 1.0, 1.0], prune=[0.0, 0.05, 0.0])
    package.save(model, "thresholds.safetensors", model_name=NAME)

    def call(verb: str, *arguments: object) -> int:
        own = [*MODEL, "--weights", str(weights), "--thresholds", "thresholds.safetensors"]
        return main([verb, *own, *map(str, arguments)])

    return call


def test_export_then_eval_in_onnx_runtime(run, images, tmp_path, capsys):
    assert run("export", "--form", "static", "--data", images, "--images", 4, "--json", "-") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["path"] == f"{NAME}_static.onnx"
    assert (about["images"], about["form"], about["opset"]) == (4, "static", 20)
    assert about["difference"] < 1e-4
    assert (tmp_path / about["path"]).exists()

    how = ("--engine", "onnx", "--exported", about["path"], "--batch-size", 4, "--json", "-")
    assert run("eval", "--data", images, *how) == 0
    measured = json.loads(capsys.readouterr().out)
    assert run("eval", "--data", images, "--device", "cpu", "--json", "-") == 0
    expected = json.loads(capsys.readouterr().out)
    for name in ("images", "top1", "dense_top1", "kept", "share"):
        assert measured[name] == pytest.approx(expected[name])
    assert measured["throughput"]["batch_size"] == 4


def test_eval_exports_by_itself_what_no_file_has(run, images, capsys):
    assert run("eval", "--data", images, "--engine", "onnx", "--form", "static", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["export", "--form", "ragged"], 2, "single, batch, static"),
        (["export", "--format", "tflite"], 2, "onnx, program, aoti"),
        (["export", "--opset", "9"], 2, "opset 9"),
        (["export", "--out", "model.txt"], 2, ".onnx"),
        (["export", "--form", "static", "--out", "taken/model.onnx"], 1, "cannot write"),
        (["export", "--int8", "--format", "program"], 2, "int8"),
        (["export", "--thresholds", "gone.safetensors"], 2, "gone.safetensors"),
        (["eval", "--data", "DATA", "--exported", "model.onnx"], 2, "--engine onnx or openvino"),
        (["eval", "--data", "DATA", "--engine", "onnx", "--exported", "gone.onnx"], 2, "gone.onnx"),
        (["eval", "--data", "DATA", "--engine", "openvino", "--amp"], 2, "--amp"),
        (["eval", "--data", "DATA", "--engine", "tensorrt"], 2, "tensorrt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(arguments, code, expected, run, images, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert run(*(str(images) if word == "DATA" else word for word in arguments)) == code
    assert expected in error(capsys)
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".onnx", ".pt2"))]
