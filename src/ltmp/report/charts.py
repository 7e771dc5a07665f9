"""Charts of the report: inline SVG that uses the font and the text colour of its page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from ..sanitize import printable
from ..visualize.curves import new_figure
from .collect import DENSE, Budget, Measured

INK = "#010203"
"""Placeholder for the page's text colour, replaced by `currentColor` in the SVG."""

COLOURS = ("#2f7fd6", "#d9662a", "#2c9464", "#b9509f", "#8069d8", "#9a7b00", "#cf4a4a", "#4b8a94")
"""All have a contrast of at least 3 to a white page and to a dark one."""

MARKERS = "osD^vPX*"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Draw = Callable[[Any], None]
"""Draws on the figure's axes, an array [rows]."""


def draw_svg(draw: Draw, label: str, *, rows: int = 1, height: float = 2.7) -> str:
    """Draw a chart as wide as a phone, and return it as an SVG element.

    Args:
        draw: called with the axes.
        label: what the chart shows, for screen readers.
        rows: number of axes, one above another.
        height: in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    new_figure(1, 1)  # if matplotlib is missing, this error names the extra to install
    from matplotlib import rc_context

    buffer = io.StringIO()
    settings: Any = {**STYLE, "svg.hashsalt": label}
    with rc_context(settings):
        figure, axes = new_figure(rows, 1, (4.4, height))
        draw(axes[:, 0])
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Reduce an SVG file to its element: sized and coloured by the page, without metadata and unused ids."""
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r' (?:width|height|version|xmlns)="[^"]*"', "", body[: body.index(">")]) + body[body.index(">") :]
    return body.replace("<svg", f'<svg role="img" aria-label={quoteattr(label)}', 1).replace(INK, "currentColor")


def tradeoff(rows: Sequence[Measured], key: str, label: str) -> Draw:
    """Top-1 accuracy against one column of the table, with one line per series; the dense model is a single point."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in rows:
        x, y = result.row.get(key), result.row.get("top-1")
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            points.setdefault(result.series, []).append((x, y))

    def draw(axes: Any) -> None:
        (axis,) = axes
        for number, (series, dots) in enumerate(points.items()):
            dots.sort()
            style = {"color": INK, "linestyle": "none"} if series == DENSE else {"color": _colour(number)}
            axis.plot(*zip(*dots, strict=True), marker=MARKERS[number % len(MARKERS)], label=_short(series), **style)
            for x, y in dots:
                axis.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        accuracies = [y for dots in points.values() for _, y in dots]
        axis.set(xlabel=label, ylabel="top-1 accuracy (%)")
        # at least a point of margin: a drop of a tenth of a point must not look like a cliff
        axis.set_ylim(min(accuracies) - 1, max(accuracies) + 1.5)
        axis.margins(x=0.08)
        axis.legend(loc="lower right", fontsize=8)

    return draw


def tokens(budgets: Sequence[Budget]) -> Draw:
    """Tokens after each block: the mean over images, and the band from the 10th to the 90th percentile."""

    def draw(axes: Any) -> None:
        (axis,) = axes
        for number, budget in enumerate(budgets):
            start = budget.evaluation.tokens
            blocks = range(len(budget.evaluation.kept) + 1)
            axis.plot(blocks, [start, *budget.evaluation.kept], color=_colour(number), label=_short(budget.name))
            if budget.images is not None:
                low, high = (budget.images.kept.float().quantile(q, 0).tolist() for q in (0.1, 0.9))
                axis.fill_between(blocks, [start, *low], [start, *high], color=_colour(number), alpha=0.2, linewidth=0)
        axis.set(xlabel="after block (0: input)", ylabel="tokens")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)

    return draw


def spread(budgets: Sequence[Budget]) -> Draw:
    """Histogram of the images by FLOPs share."""
    shares = {budget.name: budget.images.share.tolist() for budget in budgets if budget.images is not None}
    low = min(min(values) for values in shares.values())
    high = max(max(values) for values in shares.values())

    def draw(axes: Any) -> None:
        (axis,) = axes
        for number, (name, values) in enumerate(shares.items()):
            style = {"color": _colour(number), "alpha": 0.45, "edgecolor": _colour(number)}
            axis.hist(
                values, bins=30, range=(low, max(high, low + 0.01)), histtype="stepfilled", label=_short(name), **style
            )
        axis.set(xlabel="share of the dense model's multiply-adds", ylabel="images")
        axis.legend(fontsize=8)

    return draw


STEPS = {"merge": "merge above\n(cosine)", "prune": "prune below\n(importance)"}


def steps_on(budgets: Sequence[Budget]) -> list[str]:
    """Return those of "merge" and "prune" that can select tokens in at least one block."""
    return [step for step in STEPS if any(math.isfinite(v) for budget in budgets for v in _values(budget, step))]


def thresholds(budgets: Sequence[Budget]) -> Draw:
    """Thresholds of each block, on one axis per step of `steps_on`; a threshold that selects nothing leaves a gap."""

    def draw(axes: Any) -> None:
        for axis, step in zip(axes, steps_on(budgets), strict=True):
            for number, budget in enumerate(budgets):
                values = _values(budget, step)
                style = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
                axis.plot(range(1, len(values) + 1), values, label=_short(budget.name), **style)
            axis.set(ylabel=STEPS[step], xlim=(0.5, max(len(budget.merge or ()) for budget in budgets) + 0.5))
            axis.xaxis.get_major_locator().set_params(integer=True)
            if step == "prune":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
        axes[-1].set_xlabel("block")
        axes[0].legend(fontsize=8)

    return draw


def _values(budget: Budget, step: str) -> list[float]:
    """A step's threshold in each block, NaN if it selects nothing."""
    if step == "merge":
        return [value if value < 1 else math.nan for value in budget.merge or ()]
    return [value if value > 0 else math.nan for value in budget.prune or ()]


def learning(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Draw:
    """Loss and FLOPs share at each step of learning."""

    def draw(axes: Any) -> None:
        for axis, quantity in zip(axes, ("loss", "share"), strict=True):
            for number, (name, steps) in enumerate(runs.items()):
                values = [step[quantity] for step in steps]
                axis.plot(
                    [step["step"] for step in steps], values, color=_colour(number), label=_short(name), linewidth=1
                )
            axis.set_ylabel(quantity)
        axes[1].set_xlabel("step")
        axes[0].legend(fontsize=8)

    return draw


def _short(name: str, limit: int = 28) -> str:
    """Cut a name to fit into a legend, at the beginning: names of runs differ at the end."""
    name = printable(name)
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
