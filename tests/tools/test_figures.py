"""The tables of figures on the pages are those that tools/figures.py makes from benchmarks/*.csv."""

from __future__ import annotations

import csv
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import figures

    return figures


def test_pages_show_the_measured_figures() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "figures.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_changed_measurement_makes_its_pages_stale(figures, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = figures.read("accuracy")
    row = next(row for row in rows if (row["method"], row["scores"], row["dtype"]) == ("dial", "best", "float32"))
    row["top1"] = "60.00"
    monkeypatch.setattr(figures, "read", lambda name: rows)
    page = ROOT / "docs" / "accuracy.md"
    assert "60.00" in figures.rewrite(page.read_text())
    assert figures.rewrite("no table") == "no table"


def test_an_unknown_table_or_query_is_refused(figures) -> None:
    with pytest.raises(SystemExit, match="no table is named nothing"):
        figures.rewrite("<!-- figures:nothing -->\n<!-- /figures -->")
    with pytest.raises(SystemExit, match="no row has"):
        figures.Runs(figures.read("accuracy")).where(scores="nothing")


def test_means_are_rounded_half_up_and_take_only_filled_cells(figures) -> None:
    runs = figures.Runs([{"top1": "69.40"}, {"top1": "69.21"}, {"top1": ""}])
    assert runs.shown("top1") == "69.31"  # of 69.305
    assert runs.shown("top1", 1) == "69.3"
    assert figures.rounded(None, 2) == ""
    assert figures.rounded(Decimal("-0.001"), 2) == "0.00"


def test_cells_of_the_record_are_numbers_in_range() -> None:
    with (ROOT / "benchmarks" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 500
    for row in rows:
        for column, most in {"budget": 1, "share": 1, "top1": 100, "dense_top1": 100, "agreement": 100}.items():
            assert row[column] == "" or 0 < float(row[column]) <= most, row
        assert row["date"]
        assert row["commit"]
        assert row["model"]
        assert row["method"]
