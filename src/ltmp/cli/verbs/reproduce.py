"""`ltmp reproduce`: plans calls of other verbs on one dataset, whose results go into one table."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from ...files import check_writable
from ...ranges import BUDGET, CALIBRATION, IMAGES, SHARE, VIEWS
from ..extras import require
from ..options import (
    DATA,
    MODEL,
    OUTPUT,
    BatchOptions,
    BuildOptions,
    LearningData,
    NamedModel,
    RunOptions,
    TableOptions,
    as_arguments,
    option,
    short_name,
    verb,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...data import Loader
    from ..reproduction import ModelPlan, VerbCall
    from ..runs import Run

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
BUDGETS = (0.6, 0.5, 0.4)
LOW, HIGH = 0.3, 0.95
"""The range of the dials."""
DEFAULT_VIEWS, DEFAULT_CALIBRATION = 9_000, 512


@dataclass(frozen=True, kw_only=True)
class ReproducedModels(BuildOptions):
    """The models with their weights."""

    model: Annotated[
        list[str] | None,
        option(f"Model name, as for `ltmp learn`; may be repeated. Default: {' and '.join(MODELS)}.", MODEL),
    ] = None
    weights: Annotated[
        list[Path] | None,
        option("Checkpoint for each --model, in the same order, instead of --pretrained; may be repeated.", MODEL),
    ] = None

    def models(self) -> list[NamedModel]:
        """The options of each model.

        Raises:
            UsageError: not one checkpoint for each model, or two models would share a folder.
        """
        names = self.model or MODELS
        files: list[Path | None] = [*self.weights] if self.weights else [None] * len(names)
        if len(files) != len(names):
            raise UsageError(f"{len(files)} --weights for {len(names)} models: give one for each, in their order")
        if len({short_name(name) for name in names}) < len(names):
            raise UsageError("two models of one name would share a folder: give each a run of its own, with --out")
        shared = {field.name: getattr(self, field.name) for field in fields(BuildOptions)}
        return [NamedModel(model=name, weights=file, **shared) for name, file in zip(names, files, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ReproducedData(BatchOptions):
    """Images to learn from, and held-out images to report on."""

    val: Annotated[str | None, option("Held-out images to report on; default: val/ in the data folder.", DATA)] = None
    limit: Annotated[
        int | None,
        option("Use at most this many images to learn from, and at most as many to report on.", DATA, within=IMAGES),
    ] = None

    def learning_data(self, path: str) -> LearningData:
        """The data options of `ltmp learn` for the dataset at `path`."""
        return LearningData(data=path, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """The budgets, and how much each part does."""

    budget: Annotated[
        list[float] | None,
        option(
            f"FLOPs share to compare at; may be repeated. Default: {', '.join(map(str, BUDGETS))}.",
            metavar="SHARE",
            within=BUDGET,
        ),
    ] = None
    views: Annotated[
        int,
        option("Images to search each dial on, counted each time an image is used; 0 only calibrates.", within=VIEWS),
    ] = DEFAULT_VIEWS
    calibration: Annotated[int, option("Images to calibrate each row of a dial on.", within=CALIBRATION)] = (
        DEFAULT_CALIBRATION
    )
    certify: Annotated[
        float,
        option(
            "Level of the certificate: 0.01 means that at most 1 % of answers differ from the dense model's.",
            metavar="LEVEL",
            within=SHARE,
        ),
    ] = 0.01
    speed: Annotated[bool, option("Also measure images per second.")] = True
    dry_run: Annotated[
        bool,
        option("Check everything, then list the commands and how long they would take.", None, "--dry-run"),
    ] = False

    @property
    def budgets(self) -> tuple[float, ...]:
        """The FLOPs shares, largest first."""
        shares = tuple(sorted(set(self.budget or BUDGETS), reverse=True))
        if not LOW <= shares[-1] <= shares[0] <= HIGH:
            raise UsageError(f"--budget {', '.join(map(str, shares))}: expected shares from {LOW} to {HIGH}")
        return shares


@dataclass(frozen=True, kw_only=True)
class ReproduceOutput(TableOptions):
    """The folder for the runs and the table."""

    out: Annotated[
        Path,
        option("Folder for all runs, table.md, table.csv and table.json.", OUTPUT, check_path=check_writable),
    ] = Path("reproduce")


@verb
def reproduce_verb(
    what: Annotated[str, typer.Argument(help="imagenet: classification, by default at 0.6, 0.5 and 0.4 of the FLOPs.")],
    path: Annotated[str, typer.Argument(help="Dataset folder, with class folders in train/ and val/.")],
    models: ReproducedModels,
    data: ReproducedData,
    options: ReproduceOptions,
    run: RunOptions,
    output: ReproduceOutput,
) -> None:
    """Rerun the paper's comparison on your ImageNet: its recipe, dials, fixed rates and lower resolution in one table.

    For each model, this measures thresholds from the paper's own training at each budget (learn --recipe paper); dials
    with the paper's scores and with the best ones; Token Merging at the rates, and the dense model at the resolutions,
    that cost the same; and the budget that provably keeps 99 % of answers. Published figures are listed beside them.

    Data, weights and extras are checked first. Each part is a command of its own, which --dry-run lists. If the run is
    interrupted, the same command continues it without repeating what is done.

    Example: ltmp reproduce imagenet /data/imagenet --pretrained --workers 8 --amp
    """
    from ..reproduction import report, run_parts
    from ..runs import Run, identifying_settings
    from ..screen import print_note, suggest

    if what != "imagenet":
        raise UsageError(f"nothing named {what!r} to reproduce: expected imagenet")
    require("matplotlib")
    started = (output.out / "run.json").exists()
    settings = {"path": path, **identifying_settings(models, data, run, options)}
    job = Run(output.out, settings, resume=started)
    plans = [_plan(model, path, data, options, run, output.out) for model in models.models()]
    for plan in plans:
        for note in plan.notes:
            print_note(note)
    if options.dry_run:
        _print_dry_run(plans, job)
        return
    with job.exclusive():
        run_parts(plans, job)
        report(plans, options.budgets, output.out, output)
    if not output.quiet:
        best = plans[0].folder / "dial-best"
        suggest(*plans[0].model.deploy_command(best / "thresholds.safetensors", budget=options.budgets[0]))


def _plan(
    model: NamedModel, path: str, data: ReproducedData, options: ReproduceOptions, run: RunOptions, out: Path
) -> ModelPlan:
    """List the parts for a model, after checking that each of them can run."""
    from ... import attach
    from ...certification.statistics import binomial_p_value, least_images
    from ...evaluate.compare import rates_for
    from ...hosts.attach import attachment
    from ...learning.budget import check_target
    from ...learning.calibrate import geometry_of
    from ..reproduction import ModelPlan

    network = attach(model.build(model.model)).to(run.torch_device).eval()
    training, held_out = data.learning_data(path).open_both(network, labelled=True, seed=0, check=True)
    if held_out is None:
        raise UsageError(f"{path} has no val/ folder to report on: give --val")
    if not all(getattr(loader.dataset, "labelled", True) for loader in (training, held_out)):
        raise UsageError(f"{path} has no labels, which the paper's recipe learns from: expected class folders")
    image = next(iter(held_out))[0][:1].to(run.torch_device)
    geometry, protected = geometry_of(network, image), attachment(network).body.protected
    check_target(min(LOW, *options.budgets), geometry, protected)
    for budget in options.budgets:
        # refuses a budget that no fixed rate meets
        rates_for(network, image, "m", budget)
    sizes, notes = _sizes(network, image, options.budgets), []
    if not sizes:
        notes.append(f"{model.model} takes one image size only: nothing at lower resolution")
    least = least_images(binomial_p_value, options.certify, 0.95)
    certifiable = held_out.images >= least
    if not certifiable:
        notes.append(f"no certificate: {options.certify:g} takes at least {least:,} images, not {held_out.images:,}")
    folder = out / short_name(model.model)
    parts = _parts(model, path, data, options, run, folder, sizes, certify=certifiable)
    time = _estimate_time(network, training, held_out, options, run) if options.dry_run else ""
    return ModelPlan(model, folder, sizes, parts, notes, time)


def _sizes(network: nn.Module, image: Tensor, budgets: tuple[float, ...]) -> dict[float, int]:
    """For each budget the image size whose cost is closest to it; empty if the model takes one size only."""
    from ...certification.resolution import lower_resolutions

    sizes = {share: smaller.size for share, smaller in lower_resolutions(network, image)}
    if not sizes:
        return {}
    return {budget: sizes[min(sizes, key=lambda share: abs(share - budget))] for budget in budgets}


def _parts(
    model: NamedModel,
    path: str,
    data: ReproducedData,
    options: ReproduceOptions,
    run: RunOptions,
    folder: Path,
    sizes: dict[float, int],
    *,
    certify: bool,
) -> list[VerbCall]:
    """The commands, in the order in which they run."""
    from ..reproduction import VerbCall

    shared = [*as_arguments(model), *as_arguments(replace(data, val=None)), *as_arguments(run)]
    learn = ["--data", path, *shared, "--no-eval", "--out"]
    report = ["--data", data.val or path, *shared]

    def thresholds(part: str) -> str:
        return str(folder / part / "thresholds.safetensors")

    parts = [
        VerbCall(f"paper-{budget:g}", ["learn", *learn, str(folder / f"paper-{budget:g}"), "--recipe", "paper",
                                   "--target", f"{budget:g}"])
        for budget in options.budgets
    ]  # fmt: skip
    dials = ["--low", str(LOW), "--high", str(HIGH), "--target", f"{options.budgets[0]:g}"]
    dials += ["--views", str(options.views), "--calibration", str(options.calibration)]
    parts += [
        VerbCall(f"dial-{scores}", ["dial", *learn, str(folder / f"dial-{scores}"), "--scores", scores, *dials])
        for scores in ("paper", "best")
    ]
    for budget in options.budgets:
        files = [thresholds(part) for part in (f"paper-{budget:g}", "dial-paper", "dial-best")]
        entries = ["--method", "m"]
        if sizes:
            entries += ["--method", f"resize:{sizes[budget]}"]
        for file in files:
            entries += ["--thresholds", file]
        entries += ["--budget", f"{budget:g}", *([] if options.speed else ["--no-speed"])]
        name = f"compare-{budget:g}"
        parts.append(VerbCall(name, ["compare", *report, *entries, "--out", str(folder / name)]))
    if certify:
        level = ["--at-most", f"{options.certify:g}", "--no-speed", "--json", str(folder / "certificate.json")]
        parts.append(VerbCall("certify", ["certify", *report, "--thresholds", thresholds("dial-best"), *level]))
    return parts


def _estimate_time(
    network: nn.Module, training: Loader, held_out: Loader, options: ReproduceOptions, run: RunOptions
) -> str:
    """About how long the parts of one model take."""
    from ...learning.dial import max_views
    from ...learning.options import DialOptions
    from ..runs import estimate_time

    budgets = len(options.budgets)
    settings = DialOptions(views=options.views, calibration=options.calibration)
    dial = max_views(settings, training.images)
    # a step of the paper's recipe costs a forward pass, and a backward pass of about two
    passes = 3 * budgets * training.images + 2 * dial + held_out.images * (6 * budgets + 6)
    reads = budgets * training.images + 2 * settings.checked + held_out.images * (budgets + 1)
    return estimate_time(network, training, run, passes=passes, reads=reads)


def _print_dry_run(plans: list[ModelPlan], job: Run) -> None:
    """Print the commands, and an estimate of the time for each model."""
    from ..screen import print_result

    for plan in plans:
        for part in plan.parts:
            done = job.result(f"{plan.folder.name}/{part.name}") is not None
            print_result(f"{'done already' if done else 'would run'}: {part}")
        print_result(f"{plan.model.model}, all parts: {plan.time}")
    print_result(f"would write {job.folder}/table.md, table.csv and table.json")
