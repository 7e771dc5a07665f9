"""The page: what is in a report, as one HTML file that asks the network for nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..errors import LTMPError, MissingExtraError
from ..evaluate.tables import format_value
from ..files import atomic_path
from . import charts, gallery
from .changes import Changes, find_changes
from .collect import Budget, Measured, Report


@dataclass(frozen=True)
class _Chart:
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class _Detail:
    """The page's section on one budget."""

    budget: Budget
    cheapest: list[gallery.GalleryImage]
    costliest: list[gallery.GalleryImage]
    changes: Changes
    flipped: list[gallery.GalleryImage]
    percentiles: dict[str, float]


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as one HTML file: no scripts, no fonts, no requests.

    Raises:
        MissingExtraError: matplotlib or Jinja is not installed.
        LTMPError: nothing to show, or the file cannot be written.
    """
    if not report.rows():
        raise LTMPError("nothing to report: give thresholds to evaluate, or results that other verbs wrote as JSON")
    page = render(report)
    with atomic_path(path) as temporary:
        # names of files may be no text
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def render(report: Report) -> str:
    """The page as text. Everything that comes from data is escaped."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "The report") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["class_name"] = lambda index: gallery.class_name(report, index)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    rows = report.rows()
    columns = [name for name in ("model", *_columns(rows)) if any(one.row.get(name) is not None for one in rows)]
    return template.render(
        title=report.title,
        tiles=[_tile(budget) for budget in report.budgets],
        columns=columns,
        table=[[_cell(one, column) for column in columns] for one in rows],
        charts=_charts(report, rows),
        details=_details(report),
        settings=report.settings,
    )


def _columns(rows: Sequence[Measured]) -> list[str]:
    """Every column that some row has, in the order of the fullest."""
    return [name for name in max((list(one.row) for one in rows), key=len) if name != "model"]


def _cell(one: Measured, column: str) -> str:
    value = one.row.get(column)
    return str(value) if column == "model" else format_value(value)


def _tile(budget: Budget) -> dict[str, str]:
    """A budget in four figures."""
    done = budget.evaluation
    tile = {"name": budget.name, "share": f"{100 * done.share:.0f} %", "agreement": f"{done.agreement:.1f} %"}
    if done.top1 is not None and done.dense_top1 is not None:
        tile |= {"top1": f"{done.top1:.1f} %", "change": f"{done.top1 - done.dense_top1:+.1f}"}
    if "certificate" in budget.about:
        tile["certificate"] = str(budget.about["certificate"])
    if done.throughput is not None:
        tile["speedup"] = f"{done.throughput.speedup:.2f}"
    return tile


def _charts(report: Report, rows: Sequence[Measured]) -> list[_Chart]:
    """Every chart that there is something for."""
    per_image = [budget for budget in report.budgets if budget.images is not None]
    known = [budget for budget in report.budgets if budget.merge is not None and budget.prune is not None]
    steps = charts.steps_on(known)
    accuracy = [one for one in rows if one.row.get("top-1") is not None]
    timed = [one for one in accuracy if one.row.get("img/s") is not None]
    wanted: list[tuple[Any, str, str, Callable[[], charts.Draw], dict[str, Any]]] = [
        (
            len(accuracy) > 1,
            "Accuracy against compute",
            "Share of the dense model's multiply-adds, a mean over images; 1 is dense.",
            lambda: charts.tradeoff(accuracy, "share", "share of the dense model's multiply-adds"),
            {},
        ),
        (
            len(timed) > 1,
            "Accuracy against speed",
            "Images per second as measured, dense and reduced in turns in one process.",
            lambda: charts.tradeoff(timed, "img/s", "images per second"),
            {},
        ),
        (
            report.budgets,
            "Tokens kept",
            "Mean over images; the band holds 10 to 90 % of them.",
            lambda: charts.tokens(report.budgets),
            {},
        ),
        (
            per_image,
            "How compute spreads over images",
            "One threshold for all: easy images lose more tokens than hard ones.",
            lambda: charts.spread(per_image),
            {},
        ),
        (
            steps,
            "Thresholds",
            "Tokens that are more alike merge, less important ones go; no dot: the step is off in that block.",
            lambda: charts.thresholds(known),
            {"rows": len(steps), "height": 1.8 * len(steps)},
        ),
        (
            report.learning,
            "Learning",
            "Loss and share, step by step.",
            lambda: charts.learning(report.learning),
            {"rows": 2, "height": 3.6},
        ),
    ]
    return [
        _Chart(title, charts.draw_svg(draw(), title, **how), caption)
        for show, title, caption, draw, how in wanted
        if show
    ]


def _details(report: Report) -> list[_Detail]:
    budgets = [budget for budget in report.budgets if budget.images is not None]
    count = gallery.row_length(len(budgets))
    return [_detail(report, budget, count) for budget in budgets]


def _detail(report: Report, budget: Budget, count: int) -> _Detail:
    assert budget.images is not None
    changes = find_changes(budget.images)
    share = budget.images.share
    return _Detail(
        budget=budget,
        cheapest=gallery.by_cost(report, budget, count, costliest=False),
        costliest=gallery.by_cost(report, budget, count, costliest=True),
        changes=changes,
        flipped=gallery.flipped(report, budget, changes, count),
        percentiles={f"{100 * q:.0f} %": share.quantile(q).item() for q in (0.1, 0.5, 0.9)},
    )
