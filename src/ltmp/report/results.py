"""Read the JSON results of `ltmp eval`, `ltmp learn` and `ltmp compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.metadata import Check, checked, integer, list_of, mapping, number, short_repr, text
from ..errors import LTMPError, UsageError
from ..evaluate import Evaluation, Throughput
from ..files.text import read_json
from ..ranges import MAX_BLOCKS
from ..sanitize import printable
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
"""The columns of the table, and their names in the results of other commands."""

MAX_ROWS, MAX_STEPS = 200, 1_000_000
"""Limits per file, beyond any real comparison or run."""

_PERCENT, _SHARE, _SPEED, _COUNT = number(0, 100), number(0, 2), number(1e-9, 1e12), integer(1, 1 << 40)
_CHECKS = {
    **dict.fromkeys(("top-1", "top-5", "agree"), _PERCENT),
    **dict.fromkeys(("share", "std"), _SHARE),
    **dict.fromkeys(("img/s", "speed-up"), _SPEED),
}
_STEP = {"step": integer(0, 1 << 40), "loss": number(-1e30, 1e30), "share": _SHARE}
_THROUGHPUT = {
    **dict.fromkeys(("batch_size", "rounds"), _COUNT),
    **dict.fromkeys(("dense", "reduced", "speedup"), _SPEED),
}
_EVALUATION: dict[str, Check] = {
    **dict.fromkeys(("images", "tokens"), _COUNT),
    **dict.fromkeys(("top1", "top5", "dense_top1", "dense_top5", "agreement"), _PERCENT),
    **dict.fromkeys(("share", "share_std", "share_min", "share_max"), _SHARE),
    "kept": list_of(number(0, 1 << 40), 1, MAX_BLOCKS),
    "skipped": integer(0, 1 << 40),
    "throughput": lambda name, value: _throughput(name, value),
}
"""The check of each field of an evaluation."""


@dataclass(frozen=True)
class Result:
    """The part of a report that comes from one JSON file."""

    budgets: list[Budget] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    learning: dict[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """Read the output of `ltmp eval --json`, `ltmp learn --json` or `ltmp compare --json`.

    Raises:
        UsageError: no such file.
        LTMPError: it is not JSON, is not such a result, contains an invalid value, or has thousands of rows.
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
        rows = values.get("rows") if isinstance(values, dict) else values
        return Result(measured=[_measured(row) for row in _list("rows", rows, MAX_ROWS)])
    except ValueError as error:
        raise LTMPError(
            f"{path} holds no results that a report shows ({error}): expected the JSON of ltmp eval, ltmp learn or "
            "ltmp compare"
        ) from error


def _name(values: Any, path: Path) -> str:
    """The name of a run: the folder of its thresholds, or else the name of the JSON file."""
    thresholds = values.get("thresholds") if isinstance(values, dict) else None
    file = Path(thresholds) if isinstance(thresholds, str) else Path(path.stem)
    return printable(file.parent.name or file.stem)


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    accuracies = ("top1", "top5", "dense_top1", "dense_top5")
    fields = _fields(values, _EVALUATION, optional=(*accuracies, "skipped", "throughput"))
    return Evaluation(**{**dict.fromkeys(accuracies), **fields, "kept": list(fields["kept"])})


def _throughput(name: str, value: Any) -> Throughput:
    return Throughput(**_fields(value, _THROUGHPUT))


def _fields(values: Any, checks: Mapping[str, Check], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Validate the fields of `values` that `checks` names, and ignore the rest.

    Raises:
        ValueError: a field is invalid, or missing and not optional.
    """
    values = mapping("a result", values)
    fields = checked({name: values[name] for name in checks if name in values}, checks)
    missing = next((name for name in checks if name not in fields and name not in optional), None)
    if missing is not None:
        raise ValueError(f"it has no {missing}")
    return fields


def _learned(values: Mapping[str, Any], name: str) -> Result:
    measured = [Measured(LEARNED, {**_columns(values), "model": name})]
    dense = _fields(values, {"top1_dense": _PERCENT}, optional=["top1_dense"])
    if dense:
        measured.insert(0, Measured(DENSE, {"model": DENSE, "share": 1.0, "top-1": float(dense["top1_dense"])}))
    steps = [_fields(step, _STEP) for step in _list("history", values["history"], MAX_STEPS)]
    return Result(measured=measured, learning={name: steps})


def _list(name: str, value: Any, limit: int) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {short_repr(value)}, expected a list")
    if not 0 < len(value) <= limit:
        raise ValueError(f"{len(value):,} entries in {name}, expected 1 to {limit:,}")
    return value


def _measured(row: Any) -> Measured:
    names = _fields(row, dict.fromkeys(("method", "model", "name"), text), optional=("method", "model", "name"))
    series = names.get("method") or names.get("model")
    if not series:
        raise ValueError("it has no model")
    return Measured(series, {**_columns(row), "model": names.get("name") or series})


def _columns(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Read the columns of the table, by any of their names; only the share is required."""
    row: dict[str, float | None] = {}
    for column, names in COLUMNS.items():
        name = next((name for name in names if values.get(name) is not None), None)
        row[column] = None if name is None else float(_CHECKS[column](name, values[name]))
    if row["share"] is None:
        raise ValueError("it has no share")
    return row
