"""Render a report as one HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    """A chart with its title and caption."""

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
    """Write a report as one HTML file, without scripts, web fonts or requests.

    Raises:
        MissingExtraError: matplotlib or Jinja is not installed.
        LTMPError: the report is empty, or the file cannot be written.
    """
    if not report.rows():
        raise LTMPError("nothing to report: give thresholds to evaluate, or the JSON results of other commands")
    page = render(report)
    with atomic_path(path) as temporary:
        # file names may contain bytes that are not UTF-8
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def render(report: Report) -> str:
    """Return the HTML of a report; everything that comes from data is escaped."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "The report") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["class_name"] = lambda index: gallery.class_name(report, index)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    results = report.rows()
    columns = _columns(results)
    return template.render(
        title=report.title,
        tiles=[_tile(budget) for budget in report.budgets],
        columns=columns,
        table=[[_cell(result, column) for column in columns] for result in results],
        charts=_charts(report, results),
        details=_details(report),
        settings=report.settings,
    )


def _columns(results: Sequence[Measured]) -> list[str]:
    """The columns with a value in some row: the model first, then in the order of the longest row."""
    longest = max((list(result.row) for result in results), key=len)
    names = ["model", *(name for name in longest if name != "model")]
    return [name for name in names if any(result.row.get(name) is not None for result in results)]


def _cell(result: Measured, column: str) -> str:
    value = result.row.get(column)
    return str(value) if column == "model" else format_value(value)


def _tile(budget: Budget) -> dict[str, str]:
    """The key figures of a budget."""
    result = budget.evaluation
    tile = {"name": budget.name, "share": f"{100 * result.share:.0f} %", "agreement": f"{result.agreement:.1f} %"}
    if result.top1 is not None and result.dense_top1 is not None:
        tile |= {"top1": f"{result.top1:.1f} %", "change": f"{result.top1 - result.dense_top1:+.1f}"}
    if "certificate" in budget.about:
        tile["certificate"] = str(budget.about["certificate"])
    if result.throughput is not None:
        tile["speedup"] = f"{result.throughput.speedup:.2f}"
    return tile


def _charts(report: Report, results: Sequence[Measured]) -> list[_Chart]:
    """The charts for which there is data."""
    drawn: list[_Chart] = []

    def add(title: str, draw: charts.Draw, caption: str, **size: Any) -> None:
        drawn.append(_Chart(title, charts.draw_svg(draw, title, **size), caption))

    accurate = [result for result in results if result.row.get("top-1") is not None]
    if len(accurate) > 1:
        share = "share of the dense model's multiply-adds"
        caption = "Share of the dense model's multiply-adds, averaged over images; 1 is the dense model."
        add("Accuracy against compute", charts.tradeoff(accurate, "share", share), caption)
    timed = [result for result in accurate if result.row.get("img/s") is not None]
    if len(timed) > 1:
        caption = "Images per second as measured; dense and reduced runs alternate in one process."
        add("Accuracy against speed", charts.tradeoff(timed, "img/s", "images per second"), caption)
    if report.budgets:
        caption = "Mean over images; the band spans the 10th to the 90th percentile."
        add("Tokens kept", charts.tokens(report.budgets), caption)
    per_image = [budget for budget in report.budgets if budget.images is not None]
    if per_image:
        caption = "The thresholds are the same for all images: easy images lose more tokens than hard ones."
        add("How compute spreads over images", charts.spread(per_image), caption)
    known = [budget for budget in report.budgets if budget.merge is not None and budget.prune is not None]
    steps = charts.steps_on(known)
    if steps:
        caption = (
            "Tokens more similar than the merge threshold are merged, tokens less important than the prune threshold "
            "are pruned. No dot: the step is off in that block."
        )
        add("Thresholds", charts.thresholds(known), caption, rows=len(steps), height=1.8 * len(steps))
    if report.learning:
        add("Learning", charts.learning(report.learning), "Loss and FLOPs share at each step.", rows=2, height=3.6)
    return drawn


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
        percentiles={
            "10th percentile": share.quantile(0.1).item(),
            "median": share.quantile(0.5).item(),
            "90th percentile": share.quantile(0.9).item(),
        },
    )
