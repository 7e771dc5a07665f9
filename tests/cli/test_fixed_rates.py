"""A file of fixed rates works wherever a policy is enough; the two verbs that need thresholds say so in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

import ltmp as package
from ltmp.cli import main
from ltmp.evaluate.bench import Row

from .conftest import MODEL, NAME, SHAPE


@pytest.fixture
def rates(tmp_path) -> Path:
    config = package.LTMPConfig(variant="m", r=2)
    model = package.attach(timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE), config)
    package.save(model, tmp_path / "rates.safetensors", model_name=NAME)
    return tmp_path / "rates.safetensors"


@pytest.fixture
def run(weights, images, rates, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(verb: str, *arguments: object) -> int:
        own = [*MODEL, "--weights", str(weights), "--thresholds", str(rates)]
        return main([verb, *own, *map(str, arguments)])

    return run


def arguments(verb: str, images: Path) -> list[object]:
    quick = ["--no-speed", "--device", "cpu"]
    return {
        "eval": ["--data", images, *quick],
        "report": ["--data", images, *quick],
        "predict": [images / "val", "--out", "scores", "--workers", 0, "--device", "cpu"],
        "show": [next(images.rglob("*.png")), "--device", "cpu"],
        "bench": ["--batch-size", 2, "--seconds", 0.01, "--no-compile", "--no-baseline", "--device", "cpu",
                  "--json", "bench.json"],
        "export": ["--out", "out.onnx"],
        "app": ["--device", "cpu"],
    }[verb]  # fmt: skip


class Bench:
    """Stands in for the timing, which is tested elsewhere."""

    def __init__(self, *_, **__) -> None:
        pass

    def run(self, _seconds):
        return [Row("packed", 50.0, 0.4, 2.5, None, None, 0.0)]


@pytest.mark.parametrize("verb", ["eval", "report", "predict", "show", "bench"])
def test_rates_are_enough(verb, run, images, capsys, monkeypatch):
    monkeypatch.setattr("ltmp.evaluate.bench.Bench", Bench)
    assert run(verb, *arguments(verb, images)) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("verb", "code", "said"), [("export", 1, "runs at fixed rates"), ("app", 2, "have no slider")])
def test_where_thresholds_are_needed_it_is_said(verb, code, said, run, images, capsys):
    assert run(verb, *arguments(verb, images)) == code
    assert said in capsys.readouterr().err
    assert not Path("out.onnx").exists()
