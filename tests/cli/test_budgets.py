"""`--budget` wherever thresholds are loaded: it sets the dial of a file, and is refused where there is none."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import timm

import ltmp as package
from helpers import make_dial
from ltmp.checkpoint import read
from ltmp.cli import main
from ltmp.evaluate.bench import Row

from .conftest import MODEL, NAME, SHAPE

VERBS = ("eval", "bench", "compare", "predict", "serve", "show", "export", "report", "push")


def save(path: Path, dialled: bool) -> Path:
    model = package.attach(timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE))
    if dialled:
        model.ltmp.set_dial(make_dial(3))
        model.ltmp.set_budget(0.5)
    else:
        model.ltmp.set([0.5] * 3, [0.02] * 3)
    package.save(model, path, model_name=NAME)
    return path


@pytest.fixture
def dial(tmp_path) -> Path:
    return save(tmp_path / "dial.safetensors", dialled=True)


@pytest.fixture
def run(weights, images, tmp_path, monkeypatch):
    """Runs a verb on the tiny model with what it needs besides thresholds and budget."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(images)]
    photo = str(next(images.rglob("*.png")))
    more = {
        "eval": [*data, "--no-speed", "--device", "cpu"],
        "bench": ["--batch-size", "2", "--seconds", "0.01", "--no-compile", "--no-baseline", "--device", "cpu"],
        "compare": [*data, "--no-speed", "--device", "cpu"],
        "predict": [str(images / "val"), "--out", str(tmp_path / "scores"), "--device", "cpu"],
        "serve": ["--port", "0", "--device", "cpu"],
        "show": [photo, "--device", "cpu"],
        "export": ["--out", str(tmp_path / "out.onnx")],
        "report": [*data, "--no-speed", "--device", "cpu"],
        "app": ["--device", "cpu"],
    }

    def run(verb: str, thresholds: Path, *arguments: object) -> int:
        if verb == "push":
            return main(["push", str(thresholds), "me/tiny", *map(str, arguments)])
        own = [*MODEL, "--weights", str(weights), "--thresholds", str(thresholds)]
        return main([verb, *more[verb], *own, *map(str, arguments)])

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_dial_the_call_is_wrong(verb, run, tmp_path, capsys):
    plain = save(tmp_path / "plain.safetensors", dialled=False)
    if verb == "compare":
        # there the budget is first of all that of the other methods
        assert run(verb, plain, "--budget", 0.55) == 0
        return
    assert run(verb, plain, "--budget", 0.55) == 2
    said = capsys.readouterr().err
    assert "no dial, so it cannot be set to 0.55" in said
    assert said.count("error: ") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_out_of_reach_is_said(verb, run, dial, capsys):
    assert run(verb, dial, "--budget", 0.2) == 2
    assert "goes from 0.3 to 0.95" in capsys.readouterr().err


def test_eval(run, dial, tmp_path):
    shares = []
    for budget in ("0.9", "0.3"):
        assert run("eval", dial, "--budget", budget, "--json", tmp_path / "eval.json") == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["budget"] == float(budget)
        shares.append(found["share"])
    assert shares[0] > shares[1]


@pytest.mark.usefixtures("quickly")
def test_bench(run, dial, tmp_path, monkeypatch, capsys):
    timed = []

    class Bench:
        def __init__(self, network, images, **_):
            timed.append(network.ltmp.budget)

        def run(self, seconds):
            return [Row("packed", 50.0, 0.4, 2.5, None, None, 0.0)]

    monkeypatch.setattr("ltmp.evaluate.bench.Bench", Bench)
    assert run("bench", dial, "--budget", 0.4, "--json", tmp_path / "bench.json") == 0
    assert timed == [0.4]
    assert json.loads((tmp_path / "bench.json").read_text())["budget"] == 0.4
    assert main(["bench", *MODEL, "--budget", "0.5"]) == 2
    capsys.readouterr()
    assert run("bench", dial, "--milliseconds", 1e6) == 0
    assert "measured: 40 ms (50 images/s)" in capsys.readouterr().out


def test_compare_takes_a_dial_at_each_budget(run, dial, tmp_path):
    assert run("compare", dial, "--budget", 0.8, "--budget", 0.4, "--out", tmp_path / "compare") == 0
    rows = list(csv.DictReader((tmp_path / "compare" / "compare.csv").open()))
    names = [row["name"] for row in rows if "dial" in row["name"]]
    assert [name.rpartition(" ")[2] for name in names] == ["0.8", "0.4"]


