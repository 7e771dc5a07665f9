"""Results as a table on the terminal, in Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..files import atomic_path, is_stdout
from ..sanitize import printable, spreadsheet_cell
from .accuracy import Evaluation

Row = Mapping[str, object]


def comparison(evaluation: Evaluation, name: str = "reduced") -> list[Row]:
    """Rows for the dense and the reduced model, for the terminal and for CSV; accuracies in percent."""
    speed = evaluation.throughput
    dense: Row = {
        "model": "dense",
        "top-1": evaluation.dense_top1,
        "top-5": evaluation.dense_top5,
        "agree": 100.0,
        "share": 1.0,
        "std": 0.0,
        "img/s": speed.dense if speed else None,
        "speed-up": 1.0 if speed else None,
    }
    reduced: Row = {
        "model": name,
        "top-1": evaluation.top1,
        "top-5": evaluation.top5,
        "agree": evaluation.agreement,
        "share": evaluation.share,
        "std": evaluation.share_std,
        "img/s": speed.reduced if speed else None,
        "speed-up": speed.speedup if speed else None,
    }
    return [dense, reduced]


def tokens_line(evaluation: Evaluation) -> str:
    """One line with the number of tokens entering the model and the mean number after each block."""
    return f"tokens after each block: {evaluation.tokens} -> {', '.join(f'{kept:.1f}' for kept in evaluation.kept)}"


def show(rows: Sequence[Row], title: str = "", file: TextIO | None = None) -> None:
    """Print rows as a table under a title, using rich if it is installed."""
    file = file or sys.stdout
    columns, cells = _cells(rows)
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(_plain_table(columns, cells, title), file=file)
        return
    # Text(): file and class names must not be parsed as markup. soft_wrap: a title may be wider than its table.
    table, console = Table(), Console(file=file)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in cells:
        table.add_row(*map(Text, row))
    if title:
        console.print(Text(printable(title), style="italic"), soft_wrap=True)
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    columns, cells = _cells(rows)
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_json(values: Any, path: str | Path) -> None:
    """Write JSON to a file, or to stdout if `path` is "-" or another name for it."""
    _write(json.dumps(values, indent=2) + "\n", path)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows with a header as CSV, like `write_json`; text that a spreadsheet would run as a formula is escaped."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: spreadsheet_cell(value) for column, value in row.items()} for row in rows)
    _write(buffer.getvalue(), path)


def as_json(evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """An evaluation as plain values, after the values in `about`."""
    return {**about, **asdict(evaluation)}


def _write(text: str, path: str | Path) -> None:
    if is_stdout(path):
        sys.stdout.write(text)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column names and formatted cells, safe to print."""
    columns = list(rows[0])
    return [*map(printable, columns)], [[format_value(row.get(column)) for column in columns] for row in rows]


def format_value(value: object) -> str:
    """Format a value as the cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return printable(value)


def _plain_table(columns: list[str], cells: list[list[str]], title: str) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [columns, *cells]
    ]
    return "\n".join([printable(title), *lines] if title else lines)
