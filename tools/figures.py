#!/usr/bin/env python3
"""Write the tables of results in README.md and docs/ from benchmarks/*.csv; --check only reports stale pages.

A table is between `<!-- figures:NAME -->` and `<!-- /figures -->`, where NAME is a key of `TABLES`. Means over seeds
are computed here: a row of a file is one run or, if only a mean was recorded, the mean over the seeds in its column.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?P<begin><!-- figures:(?P<name>[\w-]+) -->\n).*?(?P<end><!-- /figures -->)", re.DOTALL)

Row = dict[str, str]
Table = list[list[str]]

VIT_S = "vit_small_patch14_dinov2, Tiny-ImageNet-200"
VALIDATION = {"model": VIT_S, "images": "validation, 2000"}
BUDGETS = ("0.80", "0.60", "0.47", "0.37")
SAME_NUMBER = "variant m, the same number of tokens a block"
SAME_PART = "variant m, the same part of the tokens a block"


def read(name: str) -> list[Row]:
    """The rows of benchmarks/NAME.csv, oldest first."""
    with (ROOT / "benchmarks" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Runs(list[Row]):
    """Rows of a CSV file, one per run."""

    def where(self, **values: str) -> Runs:
        """The rows that have these values; exits if there are none, as the query must be wrong."""
        runs = Runs(row for row in self if all(row[column] == value for column, value in values.items()))
        if not runs:
            raise SystemExit(f"no row has {values}")
        return runs

    def mean(self, column: str) -> Decimal | None:
        """Mean of the cells that are not empty, None if all are."""
        cells = [Decimal(row[column]) for row in self if row[column]]
        return sum(cells, Decimal()) / len(cells) if cells else None

    def shown(self, column: str, digits: int = 2) -> str:
        """The mean as text, rounded."""
        return rounded(self.mean(column), digits)

    def drop(self) -> str:
        """Percentage points of top-1 below the dense model of the same runs."""
        top1, dense = self.mean("top1"), self.mean("dense_top1")
        return rounded(None if top1 is None or dense is None else dense - top1, 2)


def rounded(value: Decimal | None, digits: int) -> str:
    if value is None:
        return ""
    text = str(value.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))
    return text.removeprefix("-") if not float(text) else text


def main_runs() -> Runs:
    """The main experiment: frozen weights, float32, on the validation images."""
    return Runs(read("accuracy")).where(**VALIDATION, dtype="float32")


def dial(budget: str) -> Runs:
    return main_runs().where(method="dial", scores="best", budget=budget)


def fixed(budget: str) -> Runs:
    return main_runs().where(method="fixed-rate merging", notes=SAME_NUMBER, budget=budget)


def dense() -> str:
    return main_runs().where(method="dense", machine="CPU").shown("top1")


def accuracy() -> Table:
    """Accuracy by budget against dense and fixed-rate merging, with the result of each seed."""
    table = [
        ["budget", "share", "top-1, mean of three seeds (each)", "below dense", "fixed-rate merging", "above it"],
        ["dense", "1", dense(), "", "", ""],
    ]
    for budget in BUDGETS:
        ours, other = dial(budget), fixed(budget)
        top1 = ours.mean("top1")
        assert top1 is not None
        above = rounded(top1 - Decimal(other[0]["top1"]), 2)
        seeds = ", ".join(row["top1"] for row in ours if row["top1"])
        at = f"{other.shown('top1')} at {other.shown('share', 3)}"
        table.append([budget, ours.shown("share", 3), f"{ours.shown('top1')} ({seeds})", ours.drop(), at, above])
    return table


def results() -> Table:
    """Summary of accuracy and speed, for the README."""
    table = [["", "FLOPs", "dense", "ltmp", "fixed-rate merging"]]
    for budget in BUDGETS:
        top1 = (dense(), dial(budget).shown("top1"), fixed(budget).shown("top1"))
        table.append(["top-1 accuracy, %", percent(dial(budget).shown("share")), *top1])
    for case in ("deit_s", "deit_b", "deit_s_16"):
        best, _, graph = gpu_runs(case)
        name = f"speed, H100, {NAMES[case]}, batch {graph['batch']}"
        table.append([name, percent(share(graph)), "1x", f"{ratio(graph, best)}x", ""])
    # rows of earlier dates are of earlier versions; the last setting of a date is the fastest
    runs = cpu_runs()
    newest = runs.where(date=max(row["date"] for row in runs))
    for row in newest.where(processor=newest[-1]["processor"], every=newest[-1]["every"]):
        option = "" if row["every"] == "1" else f", `--every {row['every']}`"
        name = f"speed, {row['processor']}, DeiT-S{option}, batch {row['batch']}"
        table.append([name, percent(share(row)), "1x", f"{row['ratio']}x", ""])
    return table


def percent(share: str) -> str:
    return f"{round(100 * Decimal(share))} %"


ABLATION = (
    ("fixed-rate merging, same number per block", {"notes": SAME_NUMBER, "machine": "CPU"}),
    ("fixed-rate merging, same fraction per block", {"notes": SAME_PART}),
    ("`--scores paper`", {"method": "dial", "scores": "paper"}),
    ("`--similarity heads --matching mutual` *", {"method": "dial", "scores": "heads, mutual (1 round)"}),
    ("and `--size-power 0.3` *", {"method": "dial", "scores": "heads, mutual (1 round), size power 0.3"}),
    ("`--scores attention`", {"method": "dial", "scores": "attention"}),
    ("`--scores best`", {"method": "dial", "scores": "best"}),
    ("`ltmp learn --distill`, one budget (1 seed) *", {"method": "learn --distill"}),
)


def ablation() -> Table:
    """Drop of top-1 and agreement with the dense model, by method and scores, in bfloat16."""
    runs = Runs(read("accuracy")).where(**VALIDATION, dtype="bfloat16")
    table = [["method"] + [f"{budget}: {what}" for budget in BUDGETS[1:] for what in ("drop", "agrees")]]
    for name, query in ABLATION:
        line = [name]
        for budget in BUDGETS[1:]:
            # a method need not have runs at every budget
            at_budget = Runs(row for row in runs.where(**query) if row["budget"] == budget)
            line += [at_budget.drop(), at_budget.shown("agreement", 1)]
        table.append(line)
    return table


TUNED = (
    ("paper", "rank 8, 4000 images, 249 steps of 16, no labels", "0.47"),
    ("heads, mutual (1 round), size power 0.3", "--labels 0.3, 4000 views", "0.47"),
    ("attention", "--labels 0.3, 4000 views", "0.47"),
    ("attention", "--labels 0.3, 4000 views", "0.60"),
    ("attention", "--labels 0.3, 8000 views", "0.60"),
    ("best", "--labels 0.3, 4000 views", "0.60"),
)


def tuning() -> Table:
    """Tuned against frozen weights, by scores and budget."""
    runs = Runs(read("accuracy")).where(**VALIDATION, dtype="bfloat16")
    table = [["scores", "budget", "labels, images", "seeds", "share", "frozen: drop", "tuned: drop", "tuned: agrees"]]
    for scores, note, budget in TUNED:
        tuned = Runs(
            row for row in runs.where(method="tune lora", scores=scores, budget=budget) if row["notes"].startswith(note)
        )
        seeds = max(1, len({row["seed"] for row in tuned if row["top1"] and row["seed"]}))
        frozen = runs.where(method="dial", scores=scores, budget=budget)
        labelled = re.match(r"--labels (\S+), (\d+)", note)
        labels = f"{labelled[1]}, {labelled[2]}" if labelled else "none, 4000"
        name = f"`--scores {scores}`" if "," not in scores else "heads, mutual, size power 0.3 *"
        table.append(
            [
                name,
                budget,
                labels,
                str(seeds),
                tuned.shown("share", 3),
                frozen.drop(),
                tuned.drop(),
                tuned.shown("agreement", 1),
            ]
        )
    return table


def generality() -> Table:
    """Drops of top-1 on models that the usual shapes were not found on."""
    runs = Runs(row for row in read("accuracy") if "benchmarks/generality.py" in row["notes"])
    table = [["model", "top-1, dense", "shapes", "scores", *BUDGETS[:3]]]
    previous = ""
    for model, method, scores in dict.fromkeys((row["model"], row["method"], row["scores"]) for row in runs):
        selected = runs.where(model=model, method=method, scores=scores)
        head = [model, selected.shown("dense_top1", 1)] if model != previous else ["", ""]
        shapes = method.removeprefix("dial, ").removesuffix(" shapes")
        at = [selected.where(budget=budget) for budget in BUDGETS[:3]]
        drops = [f"{one.drop()} ({one.shown('agreement', 1)}) at {one.shown('share')}" for one in at]
        table.append([*head, shapes, f"`{scores}`" if scores else "", *drops])
        previous = model
    return table


def compare() -> Table:
    """Methods at about equal shares, calibrated and not learned."""
    runs = Runs(row for row in read("accuracy") if row["method"].startswith("compare, "))
    table = [["method", "share", "top-1", "agrees with dense"]]
    for row in runs:
        name = row["method"].removeprefix("compare, ")
        table.append([name if name == "dense" else f"`{name}`", row["share"], row["top1"], row["agreement"]])
    return table


def int8() -> Table:
    """Top-1 of exported models, in float and quantised."""
    runs = Runs(read("accuracy"))
    return [["", "dense", "reduced"]] + [
        [name, *(runs.where(method=f"export, {form}", dtype=dtype).shown("top1", 1) for form in ("dense", "reduced"))]
        for name, dtype in (("float32", "float32"), ("INT8", "int8"))
    ]


NAMES = {
    "deit_s": "DeiT-S",
    "deit_b": "DeiT-B",
    "vit_l": "ViT-L",
    "vit_b_384": "ViT-B 384 px",
    "vit_s_518": "ViT-S/14 518 px",
    "deit_s_64": "DeiT-S",
    "deit_s_16": "DeiT-S",
    "deit_s_1": "DeiT-S",
}


def gpu_runs(case: str) -> tuple[Row, Row, Row]:
    """The newest rows of a case of benchmarks/gpu.py: fastest dense way, Triton engine, graph engine."""
    newest = {row["way"]: row for row in read("results") if row["case"] == case}
    best = max((row for way, row in newest.items() if way.startswith("dense")), key=speed)
    return best, newest["triton"], newest["graph"]


def speed(row: Row) -> float:
    return float(row["images_per_second"])


def share(row: Row, digits: int = 2) -> str:
    return rounded(Decimal(row["share"]), digits)


def ratio(row: Row, dense: Row) -> str:
    return rounded(Decimal(row["images_per_second"]) / Decimal(dense["images_per_second"]), 2)


def thousands(row: Row) -> str:
    return f"{speed(row):,.0f}"


def gpu() -> Table:
    """Images per second on one H100, against the fastest dense way."""
    table = [["model, batch", "best dense, images/s", "exact sizes", "one graph", "share", "ideal", "ratio"]]
    for case, name in NAMES.items():
        best, exact, graph = gpu_runs(case)
        ideal = rounded(1 / Decimal(graph["share"]), 2)
        speeds = [thousands(row) for row in (best, exact, graph)]
        table.append([f"{name}, {graph['batch']}", *speeds, share(graph, 3), ideal, ratio(graph, best)])
    return table


def cpu_runs() -> Runs:
    """Runs of DeiT-S on two cores of each processor, with the paper's scores."""
    return Runs(read("cpu")).where(model="deit_small_patch16_224", threads="2", scores="paper")


