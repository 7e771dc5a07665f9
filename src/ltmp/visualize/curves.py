"""Plots of accuracy against FLOPs share, and matplotlib figures without global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingExtraError
from ..files import atomic_path


def plot_tradeoff(
    shares: Sequence[float], accuracies: Sequence[float], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Plot accuracy in percent against FLOPs share to a .png, .svg or .pdf; the point at 1 is the dense model.

    Raises:
        MissingExtraError: matplotlib is not installed.
        LTMPError: the file cannot be written.
    """
    figure, ((axes,),) = new_figure(1, 1, (5, 3.5))
    points = sorted(zip(shares, accuracies, strict=True))
    axes.plot(*zip(*points, strict=True), marker="o")
    for share, accuracy in points:
        axes.annotate(f"{accuracy:.1f}", (share, accuracy), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set(xlabel="share of the dense model's multiply-adds", ylabel="top-1 accuracy (%)", title=title)
    # at least a point of margin: a drop of a tenth of a point must not look like a cliff
    axes.set_ylim(min(accuracies) - 1, max(accuracies) + 1)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_methods(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Plot the results of a comparison: accuracy against FLOPs share and against measured speed.

    Args:
        rows: from `ltmp.evaluate.compare.rows`, with the dense model first. Without labels, agreement with the dense
            model replaces accuracy.

    Raises:
        MissingExtraError: matplotlib is not installed.
        LTMPError: the file cannot be written.
    """
    dense = rows[0]
    value = "top1" if dense["top1"] is not None else "agreement"
    speeds = dense["images_per_second"] is not None
    figure, (axes,) = new_figure(1, 1 + speeds, (4.5 * (1 + speeds), 3.6))
    for panel, (key, label) in zip(axes, (("share", "FLOPs share"), ("images_per_second", "images/s")), strict=False):
        panel.axhline(dense[value], color="grey", linewidth=0.8, linestyle="--")
        panel.plot([dense[key]], [dense[value]], "o", color="grey", label="dense")
        for method in dict.fromkeys(row["method"] for row in rows[1:]):
            points = sorted((row[key], row[value]) for row in rows[1:] if row["method"] == method)
            if key == "share":
                # with nothing removed, each method is the dense model
                points.append((dense[key], dense[value]))
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        panel.set(xlabel=label, ylabel="top-1 accuracy (%)" if value == "top1" else "agreement with dense (%)")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def new_figure(rows: int, columns: int, size: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes [rows, columns], without pyplot: no window system, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing") from error
    figure = Figure(figsize=size or (1.3 * columns, 1.3 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a matplotlib figure in the format of the path's suffix."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=os.fspath(path).rpartition(".")[2], dpi=150)
