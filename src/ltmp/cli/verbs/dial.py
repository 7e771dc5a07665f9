"""`ltmp dial`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ...ranges import BUDGET, CALIBRATION, KNOTS, SEED, SHARE, VIEWS
from ..options import (
    FolderOptions,
    LearningData,
    NamedModel,
    RunOptions,
    ScoreOptions,
    StageOptions,
    option,
    verb,
)
from .certify import CertifyOptions, as_json, certified_with_bar, paragraph

if TYPE_CHECKING:
    from torch import nn

    from ...certification import Certificate
    from ...certification.gain import Gain
    from ...data import Loader
    from ..runs import Run

REPORTED = (0.8, 0.6, 0.47, 0.37)
"""Budgets to report on where nobody says which, as far as the dial goes."""


@dataclass(frozen=True, kw_only=True)
class DialStage(StageOptions):
    """Which budgets, and from how much."""

    low: Annotated[float, option("Smallest budget of the dial, a share of the dense model's FLOPs.", within=SHARE)] = (
        0.3
    )
    high: Annotated[float, option("Largest budget of the dial, besides 1 (dense).", within=SHARE)] = 0.95
    target: Annotated[float, option("Budget that the file is saved at.", within=SHARE)] = 0.6
    knots: Annotated[int, option("Rows of the dial.", within=KNOTS)] = 14
    views: Annotated[
        int, option("Images to look at while searching, each time counted; 0: calibrate only.", within=VIEWS)
    ] = 9_000
    calibration: Annotated[int, option("Images to calibrate each row of the dial.", within=CALIBRATION)] = 512
    budget: Annotated[
        list[float] | None,
        option(f"Share to report on; may be repeated. Default: {', '.join(map(str, REPORTED))}.", within=BUDGET),
    ] = None
    seed: Annotated[int, option("Seed of the image order and of the search.", within=SEED)] = 0
    certify: Annotated[
        float | None,
        option(
            "End with the smallest budget that with 95 % confidence answers otherwise than the dense model for at most "
            "this part of images (0.01), tested on --val, and with what it brings here; see `ltmp certify`.",
            metavar="LEVEL",
            within=SHARE,
        ),
    ] = None

    def check(self) -> None:
        """Refuse ends in the wrong order, and budgets beyond them."""
        if not self.low < self.high:
            raise UsageError(f"--low {self.low:g} is not below --high {self.high:g}: a dial goes from one to the other")
        budgets = [share for share in self.budget or () if share != 1]
        for name, share in (("--target", self.target), *(("--budget", share) for share in budgets)):
            if not self.low <= share <= self.high:
                raise UsageError(f"{name} {share:g} is not on the dial: give one from {self.low:g} to {self.high:g}")


@verb
def dial_verb(
    data: LearningData,
    model: NamedModel,
    scores: ScoreOptions,
    options: DialStage,
    run: RunOptions,
    output: FolderOptions,
) -> None:
    """Learn thresholds for every budget at once, from images without labels; --budget then picks, at no cost.

    Writes OUT/thresholds.safetensors. Ctrl-C saves the run; --resume goes on with it.

    Example: ltmp dial --data imagenet/ --model deit_small_patch16_224 --pretrained, and then
    ltmp eval --data imagenet/ --thresholds runs/deit_small_patch16_224-ltmp-dial --pretrained --budget 0.55
    """
    from ... import attach, distributed
    from ..runs import Run, base_model, report_skipped, settings_of
    from ..screen import suggest

    options.check()
    config, place = scores.config(), run.place
    folder = output.folder(model.model, scores.variant, "dial")
    job = Run(folder, settings_of(data, model, scores, options, run), options.resume)
    network = attach(model.build(model.model), config)
    loader, checking = data.open_both(network, labelled=False, seed=options.seed, check=not options.no_eval)
    if options.certify is not None and checking is None:
        raise UsageError("--certify is for images that nothing is learned from: give them as --val")
    if options.dry_run:
        _foretell(network, loader, checking, options, run, job)
        return
    with job.resumable():
        with distributed.group(place):
            job.of(network, loader, run)
            _learn(job, network, loader, options, run)
            rows = _reported(network, checking, options.budget, run) if checking else []
            learned = job.done("learning")
            distributed.merge(loader.skipped)
            if distributed.rank() > 0:
                return
        _set_nearest(network, options.target)
        certified = (
            _certified(network, checking, options.certify, run) if checking and options.certify is not None else None
        )
        about = {
            "model_name": model.model, "target": options.target, "share": options.target, "views": learned["views"],
            "budgets": rows, **base_model(network, model.pretrained and not model.weights),
        }  # fmt: skip
        _report(job, network, about, {**learned, "certified": certified}, output)
    report_skipped(loader.skipped)
    if not output.quiet:
        suggest(*model.deploy(job.thresholds))


def _certified(network: nn.Module, loader: Loader, level: float, run: RunOptions) -> tuple[Certificate, Gain | None]:
    """The budget that keeps the level, and what it brings here."""
    return certified_with_bar(network, loader, CertifyOptions(at_most=level), run, speed=True)


def _learn(job: Run, network: nn.Module, loader: Loader, options: DialStage, run: RunOptions) -> None:
    """Learn a dial and write it, or read that of a run that came as far."""
    from ... import distributed, load, save
    from ...learning import learn_dial
    from ..progress import progress_bar
    from ..runs import fingerprints

    done = job.done("learning")
    if done is not None:
        job.check_files(done.get("files", {}))
        load(network, job.thresholds)
        return
    with progress_bar("learning", None) as bar:
        result = learn_dial(
            network, loader, options.low, options.high, knots=options.knots, views=options.views,
            calibration=options.calibration, every=options.every, seed=options.seed, device=run.place, amp=run.cast,
            checkpoint=job.checkpoint, progress=bar.reach,
        )  # fmt: skip
    found: dict[str, Any] = {"views": result.views, "seconds": result.seconds, "divergence": result.divergence}
    if distributed.rank() == 0:
        # before anything else is done with them, and as they will be in the end
        _set_nearest(network, options.target)
        save(network, job.thresholds, views=result.views)
        found["files"] = fingerprints([job.thresholds])
    job.finish("learning", found)


def _set_nearest(network: nn.Module, share: float) -> None:
    """Set the dial; few images may end it a little off its ends."""
    from ...hosts.attach import thresholds_of

    thresholds = thresholds_of(network)
    assert thresholds.dial is not None
    thresholds.set_budget(share if share == 1 else thresholds.dial.nearest(share))


def _report(
    job: Run, network: nn.Module, about: dict[str, Any], learned: dict[str, Any], output: FolderOptions
) -> None:
    from ... import save
    from ...evaluate import tables
    from ...hosts.attach import thresholds_of
    from ..screen import say

    save(network, job.thresholds, **about)
    job.close()
    dial = thresholds_of(network).dial
    assert dial is not None
    if not output.quiet:
        made = [
            {"budget": share, "divergence": d}
            for share, d in zip(dial.share.tolist(), learned["divergence"], strict=False)
        ]
        names = {"budget": "budget", "share": "share", "top1": "top-1", "top1_dense": "top-1 dense"}
        names |= {"agreement": "agree", "divergence": "divergence"}
        rows = [{names[name]: value for name, value in row.items()} for row in about["budgets"] or made]
        tables.show(rows, f"a dial from {dial.lowest:g} to {dial.highest:g}")
        say(f"thresholds in {job.thresholds}")
    certified = learned["certified"]
    if certified and not output.quiet:
        say(paragraph(*certified))
    if output.json:
        values = {**about, "thresholds": str(job.thresholds), "seconds": learned["seconds"]}
        tables.write_json({**values, **(as_json(*certified) if certified else {})}, output.json)


def _foretell(
    network: nn.Module, loader: Loader, checking: Loader | None, options: DialStage, run: RunOptions, job: Run
) -> None:
    """Say what would be done, and how long it takes about."""
    from ...learning.dial import most_views
    from ...learning.options import DialOptions
    from ..runs import foretell_time
    from ..screen import say

    checked = checking.images if checking else 0
    budgets = len(options.budget or REPORTED)
    say(
        f"would learn a dial from {options.low:g} to {options.high:g} in {options.knots} rows, looking "
        f"{options.views:,} times at an image in the search, of {loader.images:,} images"
    )
    say(f"would report accuracy at {budgets} budgets on {checked:,} images" if checked else "would report no accuracy")
    say(f"would write {job.thresholds}")
    settings = DialOptions(views=options.views, knots=options.knots, calibration=options.calibration)
    passes = most_views(settings, loader.images) + checked * (1 + budgets)
    reads = options.calibration + min(settings.checked, loader.images) + checked
    say(foretell_time(network, loader, run, passes=passes, reads=reads))


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
        _set_nearest(network, share)
        policies[f"{share:g}"] = copy.deepcopy(thresholds)
    with progress_bar("evaluating", checking.images) as bar:
        found = evaluate_policies(
            network, checking, policies, device=run.place, amp=run.cast, speed=False, progress=bar
        )
    return [
        {"budget": share, "share": e.share, "top1": e.top1, "top1_dense": e.dense_top1, "agreement": e.agreement}
        for share, e in zip(shares, found.values(), strict=True)
    ]
