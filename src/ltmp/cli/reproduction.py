"""The parts of `ltmp reproduce`: commands that are each run once, and one table of their results."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import read
from ..errors import LTMPError
from ..evaluate import describe_machine, tables
from ..evaluate.published import published
from ..files import atomic_path
from ..files.text import read_json
from .commands import call
from .options import NamedModel, TableOptions, short_name
from .runs import InterruptedRunError, Run
from .screen import nested_verb, print_note, print_result

COLUMNS = {
    "method": "method",
    "share": "share",
    "trained_share": "in training",
    "top1": "top-1",
    "drop": "drop",
    "agreement": "agree",
    "images_per_second": "img/s",
    "speedup": "speed-up",
    "source": "source",
}
"""Columns of a model's table and their headings; a column without values is left out."""
HIDDEN_ON_SCREEN = ("trained_share", "speedup")
"""Columns for which a terminal has no room."""


@dataclass(frozen=True)
class VerbCall:
    """A call of a verb with an output folder of its own, recorded under `name` when it is done."""

    name: str
    arguments: list[str]

    def __str__(self) -> str:
        return shlex.join(["ltmp", *self.arguments])


@dataclass(frozen=True)
class ModelPlan:
    """What to run for one model.

    Attributes:
        sizes: for each budget, the image size in pixels at which the dense model costs about as much; empty if the
            model takes one size only.
        notes: what is left out, and why.
        time: an estimate for all parts; empty unless it was asked for.
    """

    model: NamedModel
    folder: Path
    sizes: dict[float, int]
    parts: list[VerbCall]
    notes: list[str]
    time: str = ""


def run_parts(plans: list[ModelPlan], job: Run) -> None:
    """Run the parts that are not done yet."""
    parts = [(plan, part, f"{plan.folder.name}/{part.name}") for plan in plans for part in plan.parts]
    remaining = [entry for entry in parts if job.result(entry[2]) is None]
    for number, (plan, part, name) in enumerate(remaining, len(parts) - len(remaining) + 1):
        print_note(f"part {number} of {len(parts)}, {name}: {part}")
        interrupted = any((plan.folder / part.name / file).exists() for file in ("run.pt", "run.json"))
        try:
            with nested_verb():
                code = call([*part.arguments, *(["--resume"] if interrupted else [])])
        except (KeyboardInterrupt, InterruptedRunError):
            raise InterruptedRunError(f"interrupted in {name}: give the same command again to go on") from None
        except LTMPError:
            print_note(f"stopped in {name}: finished parts are kept, and the same command continues from there")
            raise
        # `certify` exits with 1 if no budget is certified, which is a result
        job.finish(name, {"exit_code": code})


def report(plans: list[ModelPlan], budgets: tuple[float, ...], out: Path, output: TableOptions) -> None:
    """Print a table and the certificate for each model, and write both to the folder."""
    rows_of = {plan.model.model: _rows(plan, budgets) for plan in plans}
    rows = [row for model_rows in rows_of.values() for row in model_rows]
    files = {plan.model.model: plan.folder / "certificate.json" for plan in plans}
    certificates = {name: _read_result(file) for name, file in files.items() if file.exists()}
    values = {"rows": rows, "certified": certificates, "machine": describe_machine()}
    models = {name: _with_headings(model_rows) for name, model_rows in rows_of.items()}
    pages = [
        f"## {name}\n\n{tables.markdown(table)}\n{certificates[name]['paragraph'] if name in certificates else ''}\n"
        for name, table in models.items()
    ]
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text("\n".join(pages), encoding="utf-8")
    tables.write_csv(rows, out / "table.csv")
    for path in (out / "table.json", output.json):
        if path:
            tables.write_json(values, path)
    if output.csv:
        tables.write_csv(rows, output.csv)
    if output.quiet:
        return
    hidden = {COLUMNS[column] for column in HIDDEN_ON_SCREEN}
    for name, table in models.items():
        narrow = [{heading: row[heading] for heading in row if heading not in hidden} for row in table]
        tables.show(narrow, f"{name}, weights frozen")
        if name in certificates:
            print_result(certificates[name]["paragraph"])
    print_result(f"tables written to {out}/table.md, table.csv and table.json")


def _rows(plan: ModelPlan, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """The rows that were measured here, and then the figures that others published for the model."""
    name = plan.model.model
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        comparison = _read_result(plan.folder / f"compare-{budget:g}" / "compare.json")
        measured = {row["name"]: row for row in comparison["rows"]}
        dense = measured["dense"]
        file = "thresholds.safetensors"
        methods = {
            f"paper-{budget:g}/{file}": f"paper's recipe, {budget:g}",
            f"dial-paper/{file} {budget:g}": f"dial, paper's scores, {budget:g}",
            f"dial-best/{file} {budget:g}": f"dial, best scores, {budget:g}",
            f"m {budget:g}": f"fixed-rate merging, {budget:g}",
        }
        if plan.sizes:
            methods[f"resize:{plan.sizes[budget]}"] = f"dense at {plan.sizes[budget]} pixels"
        if not rows:
            rows.append(_row(name, "dense", None, dense, dense["top1"]))
        trained = read(plan.folder / f"paper-{budget:g}" / file).metadata.get("trained_share")
        for key, method in methods.items():
            row = _row(name, method, budget, measured[key], dense["top1"])
            rows.append({**row, "trained_share": trained if "recipe" in method else None})
    for other in published(short_name(name)):
        figures = {"share": other.share, "top1": other.top1, "agreement": None}
        rows.append(_row(name, other.method, None, figures, other.dense, other.source))
    return rows


def _row(
    model: str, method: str, budget: float | None, figures: dict[str, Any], dense: float, source: str = "here"
) -> dict[str, Any]:
    """One row of `table.json`; `dense` is the top-1 accuracy that the drop is taken from."""
    return {
        "model": model, "method": method, "budget": budget, "share": figures["share"], "trained_share": None,
        "top1": figures["top1"], "drop": dense - figures["top1"], "agreement": figures["agreement"],
        "images_per_second": figures.get("images_per_second"), "speedup": figures.get("speedup"), "source": source,
    }  # fmt: skip


def _read_result(path: Path) -> Any:
    """Read the JSON that a part wrote."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise LTMPError(f"{path} cannot be read ({error}): repeat its command, which --dry-run lists") from error


def _with_headings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a model under the headings of its table."""
    headings = {column: heading for column, heading in COLUMNS.items() if any(row[column] is not None for row in rows)}
    return [{heading: row[column] for column, heading in headings.items()} for row in rows]
