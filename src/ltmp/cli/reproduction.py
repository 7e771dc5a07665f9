"""What `ltmp reproduce` does with each model: commands, each run once, and what they found in one table."""

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
from .screen import part_of_another, say, tell


@dataclass(frozen=True)
class VerbCall:
    """A verb's call in a folder of its own, written down as `name` when it is done."""

    name: str
    words: list[str]

    def __str__(self) -> str:
        return shlex.join(["ltmp", *self.words])


@dataclass(frozen=True)
class ModelPlan:
    """What is done with one model.

    Attributes:
        sizes: pixels a side of the same model at about each budget; none where it runs at its own size only.
        notes: what is left out, and why; time: about how long it takes, where that was asked for.
    """

    model: NamedModel
    folder: Path
    sizes: dict[float, int]
    parts: list[VerbCall]
    notes: list[str]
    time: str = ""


def carry_out(plans: list[ModelPlan], job: Run) -> None:
    """Run the parts that are not done yet."""
    every = [(plan, part, f"{plan.folder.name}/{part.name}") for plan in plans for part in plan.parts]
    todo = [one for one in every if job.done(one[2]) is None]
    for number, (plan, part, name) in enumerate(todo, len(every) - len(todo) + 1):
        tell(f"part {number} of {len(every)}, {name}: {part}")
        stopped = any((plan.folder / part.name / file).exists() for file in ("run.pt", "run.json"))
        try:
            with part_of_another():
                code = call([*part.words, *(["--resume"] if stopped else [])])
        except (KeyboardInterrupt, InterruptedRunError):
            raise InterruptedRunError(f"interrupted in {name}: give the same command again to go on") from None
        except LTMPError:
            tell(f"stopped in {name}: what is done is kept, and the same command goes on from there")
            raise
        # 1 where no budget is certified, which is a result
        job.finish(name, {"exit_code": code})


def _told(path: Path) -> Any:
    """What a part wrote of itself."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise LTMPError(f"{path} cannot be read ({error}): repeat its command, which --dry-run lists") from error


def _rows(plan: ModelPlan, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """What was measured, and what others published of the model."""
    name = plan.model.model
    found: list[dict[str, Any]] = []
    for budget in budgets:
        told = _told(plan.folder / f"compare-{budget:g}" / "compare.json")
        measured = {row["name"]: row for row in told["rows"]}
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
        if not found:
            found.append(_row(name, "dense", None, dense, dense["top1"]))
        trained = read(plan.folder / f"paper-{budget:g}" / file).metadata.get("trained_share")
        for key, method in methods.items():
            row = _row(name, method, budget, measured[key], dense["top1"])
            found.append({**row, "trained_share": trained if "recipe" in method else None})
    for other in published(short_name(name)):
        about = {"share": other.share, "top1": other.top1, "agreement": None}
        found.append(_row(name, other.method, None, about, other.dense, other.source))
    return found


def _row(
    model: str, method: str, budget: float | None, found: dict[str, Any], dense: float, source: str = "here"
) -> dict[str, Any]:
    return {
        "model": model, "method": method, "budget": budget, "share": found["share"], "trained_share": None,
        "top1": found["top1"], "drop": dense - found["top1"], "agreement": found["agreement"],
        "images_per_second": found.get("images_per_second"), "speedup": found.get("speedup"), "source": source,
    }  # fmt: skip


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
"""Of a model's table: names of a row's values, and how they are headed; those that no row has are left out."""
WIDE = ("trained_share", "speedup")
"""What a terminal has no room for."""


def report(plans: list[ModelPlan], budgets: tuple[float, ...], out: Path, output: TableOptions) -> None:
    """A table for each model and what is certified, on the screen and in the folder."""
    found = {plan.model.model: _rows(plan, budgets) for plan in plans}
    rows = [row for of_model in found.values() for row in of_model]
    files = {plan.model.model: plan.folder / "certificate.json" for plan in plans}
    certified = {name: _told(file) for name, file in files.items() if file.exists()}
    told = {"rows": rows, "certified": certified, "machine": describe_machine()}
    shown = {name: _shown(of_model) for name, of_model in found.items()}
    pages = [
        f"## {name}\n\n{tables.markdown(table)}\n{certified[name]['paragraph'] if name in certified else ''}\n"
        for name, table in shown.items()
    ]
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text("\n".join(pages), encoding="utf-8")
    tables.write_csv(rows, out / "table.csv")
    for path in (out / "table.json", output.json):
        if path:
            tables.write_json(told, path)
    if output.csv:
        tables.write_csv(rows, output.csv)
    if output.quiet:
        return
    wide = {COLUMNS[old] for old in WIDE}
    for name, table in shown.items():
        tables.show([{new: row[new] for new in row if new not in wide} for row in table], f"{name}, weights frozen")
        if name in certified:
            say(certified[name]["paragraph"])
    say(f"tables: {out}/table.md, table.csv, table.json")


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A model's rows as they are read."""
    there = {old: new for old, new in COLUMNS.items() if any(row[old] is not None for row in rows)}
    return [{new: row[old] for old, new in there.items()} for row in rows]
