"""`ltmp dial`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ..options import OUTPUT, LearningData, NamedModel, OutputOptions, Resume, RunOptions, ScoreOptions, verb
from .certify import CertifyOptions, as_json, certified_with_bar, paragraph

if TYPE_CHECKING:
    from torch import nn

    from ...certification import Certificate
    from ...certification.gain import Gain
    from ...data import Loader
    from ...learning import DialResult

REPORTED = (0.8, 0.6, 0.47, 0.37)
"""Budgets to report on where nobody says which, as far as the dial goes."""


@dataclass(frozen=True, kw_only=True)
class DialOptions:
    """Which budgets, and from how much."""

    low: Annotated[float, typer.Option(help="Smallest share of the dense model's FLOPs to be asked for.")] = 0.3
    high: Annotated[float, typer.Option(help="Largest share to be asked for, but for 1.")] = 0.95
    target: Annotated[float, typer.Option(help="Share that the file is saved at.")] = 0.6
    resume: Resume = False
    knots: Annotated[int, typer.Option(min=2, help="Rows of the dial.")] = 14
    views: Annotated[int, typer.Option(min=0, help="Images to search on; 0: calibrate only.")] = 9_000
    calibration: Annotated[int, typer.Option(min=2, help="Images to make the table from.")] = 512
    budget: Annotated[
        list[float] | None,
        typer.Option(help=f"Share to report on; may be repeated. Default: {', '.join(map(str, REPORTED))}."),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the images and the search.")] = 0
    certify: Annotated[
        float | None,
        typer.Option(
            metavar="LEVEL",
            help="End with the smallest budget that with 95 % confidence answers otherwise than the dense model for at "
            "most this part of images (0.01), tested on --val, and with what it brings here; see `ltmp certify`.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DialOutput(OutputOptions):
    """Where the run goes."""

    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/MODEL-VARIANT-dial.", rich_help_panel=OUTPUT)
    ] = None


@verb
def dial_verb(
    data: LearningData,
    model: NamedModel,
    scores: ScoreOptions,
    options: DialOptions,
    run: RunOptions,
    output: DialOutput,
) -> None:
    """Learn thresholds for every budget at once, from images without labels; --budget then picks, at no cost.

    Writes OUT/thresholds.safetensors. Ctrl-C saves the run; --resume goes on with it.

    Example: ltmp dial --data imagenet/ --model deit_small_patch16_224 --pretrained, and then
    ltmp eval --data imagenet/ --thresholds runs/deit_small_patch16_224-ltmp-dial --pretrained --budget 0.55
    """
    from ... import attach, distributed, save
    from ...evaluate import tables
    from ...hosts.attach import thresholds_of
    from ..runs import base_model, prepare, report_skipped, resumable, run_folder
    from ..screen import say

    if not options.low <= options.target <= options.high:
        raise UsageError(
            f"--target {options.target:g} is not on the dial: give one from {options.low:g} to {options.high:g}"
        )
    folder = output.out or run_folder(model.model, scores.variant, "dial")
    run_file = prepare(folder, options.resume)
    network = attach(model.build(model.model), scores.config())
    loader = data.open(data.data, network, split=data.split or "train", labelled=False, shuffle=True, seed=options.seed)
    checking = data.open_held_out(network)
    if options.certify is not None and checking is None:
        raise UsageError("--certify is for images that nothing is learned from: give them as --val")
    with distributed.group(run.place), resumable(run_file):
        result = _learned(network, loader, options, run, run_file)
        rows = _reported(network, checking, options.budget, run) if checking else []
        distributed.merge(loader.skipped)
        if distributed.rank() > 0:
            return
    # few images may end a dial a little off its ends
    dial = thresholds_of(network).dial
    assert dial is not None
    thresholds_of(network).set_budget(dial.nearest(options.target))
    certified = (
        _certified(network, checking, options.certify, run) if checking and options.certify is not None else None
    )
    path = folder / "thresholds.safetensors"
    about = {
        "model_name": model.model, "target": options.target, "share": options.target, "views": result.views,
        "budgets": rows, **base_model(network, model.pretrained and not model.weights),
    }  # fmt: skip
    save(network, path, **about)
    run_file.unlink(missing_ok=True)
    report_skipped(loader.skipped)
    if not output.quiet:
        made = [
            {"budget": share, "divergence": d} for share, d in zip(dial.share.tolist(), result.divergence, strict=True)
        ]
        tables.show(rows or made, f"a dial from {dial.lowest:g} to {dial.highest:g}")
        say(f"thresholds in {path}")
    if certified and not output.quiet:
        say(paragraph(*certified))
    if output.json:
        found = {} if certified is None else as_json(*certified)
        tables.write_json({**about, "thresholds": str(path), "seconds": result.seconds, **found}, output.json)


def _certified(network: nn.Module, loader: Loader, level: float, run: RunOptions) -> tuple[Certificate, Gain | None]:
    """The budget that keeps the level, and what it brings here."""
    return certified_with_bar(network, loader, CertifyOptions(at_most=level), run, speed=True)


def _learned(network: nn.Module, loader: Loader, options: DialOptions, run: RunOptions, run_file: Path) -> DialResult:
    """The run itself, with a bar."""
    from ...learning import learn_dial
    from ..progress import progress_bar

    with progress_bar("learning", None) as bar:
        return learn_dial(
            network, loader, options.low, options.high, knots=options.knots, views=options.views,
            calibration=options.calibration, seed=options.seed, device=run.place, amp=run.cast, checkpoint=run_file,
            progress=bar.reach,
        )  # fmt: skip


def _reported(
    network: nn.Module, checking: Loader, budgets: list[float] | None, run: RunOptions
) -> list[dict[str, Any]]:
    """A row for each budget: what the dial gives on images that it was not made on."""
    from ...evaluate.accuracy import evaluate_policies
    from ...hosts.attach import thresholds_of
    from ..progress import progress_bar

    thresholds = thresholds_of(network)
    dial = thresholds.dial
    assert dial is not None
    shares = budgets or [share for share in REPORTED if dial.lowest <= share <= dial.highest]
    policies = {}
    for share in shares:
        thresholds.set_budget(share)
        policies[f"{share:g}"] = copy.deepcopy(thresholds)
    with progress_bar("evaluating", checking.images) as bar:
        found = evaluate_policies(
            network, checking, policies, device=run.place, amp=run.cast, speed=False, progress=bar
        )
    return [
        {"budget": share, "share": e.share, "top1": e.top1, "top1_dense": e.dense_top1, "agreement": e.agreement}
        for share, e in zip(shares, found.values(), strict=True)
    ]
