"""The page: it shows what was measured, escapes what comes from data, and asks the network for nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import ltmp
from helpers import attach_reducing, random_images, tiny_vit
from ltmp.data import make_loader
from ltmp.errors import LTMPError
from ltmp.evaluate import ImageRows, tables
from ltmp.report import Measured, Report, evaluate_budget, read_result, write_report
from ltmp.report.changes import find_changes
from ltmp.report.charts import COLOURS
from ltmp.report.gallery import ALL, row_length
from ltmp.report.page import render

CHROMIUM = shutil.which("chromium")
EVIL = '<script>alert("x")</script>$\\frac{1}'


@pytest.fixture(scope="module")
def budget():
    images = random_images(24)
    model = attach_reducing(tiny_vit(), images)
    loader = make_loader(torch.utils.data.TensorDataset(images, torch.arange(24) % 5), 8)
    return evaluate_budget(model, loader, f"budget {EVIL}", about={"file": EVIL})


@pytest.fixture(scope="module")
def page(budget):
    noise = np.random.default_rng(0)
    return Report(
        title=EVIL,
        budgets=[budget, replace(budget, name="second, of a long name " * 5)],
        measured=[Measured("topk", {"model": "topk 0.5", "share": 0.5, "top-1": 30.0, "img/s": 5.0})],
        learning={"run": [{"step": i, "loss": 1 / (i + 1), "share": 0.6} for i in range(5)]},
        classes=[EVIL, "cat", "dog"],
        picture=lambda index: Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8)),
        image_name=lambda index: f"{EVIL}{index}",
        settings={"key": EVIL},
    )


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_rows_of_all_batches_are_kept(budget):
    rows = budget.images
    assert len(rows.share) == budget.evaluation.images == 24
    assert rows.share.mean().item() == pytest.approx(budget.evaluation.share)
    assert len(budget.merge) == len(budget.prune) == 3


def test_everything_is_on_the_page(page):
    text = Reader(render(page)).text
    sections = (
        "Accuracy against compute", "Accuracy against speed", "Tokens kept", "How compute spreads over images",
        "Thresholds", "Learning", "Cheapest", "Most expensive", "predictions that changed", "Settings and versions",
    )  # fmt: skip
    for wanted in (*sections, "topk 0.5", "second"):
        assert wanted in text
    assert f"{page.budgets[0].evaluation.share:.3f}" in text


def test_nothing_from_data_becomes_markup_and_nothing_is_fetched(page):
    html = render(page)
    found = Reader(html)
    assert "script" not in found.tags
    assert EVIL in found.text
    assert {address[:5] for address in found.addresses if not address.startswith("#")} == {"data:"}
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", html)


def test_ids_are_unique_and_found(page):
    html = render(replace(page, title="t"))
    ids = re.findall(r' id="([^"]*)"', html)
    assert set(re.findall(r"[\"(]#([\w-]+)[\")]", html)) <= set(ids)
    assert len(re.findall(r"<svg", html)) == 6
    assert "#010203" not in html
    assert "currentColor" in html


def test_size_has_a_limit(page, budget, tmp_path):
    """Photographs of noise are the largest there are."""
    many = replace(page, budgets=[replace(budget, name=f"budget {i}") for i in range(8)])
    write_report(many, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    assert row_length(3) == 12
    assert 3 * 50 * row_length(50) <= ALL


@pytest.mark.parametrize("page_colour", ["#ffffff", "#14171a"])
def test_lines_are_seen_on_both_pages(page_colour):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in COLOURS:
        low, high = sorted([luminance(colour), luminance(page_colour)])
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_changes_by_hand():
    label, dense, reduced = (torch.tensor(values) for values in ([0, 0, 1, 1, 2], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1]))
    changes = find_changes(ImageRows(label, dense, reduced, torch.ones(5), torch.ones(5, 1)))
    assert (changes.broken, changes.repaired, changes.other) == (2, 1, 1)
    assert changes.flipped == [1, 2, 3, 4]
    assert [(one.label, one.images, one.gain) for one in changes.lost] == [(0, 2, -1)]
    assert changes.gained == []
    assert dict(changes.moves)[(1, 1, 0)] == 1


def test_without_labels_only_answers_are_compared(page, budget):
    rows = replace(budget.images, label=torch.full((24,), -1))
    unlabelled = replace(budget.evaluation, top1=None, top5=None, dense_top1=None, dense_top5=None)
    text = Reader(render(replace(page, budgets=[replace(budget, images=rows, evaluation=unlabelled)]))).text
    assert "from wrong to right" not in text
    assert find_changes(rows).lost == []


def test_results_of_other_verbs(budget, tmp_path):
    written = {
        "eval": tables.as_json(budget.evaluation, model="vit", thresholds="runs/deit/thresholds.safetensors"),
        "learn": {"thresholds": "runs/deit/thresholds.safetensors", "share": 0.61, "top1": 70.0, "top1_dense": 72.0,
                  "history": [{"step": 1, "steps": 2, "loss": 0.5, "share": 0.7, "lr": 1}]},
        "compare": {"model": "vit", "rows": [
            {"method": "dense", "name": "dense", "share": 1.0, "top1": 72.0, "images_per_second": 9.0},
            {"method": "topk", "name": "topk 0.6", "share": 0.6, "top1": 69.0, "images_per_second": None}]},
    }  # fmt: skip
    for name, values in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    evaluated, learned, compared = (read_result(tmp_path / f"{name}.json") for name in written)
    assert asdict(evaluated.budgets[0].evaluation) == asdict(budget.evaluation)
    assert evaluated.budgets[0].name == "deit"
    assert [(one.series, one.row["share"], one.row["top-1"]) for one in learned.measured] == [
        ("dense", 1.0, 72.0),
        ("learned thresholds", 0.61, 70.0),
    ]
    assert learned.learning["deit"][0]["loss"] == 0.5
    assert [(one.series, one.row["model"]) for one in compared.measured] == [("dense", "dense"), ("topk", "topk 0.6")]
    text = Reader(render(Report("all", evaluated.budgets, compared.measured, learned.learning))).text
    assert "topk 0.6" in text
    assert text.count("dense ") < 10


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', '[{"method": "m"}]', '{"kept": [1]}', '{"history": 3, "share": 1}']
)
def test_other_json_is_refused(text, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(LTMPError, match=r"odd\.json"):
        read_result(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"top1": "x"}, "top1 is 'x', expected a number from 0 to 100"),
        ({"share": None}, "it has no share"),
        ({"share": -5}, "share is -5, expected a number"),
        ({"share_std": float("nan")}, "NaN is not a number"),
        ({"kept": None}, "kept"),
        ({"kept": ["x"]}, "kept is 'x'"),
        ({"throughput": {}}, "it has no batch_size"),
        ({"throughput": [1]}, "a result is a list, expected a mapping"),
        ({"images": 10**400}, "images is 1000"),
        ({"history": []}, "0 entries in history, expected 1 to"),
        ({"history": [{"step": 1, "loss": "x", "share": 1}]}, "loss is 'x'"),
        ({"rows": [{"name": "m", "model": "m", "share": 0.5, "top1": 101}]}, "top1 is 101"),
        ({"rows": [{"model": "\ud800", "share": 0.5}]}, "model is .*without control characters"),
        ({"rows": [{"model": ["m"], "share": 0.5}]}, "model is a list"),
        ({"rows": [{"model": "m", "share": 0.5}] * 20_000}, "20,000 entries in rows, expected 1 to 200"),
    ],
)
def test_damaged_results_are_refused_by_their_field(changes, why, budget, tmp_path):
    path = tmp_path / "odd.json"
    values = {**tables.as_json(budget.evaluation, thresholds="runs/deit/thresholds.safetensors"), **changes}
    if {"history", "rows"} & changes.keys():
        del values["kept"]
    path.write_text(json.dumps(values))
    with pytest.raises(LTMPError, match=rf"odd\.json .*{why}"):
        read_result(path)


def test_names_that_are_no_text_are_spelt_out(budget, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(tables.as_json(budget.evaluation, thresholds="runs/\ud800/thresholds.safetensors")))
    report = Report("\udcff", read_result(path).budgets, settings={"results": "\udcff"})
    write_report(report, tmp_path / "page.html")
    assert "\\ud800" in (tmp_path / "page.html").read_text()


def test_an_empty_report_is_refused(tmp_path):
    with pytest.raises(LTMPError, match="nothing to report"):
        write_report(Report("empty"), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_fetches_nothing_and_complains_of_nothing(page, tmp_path, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    write_report(page, tmp_path / "page.html")
    seen, wrong = [], []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(offline=True, viewport={"width": width, "height": 800}, color_scheme="dark")
        tab = context.new_page()
        tab.on("request", lambda request: seen.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        text = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        browser.close()
    assert [url for url in seen if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()]
    assert wrong == []
    assert text == "rgb(231, 234, 237)"


def test_thresholds_that_are_off_are_no_error(tmp_path):
    model = ltmp.attach(tiny_vit())
    loader = make_loader(torch.utils.data.TensorDataset(random_images(4), torch.arange(4)), 4)
    write_report(Report("off", [evaluate_budget(model, loader, "off", speed=False)]), tmp_path / "page.html")
    assert "0 of 4 predictions" in (tmp_path / "page.html").read_text()
