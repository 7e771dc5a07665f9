"""`ltmp report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ... import detach, load
from ...data import Images, Loader, class_names
from ...errors import UsageError
from ...evaluate import describe_machine
from ...report import Budget, Report, evaluate_budget, read_result, shown_path, write_report
from ...visualize.showing import named_budgets
from .. import options as o
from ..options import ModelName
from ..progress import progress_bar
from ..runs import name_in, report_skipped
from ..setup import DataOptions, ModelOptions, autocast_type, pick_device


def report_verb(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON files that `ltmp eval`, `ltmp learn` or `ltmp compare` wrote with --json."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images to evaluate the thresholds on, as in `ltmp eval`.", rich_help_panel="Data"),
    ] = None,
    thresholds: Annotated[
        list[Path] | None, typer.Option(help="A file that `ltmp learn` wrote; may be repeated, a budget each.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.", rich_help_panel="Output")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Of the page.", rich_help_panel="Output")] = None,
    class_names_file: Annotated[
        Path | None,
        typer.Option(
            "--class-names", help="Names to show for the model's classes, one a line (.txt).", rich_help_panel="Data"
        ),
    ] = None,
    model: ModelName = None,
    budget: o.Budgets = None,
    engine: o.Engine = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure images per second, too.")] = True,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    split: o.Split = None,
    data_root: o.DataRoot = None,
    class_map: o.ClassMap = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    strict: o.Strict = False,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 0,
    device: o.Device = "auto",
    amp: o.Amp = False,
    debug: o.Debug = False,
) -> None:
    """Write one self-contained HTML page: accuracy against compute and speed, tokens kept, easy images, new answers.

    Give thresholds to evaluate here, results of other runs, or both.

    Example: ltmp report --data imagenet/ --pretrained --thresholds runs/60/thresholds.safetensors
    --thresholds runs/50/thresholds.safetensors --out report.html
    """
    files = list(thresholds or ())
    if bool(files) != bool(data):
        raise UsageError("evaluating needs both --data and --thresholds: give the other one, too, or neither")
    if not files and not results:
        raise UsageError("nothing to report: give --data and --thresholds FILE, or JSON files of other verbs")
    page = Report(title=title or "Dense against reduced", settings={"written": _now(), **describe_machine()})
    if data:
        name = model or name_in(files[0])
        network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
        loader = DataOptions(
            data_root, class_map, interpolation, mean, std, crop_pct, crop_mode, strict, batch_size, workers
        ).open(data, network, split=split or "validation")
        place = pick_device(device)
        how = {"device": place, "amp": autocast_type(amp), "limit": limit, "speed": speed}
        budgets = _evaluate_all(network, loader, named_budgets(files, budget or ()), engine, how)
        own = shown_path(weights) if weights else "timm's pretrained"
        # a data set's name is no path
        source = shown_path(data) if Path(data).exists() else data
        run: dict[str, Any] = {"model": name, "weights": own, "data": source, "device": place}
        run |= {"batch size": batch_size, "bfloat16 autocast": amp, "images not readable": len(loader.skipped)}
        page = replace(
            page,
            title=title or f"{name}: dense against reduced",
            budgets=budgets,
            classes=class_names(network, loader.dataset, class_names_file, pretrained=weights is None),
            settings=run | _settings_of(budgets) | page.settings,
            **_lookups(loader),
        )
    page = _with_results(page, results or [])
    write_report(page, out)
    typer.echo(f"{out}: the report ({out.stat().st_size / 1e6:.1f} MB)")


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "minutes")


def _evaluate_all(
    network: nn.Module,
    loader: Loader,
    files: Mapping[str, tuple[Path, float | None]],
    engine: str | None,
    how: Mapping[str, Any],
) -> list[Budget]:
    """Each thresholds file at its budget, by name, with a progress bar; they may be of different variants."""
    budgets = []
    total = min(how["limit"] or loader.images, loader.images)
    for name, (path, share) in files.items():
        file = load(detach(network), path, engine=engine, budget=share)
        about = {"file": shown_path(path), "variant": file.config.variant, **file.metadata}
        with progress_bar(f"evaluating {name}", total) as advance:
            budgets.append(evaluate_budget(network, loader, name, about=about, progress=advance, **how))
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