def cpu() -> Table:
    """Speed over dense on each processor."""
    table = [["processor", "`--every`", "batch", "share", "ideal", "ratio", "with the host's own linear layers"]]
    for row in cpu_runs():
        ideal = rounded(1 / Decimal(row["share"]), 2)
        keys = (row[key] for key in ("processor", "every", "batch"))
        table.append([*keys, row["share"], ideal, row["ratio"], row["ratio_host_linear"]])
    return table


def scores() -> Table:
    """Speed over dense by scores, on one processor."""
    table = [["scores", "share", "ratio"]]
    for row in Runs(read("cpu")).where(model="vit_small_patch14_dinov2, 224 px"):
        table.append([f"`--scores {row['scores']}`", row["share"], row["ratio"]])
    return table


TABLES: dict[str, Callable[[], Table]] = {
    table.__name__: table
    for table in (results, accuracy, ablation, tuning, generality, compare, int8, gpu, cpu, scores)
}


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "".join(re.sub(r" {2,}", " ", f"| {' | '.join(line)} |\n") for line in lines)


def rewrite(text: str) -> str:
    """The text of a page with its tables rewritten from the CSV files."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise SystemExit(f"no table is named {match['name']}: there are {', '.join(TABLES)}")
        return f"{match['begin']}\n{markdown(TABLES[match['name']]())}\n{match['end']}"

    return BLOCK.sub(block, text)


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def stale() -> list[Path]:
    """Pages whose tables differ from the CSV files."""
    return [page for page in pages() if rewrite(page.read_text()) != page.read_text()]


def main(arguments: Iterable[str]) -> int:
    outdated = stale()
    if "--check" not in arguments:
        for page in outdated:
            page.write_text(rewrite(page.read_text()))
        return 0
    for page in outdated:
        print(f"{page.relative_to(ROOT)} is stale: run python tools/figures.py", file=sys.stderr)
    return bool(outdated)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
