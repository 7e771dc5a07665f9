"""Results on the terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from ltmp.errors import LTMPError
from ltmp.evaluate import Evaluation, Throughput, tables

RESULT = Evaluation(
    images=10,
    top1=70.0,
    top5=None,
    dense_top1=72.0,
    dense_top5=None,
    agreement=95.0,
    share=0.6123,
    share_std=0.05,
    share_min=0.5,
    share_max=0.7,
    tokens=17,
    kept=[12.5, 8.0],
    throughput=Throughput(4, 9, 100.0, 150.0, 1.5),
)


@pytest.mark.parametrize("rich", [True, False])
def test_table_on_screen(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    screen = io.StringIO()
    tables.show(tables.comparison(RESULT), "a title", screen)
    text = screen.getvalue()
    assert all(part in text for part in ("a title", "top-1", "70.0", "72.0", "0.612", "150.0"))
    assert "None" not in text


def test_tokens_of_every_block():
    assert tables.tokens_line(RESULT) == "tokens after each block: 17 -> 12.5, 8.0"


def test_table_fits_eighty_columns():
    screen = io.StringIO()
    tables.show(tables.comparison(RESULT, name="target 0.75"), file=screen)
    assert "…" not in screen.getvalue()
    assert "speed-up" in screen.getvalue()


def test_markdown_lines_up():
    lines = tables.markdown([{"a": 1, "b": 0.5}, {"a": None, "b": 123.456}]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 0.500 |", "| - | 123.5 |"]


def test_json_and_csv_read_back(tmp_path):
    tables.write_json(tables.as_json(RESULT, model="vit"), tmp_path / "result.json")
    tables.write_csv(tables.comparison(RESULT), tmp_path / "result.csv")
    values = json.loads((tmp_path / "result.json").read_text())
    assert (values["model"], values["share"], values["throughput"]["speedup"]) == ("vit", 0.6123, 1.5)
    rows = list(csv.DictReader((tmp_path / "result.csv").open()))
    assert [row["top-1"] for row in rows] == ["72.0", "70.0"]


def test_dash_is_the_screen(capsys):
    tables.write_json({"a": 1}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LTMPError, match="cannot write"):
        tables.write_json({}, tmp_path / "file" / "result.json")


HOSTILE = "o[/red]\x1b]0;title\x07\x9b31m\u202egnp.exe"


@pytest.mark.parametrize("rich", [True, False])
def test_untrusted_text_is_escaped(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    screen = io.StringIO()
    tables.show([{HOSTILE: HOSTILE}], HOSTILE, screen)
    assert screen.getvalue().count(r"o[/red]\x1b]0;title\x07\x9b31m\u202egnp.exe") == 3


def test_titles_are_one_line():
    screen = io.StringIO()
    tables.show([{"a": 1}], "a dial from 0.349755 to 0.952338 of " + 20 * "a long name ", screen)
    assert screen.getvalue().splitlines()[0].endswith("a long name ")


def test_csv_has_no_formulas_and_json_stays_exact(tmp_path):
    values = ["=HYPERLINK(1)", "+1", "-1", "@x", "\tx", "fine", -1.5, None]
    tables.write_csv([{"a": value} for value in values], tmp_path / "a.csv")
    rows = [row["a"] for row in csv.DictReader((tmp_path / "a.csv").open(newline=""))]
    assert rows == ["'=HYPERLINK(1)", "'+1", "'-1", "'@x", "'\tx", "fine", "-1.5", ""]
    tables.write_json([*values, HOSTILE], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == [*values, HOSTILE]


def test_pipes_and_devices_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    tables.write_json({"a": 1}, pipe)
    reader.join(5)
    assert json.loads(read[0]) == {"a": 1}
    assert pipe.is_fifo()
    tables.write_csv([{"a": 1}], "/dev/null")
    assert Path("/dev/null").is_char_device()
