"""`ltmp reproduce`: a list of other verbs' calls on one data set, and what they found in one table."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ...files import check_writable
from ...ranges import BUDGET, CALIBRATION, IMAGES, SHARE, VIEWS
from ..extras import need
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
    option,
    short_name,
    verb,
    words,
)

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader
    from ..reproduction import ModelPlan, VerbCall
    from ..runs import Run

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
BUDGETS = (0.6, 0.5, 0.4)
LOW, HIGH = 0.3, 0.95
"""Ends of the dials."""
LOOKED_AT, CALIBRATED = 9_000, 512


@dataclass(frozen=True, kw_only=True)
class ReproducedModels(BuildOptions):
    """The models, each with its weights."""

    model: Annotated[
        list[str] | None,
        option(f"Name of a model, as in `ltmp learn`; may be repeated. Default: {' and '.join(MODELS)}.", MODEL),
    ] = None
    weights: Annotated[
        list[Path] | None, option("Checkpoint of each --model, in their order, instead of --pretrained.", MODEL)
    ] = None

    def named(self) -> list[NamedModel]:
        """One by one."""
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
    """Images to learn from, and others to report on."""

    val: Annotated[str | None, option("Data to report on; default: val/ of the data folder.", DATA)] = None
    limit: Annotated[
        int | None, option("Use at most this many images to learn from, and as many to report on.", DATA, within=IMAGES)
    ] = None

    def of(self, path: str) -> LearningData:
        """As `ltmp learn` takes them."""
        return LearningData(data=path, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """How much is done."""

    budget: Annotated[
        list[float] | None,
        option(
            f"FLOPs share; may be repeated. Default: {', '.join(map(str, BUDGETS))}.", metavar="SHARE", within=BUDGET
        ),
    ] = None
    views: Annotated[
        int, option("Images that each dial looks at while searching; 0: calibrate only.", within=VIEWS)
    ] = LOOKED_AT
    calibration: Annotated[int, option("Images to calibrate each row of a dial.", within=CALIBRATION)] = CALIBRATED
    certify: Annotated[
        float,
        option(
            "Level of the certificate: 0.01 is 1 % of other answers than the dense model's.",
            metavar="LEVEL",
            within=SHARE,
        ),
    ] = 0.01
    speed: Annotated[bool, option("Measure images per second, too.")] = True
    dry_run: Annotated[
        bool,
        option("Check everything, list the commands and say how long they would take.", None, "--dry-run"),
    ] = False

    @property
    def budgets(self) -> tuple[float, ...]:
        """The shares, largest first."""
        found = tuple(sorted(set(self.budget or BUDGETS), reverse=True))
        if not LOW <= found[-1] <= found[0] <= HIGH:
            raise UsageError(f"--budget {', '.join(map(str, found))}: expected shares from {LOW} to {HIGH}")
        return found


@dataclass(frozen=True, kw_only=True)
class ReproduceOutput(TableOptions):
    """Where the runs and the table go."""

    out: Annotated[
        Path, option("Folder of all runs, and of table.md, table.csv and table.json.", OUTPUT, writes=check_writable)
    ] = Path("reproduce")


@verb
def reproduce_verb(
    what: Annotated[str, typer.Argument(help="imagenet: classification at 0.6, 0.5 and 0.4 of the FLOPs.")],
    path: Annotated[str, typer.Argument(help="The data set: a folder with train/ and val/, each of class folders.")],
    models: ReproducedModels,
    data: ReproducedData,
    options: ReproduceOptions,
    run: RunOptions,
    output: ReproduceOutput,
) -> None:
    """Run the paper's comparison on your own ImageNet: its recipe, ours, fixed rates and lower resolution, one table.

    For each model: thresholds by the paper's own training at each budget (learn --recipe paper); dials with the paper's
    scores and with the best ones; Token Merging at the rates, and the dense model at the resolutions, that cost the
    same; and the budget that provably keeps 99 % of answers. Published figures stand beside them. Data, weights and
    extras are checked first. Stopped at any time, the same command goes on: what is done is not done again. Each part
    is a command of its own, which --dry-run lists.

    Example: ltmp reproduce imagenet /data/imagenet --pretrained --workers 8 --amp
    """
    from ..reproduction import carry_out, report
    from ..runs import Run, settings_of
    from ..screen import suggest, tell

    if what != "imagenet":
        raise UsageError(f"nothing named {what!r} to reproduce: expected imagenet")
    need("matplotlib")
    there = (output.out / "run.json").exists()
    settings = {"path": path, **settings_of(models, data, run), **settings_of(options)}
    job = Run(output.out, settings, resume=there)
    plans = [_planned(model, path, data, options, run, output.out) for model in models.named()]
    for note in (note for plan in plans for note in plan.notes):
        tell(note)
    if options.dry_run:
        _foretell(plans, job)
        return
    with job.alone():
        carry_out(plans, job)
        report(plans, options.budgets, output.out, output)
    if not output.quiet:
        best = plans[0].folder / "dial-best"
        suggest(*plans[0].model.deploy(best / "thresholds.safetensors", budget=options.budgets[0]))


def _planned(
    model: NamedModel, path: str, data: ReproducedData, options: ReproduceOptions, run: RunOptions, out: Path
) -> ModelPlan:
    """Check that every part can run, and list them."""
    from ... import attach
    from ...certification.statistics import binomial_p_value, least_images
    from ...evaluate.compare import rates_for
    from ...hosts.attach import attachment
    from ...learning.budget import check_target
    from ...learning.calibrate import geometry_of
    from ..reproduction import ModelPlan

    network = attach(model.build(model.model)).to(run.place).eval()
    learning, reporting = data.of(path).open_both(network, labelled=True, seed=0, check=True)
    if reporting is None:
        raise UsageError(f"{path} has no val/ folder to report on: give --val")
    if not all(getattr(loader.dataset, "labelled", True) for loader in (learning, reporting)):
        raise UsageError(f"{path} has no labels, which the paper's recipe learns from: expected class folders")
    few = next(iter(reporting))[0][:1].to(run.place)
    geometry, protected = geometry_of(network, few), attachment(network).body.protected
    check_target(min(LOW, *options.budgets), geometry, protected)
    for budget in options.budgets:
        rates_for(network, few, "m", budget)
    sizes, notes = _sizes(network, few, options.budgets), []
    if not sizes:
        notes.append(f"{model.model} runs at its own size only: nothing at lower resolution")
    least = least_images(binomial_p_value, options.certify, 0.95)
    certified = reporting.images >= least
    if not certified:
        notes.append(f"no certificate: {options.certify:g} takes at least {least:,} images, not {reporting.images:,}")
    folder = out / short_name(model.model)
    made = _parts(model, path, data, options, run, folder, sizes)
    time = _time(network, learning, reporting, options, run) if options.dry_run else ""
    return ModelPlan(model, folder, sizes, made if certified else made[:-1], notes, time)


def _sizes(network: nn.Module, few: Any, budgets: tuple[float, ...]) -> dict[float, int]:
    """For each budget the resolution whose cost is closest to it."""
    from ...certification.resolution import lower_resolutions

    found = {share: smaller.size for share, smaller in lower_resolutions(network, few)}
    return {budget: found[min(found, key=lambda share: abs(share - budget))] for budget in budgets} if found else {}


def _parts(
    model: NamedModel,
    path: str,
    data: ReproducedData,
    options: ReproduceOptions,
    run: RunOptions,
    folder: Path,
    sizes: dict[float, int],
) -> list[VerbCall]:
    """The commands, the certificate's last."""
    from ..reproduction import VerbCall

    shared = [*words(model), *words(replace(data, val=None)), *words(run)]
    learn = ["--data", path, *shared, "--no-eval", "--out"]
    report = ["--data", data.val or path, *shared]

    def thresholds(part: str) -> str:
        return str(folder / part / "thresholds.safetensors")

    found = [
        VerbCall(f"paper-{budget:g}", ["learn", *learn, str(folder / f"paper-{budget:g}"), "--recipe", "paper",
                                   "--target", f"{budget:g}"])
        for budget in options.budgets
    ]  # fmt: skip
    dials = ["--low", str(LOW), "--high", str(HIGH), "--target", f"{options.budgets[0]:g}"]
    dials += ["--views", str(options.views), "--calibration", str(options.calibration)]
    found += [
        VerbCall(f"dial-{scores}", ["dial", *learn, str(folder / f"dial-{scores}"), "--scores", scores, *dials])
        for scores in ("paper", "best")
    ]
    for budget in options.budgets:
        files = [thresholds(part) for part in (f"paper-{budget:g}", "dial-paper", "dial-best")]
        methods = ["m", *([f"resize:{sizes[budget]}"] if sizes else [])]
        how = [word for method in methods for word in ("--method", method)]
        how += [word for file in files for word in ("--thresholds", file)]
        how += ["--budget", f"{budget:g}", *([] if options.speed else ["--no-speed"])]
        found.append(
            VerbCall(f"compare-{budget:g}", ["compare", *report, *how, "--out", str(folder / f"compare-{budget:g}")])
        )
    level = ["--at-most", f"{options.certify:g}", "--no-speed", "--json", str(folder / "certificate.json")]
    return [*found, VerbCall("certify", ["certify", *report, "--thresholds", thresholds("dial-best"), *level])]


def _time(network: nn.Module, learning: Loader, reporting: Loader, options: ReproduceOptions, run: RunOptions) -> str:
    """Metadata how long one model takes."""
    from ...learning.dial import most_views
    from ...learning.options import DialOptions
    from ..runs import foretell_time

    budgets = len(options.budgets)
    settings = DialOptions(views=options.views, calibration=options.calibration)
    dial = most_views(settings, learning.images)
    # a step of the paper's recipe costs a pass forwards and about two backwards
    passes = 3 * budgets * learning.images + 2 * dial + reporting.images * (6 * budgets + 6)
    reads = budgets * learning.images + 2 * settings.checked + reporting.images * (budgets + 1)
    return foretell_time(network, learning, run, passes=passes, reads=reads)


def _foretell(plans: list[ModelPlan], job: Run) -> None:
    from ..screen import say

    for plan in plans:
        for part in plan.parts:
            done = job.done(f"{plan.folder.name}/{part.name}") is not None
            say(f"{'done already' if done else 'would run'}: {part}")
        say(f"{plan.model.model}, all parts: {plan.time}")
    say(f"would write {job.folder}/table.md, table.csv and table.json")
