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
from ..extras import need
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
        list[Path] | None, option("A file that `ltmp learn` wrote; may be repeated, a budget each.")
    ] = None
    budget: Budgets = None


@dataclass(frozen=True, kw_only=True)
class ReportData(DataOptions):
    """Images to evaluate on, and what they show."""

    data: Annotated[str | None, option("Images to evaluate the thresholds on, as in `ltmp eval`.", DATA)] = None
    class_names_file: Annotated[
        Path | None, option("Names to show for the model's classes, one a line (.txt).", DATA, "--class-names")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReportRun(EvaluationOptions):
    """How it is evaluated."""

    engine: Engine = None


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """HTML file to write."""

    out: Annotated[Path, option("HTML file to write.", OUTPUT, writes=check_file_writable)] = Path("report.html")
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
    """Write one self-contained HTML page: accuracy against compute and speed, tokens kept, easy images, new answers.

    Give thresholds to evaluate here, results of other runs, or both.

    Example: ltmp report --data imagenet/ --pretrained --thresholds runs/60/thresholds.safetensors
    --thresholds runs/50/thresholds.safetensors --out report.html
    """
    from ...evaluate import describe_machine
    from ...report import Report, write_report
    from ..screen import say, suggest

    if bool(model.thresholds) != bool(data.data):
        raise UsageError("evaluating needs both --data and --thresholds: give the other one, too, or neither")
    if not model.thresholds and not results:
        raise UsageError("nothing to report: give --data and --thresholds FILE, or JSON files of other verbs")
    need("jinja2", "matplotlib")
    page = Report(title="Dense against reduced", settings={"written": _now(), **describe_machine()})
    if data.data and model.thresholds:
        page = _evaluated(page, data.data, model.thresholds, model, data, run)
    page = _with_results(replace(page, title=output.title or page.title), results or [])
    write_report(page, output.out)
    say(f"{output.out}: the report ({output.out.stat().st_size / 1e6:.1f} MB)")
    suggest("python", "-m", "webbrowser", output.out)


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "minutes")


def _evaluated(
    page: Report, source: str, files: list[Path], model: ReportModel, data: ReportData, run: ReportRun
) -> Report:
    """The page with each file at its budgets, evaluated here."""
    from ...data import class_names
    from ...report import shown_path
    from ...visualize.showing import named_budgets

    name = model.model or name_in(files[0])
    network = model.build(name)
    loader = data.open(source, network, split=data.split or "validation", limit=run.limit)
    shares = model.shares(network, files, run.cast, model.budget)
    budgets = _evaluate_all(network, loader, named_budgets(files, shares), run, data.transform)
    own = shown_path(model.weights) if model.weights else "timm's pretrained"
    # a data set's name is no path
    shown = shown_path(source) if Path(source).exists() else source
    about: dict[str, Any] = {"model": name, "weights": own, "data": shown}
    about |= {"device": run.place, "batch size": data.batch_size, "bfloat16 autocast": run.amp}
    about |= {"images not readable": len(loader.skipped)}
    return replace(
        page,
        title=f"{name}: dense against reduced",
        budgets=budgets,
        classes=class_names(network, loader.dataset, data.class_names_file, pretrained=model.weights is None),
        settings=about | _settings_of(budgets) | page.settings,
        **_lookups(loader),
    )


def _evaluate_all(
    network: nn.Module,
    loader: Loader,
    files: Mapping[str, tuple[Path, float | None]],
    run: ReportRun,
    transform: dict[str, Any],
) -> list[Budget]:
    """Each thresholds file at its budget, by name, with a progress bar; they may be of different variants."""
    from ... import detach, load
    from ...deploy import Deployment
    from ...report import evaluate_budget, shown_path
    from ...report.gallery import with_left
    from ..progress import progress_bar
    from ..runs import report_skipped

    budgets = []
    total = min(run.limit or loader.images, loader.images)
    how = {"device": run.place, "amp": run.cast, "limit": run.limit, "speed": run.speed}
    for name, (path, share) in files.items():
        file = load(detach(network), path, engine=run.engine, budget=share)
        about = {"file": shown_path(path), "variant": file.config.variant, **file.metadata}
        if file.certificate is not None:
            about["certificate"] = file.certificate.sentence()
        with progress_bar(f"evaluating {name}", total) as advance:
            budget = evaluate_budget(network, loader, name, about=about, progress=advance, **how)
        # which images cannot be read is known by now
        picture = _lookups(loader).get("picture")
        if picture is not None:
            budget = with_left(Deployment(network, options=transform), budget, picture)
        budgets.append(budget)
    report_skipped(loader.skipped)
    return budgets


def _settings_of(budgets: Sequence[Budget]) -> dict[str, Any]:
    return {
        budget.name: ", ".join(f"{key} {_short(value)}" for key, value in budget.about.items()) for budget in budgets
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lookups(loader: Loader) -> dict[str, Any]:
    """How a report finds the images again: rows are in the dataset's order, without those that cannot be read."""
    from ...data import Images
    from ...report import shown_path

    dataset = loader.dataset
    if not isinstance(dataset, Images):
        return {}
    read: Sequence[int] = range(len(dataset))
    if loader.skipped:
        read = [index for index in read if dataset.name(index) not in loader.skipped]
    return {
        "picture": lambda row: dataset.picture(read[row]),
        "image_name": lambda row: shown_path(dataset.name(read[row])),
    }


def _with_results(page: Report, paths: Sequence[Path]) -> Report:
    """The page with what other verbs wrote."""
    from ...report import read_result, shown_path

    if not paths:
        return page
    read = [read_result(path) for path in paths]
    return replace(
        page,
        budgets=[*page.budgets, *(budget for result in read for budget in result.budgets)],
        measured=[one for result in read for one in result.measured],
        learning={name: steps for result in read for name, steps in result.learning.items()},
        settings={"results": ", ".join(map(shown_path, paths)), **page.settings},
    )
