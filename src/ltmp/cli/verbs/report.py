"""`ltmp report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ...files import check_file_writable
from ..extras import require
from ..options import (
    DATA,
    OUTPUT,
    Budgets,
    CertifiedOption,
    DataOptions,
    Engine,
    EvaluationOptions,
    SavedModel,
    name_in,
    option,
    verb,
)

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader
    from ...report import Budget, Report


@dataclass(frozen=True, kw_only=True)
class ReportModel(SavedModel, CertifiedOption):
    """A model at several budgets."""

    thresholds: Annotated[
        list[Path] | None,
        option("Folder or file written by `ltmp dial` or `ltmp learn`; may be repeated, one for each budget."),
    ] = None
    budget: Budgets = None


@dataclass(frozen=True, kw_only=True)
class ReportData(DataOptions):
    """Images to evaluate on, and class names."""

    data: Annotated[str | None, option("Images to evaluate the thresholds on, as for `ltmp eval`.", DATA)] = None
    class_names_file: Annotated[
        Path | None,
        option("Class names to show (.txt), one per line in the order of the model's outputs.", DATA, "--class-names"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReportRun(EvaluationOptions):
    """Device, engine and evaluation."""

    engine: Engine = None


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """The HTML page."""

    out: Annotated[Path, option("HTML file to write.", OUTPUT, check_path=check_file_writable)] = Path("report.html")
    title: Annotated[str | None, option("Title of the page.", OUTPUT)] = None


@verb
def report_verb(
    model: ReportModel,
    data: ReportData,
    run: ReportRun,
    output: PageOptions,
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON files that `ltmp eval`, `ltmp learn` or `ltmp compare` wrote with --json."),
    ] = None,
) -> None:
    """Write a self-contained HTML page: accuracy against compute and speed, tokens kept, easy images, changed answers.

    Give --data and --thresholds to evaluate now, JSON results of earlier commands, or both.

    Example: ltmp report --data imagenet/ --pretrained --thresholds runs/60/thresholds.safetensors
    --thresholds runs/50/thresholds.safetensors --out report.html
    """
    from ...evaluate import describe_machine
    from ...report import Report, write_report
    from ..screen import print_result, suggest

    if bool(model.thresholds) != bool(data.data):
        raise UsageError("evaluating needs both --data and --thresholds: give the other one, too, or neither")
    if not model.thresholds and not results:
        raise UsageError("nothing to report: give --data and --thresholds FILE, or JSON files of other verbs")
    require("jinja2", "matplotlib")
    page = Report(title="Dense against reduced", settings={"written": _now(), **describe_machine()})
    if data.data and model.thresholds:
        page = _evaluated(page, data.data, model.thresholds, model, data, run)
    page = _with_results(replace(page, title=output.title or page.title), results or [])
    write_report(page, output.out)
    print_result(f"report written to {output.out} ({output.out.stat().st_size / 1e6:.1f} MB)")
    suggest("python", "-m", "webbrowser", output.out)


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "minutes")


def _evaluated(
    page: Report, source: str, files: list[Path], model: ReportModel, data: ReportData, run: ReportRun
) -> Report:
    """The page with an evaluation of each file at its budgets."""
    from ...data import class_names
    from ...report import shown_path
    from ...visualize.showing import named_budgets

    name = model.model or name_in(files[0])
    network = model.build(name)
    loader = data.open(source, network, split=data.split or "validation", limit=run.limit)
    shares = model.resolve_budgets(network, files, run.amp_dtype, model.budget)
    budgets = _evaluate_all(network, loader, named_budgets(files, shares), run, data.transform)
    settings: dict[str, Any] = {
        "model": name,
        "weights": shown_path(model.weights) if model.weights else "timm's pretrained",
        # the name of a timm dataset is not a path
        "data": shown_path(source) if Path(source).exists() else source,
        "device": run.torch_device,
        "batch size": data.batch_size,
        "bfloat16 autocast": run.amp,
        "images not readable": len(loader.skipped),
    }
    return replace(
        page,
        title=f"{name}: dense against reduced",
        budgets=budgets,
        classes=class_names(network, loader.dataset, data.class_names_file, pretrained=model.weights is None),
        settings=settings | _budget_settings(budgets) | page.settings,
        **_lookups(loader),
    )


def _evaluate_all(
    network: nn.Module,
    loader: Loader,
    files: Mapping[str, tuple[Path, float | None]],
    run: ReportRun,
    transform: dict[str, Any],
) -> list[Budget]:
    """Evaluate each thresholds file at its budget; `files` are by display name, and may have different variants."""
    from ... import detach, load
    from ...deploy import Deployment
    from ...report import evaluate_budget, shown_path
    from ...report.gallery import with_left
    from ..progress import progress_bar
    from ..runs import report_skipped

    budgets = []
    total = min(run.limit or loader.images, loader.images)
    settings = {"device": run.torch_device, "amp": run.amp_dtype, "limit": run.limit, "speed": run.speed}
    for name, (path, share) in files.items():
        file = load(detach(network), path, engine=run.engine, budget=share)
        metadata = {"file": shown_path(path), "variant": file.config.variant, **file.metadata}
        if file.certificate is not None:
            metadata["certificate"] = file.certificate.sentence()
        with progress_bar(f"evaluating {name}", total) as advance:
            budget = evaluate_budget(network, loader, name, about=metadata, progress=advance, **settings)
        # only after the evaluation, which finds out which images cannot be read
        picture = _lookups(loader).get("picture")
        if picture is not None:
            budget = with_left(Deployment(network, options=transform), budget, picture)
        budgets.append(budget)
    report_skipped(loader.skipped)
    return budgets


def _budget_settings(budgets: Sequence[Budget]) -> dict[str, str]:
    """The metadata of each budget as one line of text."""
    return {
        budget.name: ", ".join(f"{key} {_format(value)}" for key, value in budget.about.items()) for budget in budgets
    }


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lookups(loader: Loader) -> dict[str, Any]:
    """Functions from a row of the evaluation to its image and name; rows follow the dataset without unreadable images.

    Empty for a streaming dataset, which cannot be indexed.
    """
    from ...data import Images
    from ...report import shown_path

    dataset = loader.dataset
    if not isinstance(dataset, Images):
        return {}
    indices: Sequence[int] = range(len(dataset))
    if loader.skipped:
        indices = [index for index in indices if dataset.name(index) not in loader.skipped]
    return {
        "picture": lambda row: dataset.picture(indices[row]),
        "image_name": lambda row: shown_path(dataset.name(indices[row])),
    }


def _with_results(page: Report, paths: Sequence[Path]) -> Report:
    """The page with the results that other verbs wrote."""
    from ...report import read_result, shown_path

    if not paths:
        return page
    results = [read_result(path) for path in paths]
    return replace(
        page,
        budgets=[*page.budgets, *(budget for result in results for budget in result.budgets)],
        measured=[row for result in results for row in result.measured],
        learning={name: steps for result in results for name, steps in result.learning.items()},
        settings={"results": ", ".join(map(shown_path, paths)), **page.settings},
    )
