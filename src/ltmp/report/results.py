"""Results that other verbs wrote as JSON: `ltmp eval`, `ltmp learn` and `ltmp compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import LTMPError, UsageError
from ..evaluate import Evaluation, Throughput
from ..textfiles import read_json
from .collect import DENSE, LEARNED, Budget, Measured

COLUMNS = {
    "top-1": ("top1", "top-1"),
    "top-5": ("top5", "top-5"),
    "agree": ("agreement", "agree"),
    "share": ("share",),
    "std": ("share_std", "std"),
    "img/s": ("images_per_second", "images/s", "img/s"),
    "speed-up": ("speedup", "speed-up"),
}
"""The table's columns, and what other verbs call them."""


@dataclass(frozen=True)
class Result:
    """The part of a report that comes from one JSON file."""

    budgets: list[Budget] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    learning: dict[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """Read what `ltmp eval --json`, `ltmp learn --json` or `ltmp compare --json` wrote.

    Raises:
        LTMPError: no such file, not JSON, or nothing in it that a report shows.
    """
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UsageError(f"no results {path}: give files that `ltmp eval --json` and others wrote") from None
    except (OSError, ValueError) as error:
        raise LTMPError(f"{path} cannot be read as JSON ({error}): write it again with --json") from error
    name = _name(values, path)
    try:
        if isinstance(values, dict) and "kept" in values:
            return Result(budgets=[Budget(name, _evaluation(values))])
        if isinstance(values, dict) and "history" in values:
            return _learned(values, name)
        rows = values.get("rows", values) if isinstance(values, dict) else values
        return Result(measured=[_measured(row) for row in rows])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise LTMPError(
            f"{path} holds no results that a report shows ({type(error).__name__}: {error}): expected the JSON of "
            "ltmp eval, ltmp learn or ltmp compare"
        ) from error


def _name(values: Any, path: Path) -> str:
    thresholds = values.get("thresholds") if isinstance(values, dict) else None
    return Path(thresholds).parent.name or Path(thresholds).stem if isinstance(thresholds, str) else path.stem


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    known = {one.name: values[one.name] for one in fields(Evaluation) if one.name in values}
    if known.get("throughput"):
        known["throughput"] = Throughput(**known["throughput"])
    return Evaluation(**known)


def _learned(values: Mapping[str, Any], name: str) -> Result:
    measured = [Measured(LEARNED, {**_columns(values), "model": name})]
    if values.get("top1_dense") is not None:
        measured.insert(0, Measured(DENSE, {"model": DENSE, "share": 1.0, "top-1": float(values["top1_dense"])}))
    steps = [{"step": step["step"], "loss": step["loss"], "share": step["share"]} for step in values["history"]]
    return Result(measured=measured, learning={name: steps})


def _measured(row: Mapping[str, Any]) -> Measured:
    series = str(row.get("method") or row["model"])
    return Measured(series, {**_columns(row), "model": str(row.get("name") or series)})


def _columns(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The table's columns from whatever they are called in `values`; a share there must be."""
    found = {}
    for column, names in COLUMNS.items():
        value = next((values[name] for name in names if values.get(name) is not None), None)
        found[column] = None if value is None else float(value)
    if found["share"] is None:
        raise KeyError("share")
    return found