def test_show_draws_a_row_a_budget(run, dial, tmp_path, capsys):
    assert run("show", dial, "--budget", 0.8, "--budget", 0.4, "--json", "-") == 0
    budgets = json.loads(capsys.readouterr().out)[0]["budgets"]
    assert list(budgets) == ["budget 0.8", "budget 0.4"]


def test_report_has_each_budget(run, dial, tmp_path):
    pytest.importorskip("jinja2")
    assert run("report", dial, "--budget", 0.8, "--budget", 0.4, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "budget 0.8" in page
    assert "budget 0.4" in page


def test_predict_goes_on_at_the_same_budget_only(run, dial, capsys):
    pytest.importorskip("pyarrow")
    assert run("predict", dial, "--budget", 0.4) == 0
    assert run("predict", dial, "--budget", 0.4) == 0
    assert run("predict", dial, "--budget", 0.5) == 2
    assert "another thresholds" in capsys.readouterr().err


def test_serve_begins_at_a_budget(run, dial, monkeypatch):
    pytest.importorskip("fastapi")
    served = []
    monkeypatch.setattr("ltmp.serve.create_app", lambda predictor, limits, about: served.append((predictor, about)))
    monkeypatch.setattr("ltmp.serve.run", lambda app, bound: bound.close())
    assert run("serve", dial, "--budget", 0.4) == 0
    ((predictor, about),) = served
    assert predictor.model.ltmp.budget == 0.4
    assert about["budget"] == 0.4


def test_app_begins_at_a_budget(run, dial, monkeypatch, capsys):
    class SeenError(Exception):
        pass

    def build_page(explorer):
        assert explorer.budgets.start == 0.4
        raise SeenError("seen")

    monkeypatch.setattr("ltmp.app.build_page", build_page)
    assert run("app", dial, "--budget", 0.4) == 1
    assert "seen" in capsys.readouterr().err
    assert run("app", dial, "--budget", 0.1) == 2
    assert main(["app", "--budget", "0.4"]) == 2


def test_export_is_of_the_budget(run, dial, monkeypatch, capsys):
    def export(network, *_, **__):
        raise package.LTMPError(f"exported at {network.ltmp.budget}")

    monkeypatch.setattr("ltmp.export.export", export)
    assert run("export", dial, "--budget", 0.4) == 1
    assert "exported at 0.4" in capsys.readouterr().err


def test_push_sets_the_default(run, dial, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("ltmp.hub.push_to_hub", lambda *args, **named: pushed.append((args, named)) or "url")
    assert run("push", dial, "--budget", 0.4) == 0
    assert pushed[0][1]["budget"] == 0.4


def test_info_says_how_far_the_dial_goes(dial, capsys):
    assert main(["info", str(dial)]) == 0
    said = capsys.readouterr().out
    assert "dial: 0.3 to 0.95, in 5 rows" in said
    assert "budget: 0.5" in said
    assert read(dial).dial is not None


@pytest.fixture
def quickly(monkeypatch):
    """Costs that are measured in no time, and not worth more."""
    monkeypatch.setattr("ltmp.cli.timing.measure_costs", partial(package.measure_costs, seconds=1e-4))


@pytest.mark.usefixtures("quickly")
def test_a_time_is_met_by_turning_the_dial(run, dial, tmp_path, capsys):
    assert run("eval", dial, "--speed", "--milliseconds", 1e6, "--batch-size", 3, "--json", tmp_path / "eval.json") == 0
    said = capsys.readouterr().out
    assert "the dense model is fast enough, reduction is off: " in said
    assert "predicted for batches of 3" in said
    assert "measured: " in said
    assert json.loads((tmp_path / "eval.json").read_text())["budget"] == 1.0


@pytest.mark.usefixtures("quickly")
def test_a_speed_out_of_reach_is_said(run, dial, capsys):
    assert run("eval", dial, "--images-per-second", 1e9) == 1
    assert "out of reach: for batches of" in capsys.readouterr().err
    assert run("bench", dial, "--images-per-second", 1e9) == 1
    assert "out of reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("eval", ("--budget", 0.5, "--milliseconds", 9), "--budget and --milliseconds each set the dial"),
        ("eval", ("--milliseconds", 9, "--images-per-second", 9), "give one of them"),
        ("eval", ("--milliseconds", 9, "--engine", "onnx"), "is not timed block by block"),
        ("eval", ("--milliseconds", -9), "--milliseconds is -9: expected a number above 0"),
        ("eval", ("--images-per-second", "nan"), "--images-per-second is nan: expected a number above 0"),
        ("bench", ("--milliseconds", 9, "--batch-size", 4), "give one --batch-size"),
    ],
)
def test_wrong_targets_are_one_sentence(verb, arguments, expected, run, dial, capsys):
    assert run(verb, dial, *arguments) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("error: ") == 1
