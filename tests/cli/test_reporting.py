"""`ltmp report` from the command line."""

from __future__ import annotations

import pytest

import ltmp as package
from ltmp.cli import main
from ltmp.report import shown_path

from .conftest import MODEL, NAME, SHAPE


@pytest.fixture
def thresholds(tmp_path):
    import timm

    model = package.attach(timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE))
    files = []
    for merge in (0.9, 0.5):
        model.ltmp.set(merge=[merge] * 3)
        files.append(tmp_path / str(merge) / "thresholds.safetensors")
        package.save(model, files[-1])
    return files


def call(weights, *arguments) -> int:
    return main(["report", *MODEL, "--weights", str(weights), "--device", "cpu", *map(str, arguments)])


def test_page_of_two_budgets_and_a_result(ltmp, weights, images, thresholds, tmp_path):
    own = ["--model", MODEL[1], "--data", images, "--thresholds", thresholds[0], "--no-speed", "--json"]
    assert ltmp("eval", *own[2:], tmp_path / "eval.json") == 0
    (images / "val" / "ant" / "0.png").write_bytes(b"")
    files = ["--thresholds", thresholds[0], "--thresholds", thresholds[1]]
    assert call(weights, tmp_path / "eval.json", "--data", images, *files, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "5 images" in page
    # thumbnails go by the images that could be read: cheapest, dearest and changed answers
    assert "ant/1.png" in page
    assert "ant/0.png" not in page
    assert all(name in page for name in ("0.9", "0.5", "label: ant", "eval.json"))
    # others read it: it names no folder of this machine
    assert str(tmp_path) not in page
    assert str(weights.parent.parent) not in page


def test_page_of_results_alone(ltmp, images, thresholds, tmp_path):
    assert ltmp("eval", "--data", images, "--thresholds", thresholds[0], "--json", tmp_path / "eval.json") == 0
    assert main(["report", str(tmp_path / "eval.json"), "--out", str(tmp_path / "page.html")]) == 0
    assert "Tokens kept" in (tmp_path / "page.html").read_text()


def test_half_a_call_is_refused(images, capsys, tmp_path):
    assert main(["report", "--data", str(images)]) == 2
    assert "--thresholds" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err


def test_paths_as_they_are_shown(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a" / "b.png") == "a/b.png"
    assert shown_path("a/b.png") == "a/b.png"
    assert shown_path("/home/me/secret/data/b.png") == "data/b.png"
    assert shown_path("/b.png") == "b.png"
