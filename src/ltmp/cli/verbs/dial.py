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

REPORT_BUDGETS = (0.8, 0.6, 0.47, 0.37)
"""Default of --budget; budgets outside the dial are left out."""

HEADINGS = {
    "budget": "budget",
    "share": "share",
    "top1": "top-1",
    "top1_dense": "top-1 dense",
    "agreement": "agree",
    "divergence": "divergence",
}
"""Columns of the table and their headings."""


@dataclass(frozen=True, kw_only=True)
class DialRunOptions(StageOptions):
    """The range of the dial, and how it is learned."""

    low: Annotated[float, option("Smallest budget of the dial, a share of the dense model's FLOPs.", within=SHARE)] = (
        0.3
    )
    high: Annotated[
        float, option("Largest budget of the dial, below 1; budget 1 is always the dense model.", within=SHARE)
    ] = 0.95
    target: Annotated[
        float, option("Budget that the file is saved at, and opens at without --budget.", within=SHARE)
    ] = 0.6
    knots: Annotated[int, option("Rows of the dial's table; budgets in between are interpolated.", within=KNOTS)] = 14
    views: Annotated[
        int,
        option("Images to search on, counted each time an image is used; 0 only calibrates.", within=VIEWS),
    ] = 9_000
    calibration: Annotated[int, option("Images to calibrate each row of the dial on.", within=CALIBRATION)] = 512
    budget: Annotated[
        list[float] | None,
        option(
            "FLOPs share at which to report accuracy; may be repeated. Default: "
            f"{', '.join(map(str, REPORT_BUDGETS))}.",
            within=BUDGET,
        ),
    ] = None
    seed: Annotated[int, option("Seed of the image order and of the search.", within=SEED)] = 0
    certify: Annotated[
        float | None,
        option(
            "Afterwards, certify on the --val images the smallest budget at which, with 95 % confidence, at most this "
            "share of answers (e.g. 0.01) differs from the dense model's; see `ltmp certify`.",
            metavar="LEVEL",
            within=SHARE,
        ),
    ] = None

    def check(self) -> None:
        """Refuse an empty range, and budgets outside it."""
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
    options: DialRunOptions,
    run: RunOptions,
    output: FolderOptions,
) -> None:
    """Learn thresholds for every budget at once, from images without labels; --budget later picks one at no cost.

    Writes OUT/thresholds.safetensors. Ctrl-C saves the run; --resume continues it.

    Example: ltmp dial --data imagenet/ --model deit_small_patch16_224 --pretrained

    Then: ltmp eval --data imagenet/ --thresholds runs/deit_small_patch16_224-ltmp-dial --pretrained --budget 0.55
    """
    from ... import attach, distributed
    from ..runs import Run, base_model, identifying_settings, report_skipped
    from ..screen import suggest

    options.check()
    config, device = scores.config(), run.torch_device
    folder = output.folder(model.model, scores.variant, "dial")
    job = Run(folder, identifying_settings(data, model, scores, options, run), options.resume)
    network = attach(model.build(model.model), config)
    loader, held_out = data.open_both(network, labelled=False, seed=options.seed, check=not options.no_eval)
    if options.certify is not None and held_out is None:
        raise UsageError("--certify is for images that nothing is learned from: give them as --val")
    if options.dry_run:
        _print_dry_run(network, loader, held_out, options, run, job)
        return
    with job.resumable():
        with distributed.group(device):
            job.check_subject(network, loader, run)
            _learn(job, network, loader, options, run)
            rows = _evaluate_budgets(network, held_out, options.budget, run) if held_out else []
            learned = job.result("learning")
            distributed.merge(loader.skipped)
            if distributed.rank() > 0:
                return
        _set_nearest(network, options.target)
        certified = None
        if held_out and options.certify is not None:
            settings = CertifyOptions(at_most=options.certify)
            certified = certified_with_bar(network, held_out, settings, run, speed=True)
        metadata = {
            "model_name": model.model, "target": options.target, "share": options.target, "views": learned["views"],
            "budgets": rows, **base_model(network, model.pretrained and not model.weights),
        }  # fmt: skip
        _report(job, network, metadata, learned, certified, output)
    report_skipped(loader.skipped)
    if not output.quiet:
        suggest(*model.deploy_command(job.thresholds))


def _learn(job: Run, network: nn.Module, loader: Loader, options: DialRunOptions, run: RunOptions) -> None:
    """Learn a dial and save it, or load it if the resumed run has learned it already."""
    from ... import distributed, load, save
    from ...learning import learn_dial
    from ..progress import progress_bar
    from ..runs import fingerprints

    done = job.result("learning")
    if done is not None:
        job.check_files(done.get("files", {}))
        load(network, job.thresholds)
        return
    with progress_bar("learning", None) as bar:
        result = learn_dial(
            network, loader, options.low, options.high, knots=options.knots, views=options.views,
            calibration=options.calibration, every=options.every, seed=options.seed, device=run.torch_device,
            amp=run.amp_dtype, checkpoint=job.checkpoint, progress=bar.reach,
        )  # fmt: skip
    learned: dict[str, Any] = {"views": result.views, "seconds": result.seconds, "divergence": result.divergence}
    if distributed.rank() == 0:
        # saved at the final budget before the evaluation, so that an interruption there loses nothing
        _set_nearest(network, options.target)
        save(network, job.thresholds, views=result.views)
        learned["files"] = fingerprints([job.thresholds])
    job.finish("learning", learned)


def _set_nearest(network: nn.Module, share: float) -> None:
    """Set the dial to the nearest budget it has: learned from few images, its range may be a little off."""
    from ...hosts.attach import thresholds_of

    thresholds = thresholds_of(network)
    assert thresholds.dial is not None
    thresholds.set_budget(share if share == 1 else thresholds.dial.nearest(share))


def _report(
    job: Run,
    network: nn.Module,
    metadata: dict[str, Any],
    learned: dict[str, Any],
    certified: tuple[Certificate, Gain | None] | None,
    output: FolderOptions,
) -> None:
    """Save the dial with its metadata, end the run and print the results."""
    from ... import save
    from ...evaluate import tables
    from ...hosts.attach import thresholds_of
    from ..screen import print_result

    save(network, job.thresholds, **metadata)
    job.close()
    dial = thresholds_of(network).dial
    assert dial is not None
    if not output.quiet:
        divergences = zip(dial.share.tolist(), learned["divergence"], strict=False)
        unevaluated = [{"budget": share, "divergence": divergence} for share, divergence in divergences]
        rows = metadata["budgets"] or unevaluated
        title = f"dial from {dial.lowest:g} to {dial.highest:g}"
        tables.show([{HEADINGS[name]: value for name, value in row.items()} for row in rows], title)
        print_result(f"thresholds written to {job.thresholds}")
        if certified:
            print_result(paragraph(*certified))
    if output.json:
        values = {**metadata, "thresholds": str(job.thresholds), "seconds": learned["seconds"]}
        tables.write_json({**values, **(as_json(*certified) if certified else {})}, output.json)


def _print_dry_run(
    network: nn.Module, loader: Loader, held_out: Loader | None, options: DialRunOptions, run: RunOptions, job: Run
) -> None:
    """Print what would be done, and an estimate of the time."""
    from ...learning.dial import max_views
    from ...learning.options import DialOptions
    from ..runs import estimate_time
    from ..screen import print_result

    held_out_images = held_out.images if held_out else 0
    budgets = len(options.budget or REPORT_BUDGETS)
    print_result(
        f"would learn a dial from {options.low:g} to {options.high:g} in {options.knots} rows, with a search over "
        f"{options.views:,} views of {loader.images:,} images"
    )
    if held_out_images:
        print_result(f"would report accuracy at {budgets} budgets on {held_out_images:,} images")
    else:
        print_result("would report no accuracy")
    print_result(f"would write {job.thresholds}")
    settings = DialOptions(views=options.views, knots=options.knots, calibration=options.calibration)
    passes = max_views(settings, loader.images) + held_out_images * (1 + budgets)
    reads = options.calibration + min(settings.checked, loader.images) + held_out_images
    print_result(estimate_time(network, loader, run, passes=passes, reads=reads))


def _evaluate_budgets(
    network: nn.Module, held_out: Loader, budgets: list[float] | None, run: RunOptions
) -> list[dict[str, Any]]:
    """Evaluate the dial at each budget on the held-out images; return one row per budget."""
    from ...evaluate.accuracy import evaluate_policies
    from ...hosts.attach import thresholds_of
    from ..progress import progress_bar

    thresholds = thresholds_of(network)
    dial = thresholds.dial
    assert dial is not None
    shares = budgets or [share for share in REPORT_BUDGETS if dial.lowest <= share <= dial.highest]
    policies = {}
    for share in shares:
        _set_nearest(network, share)
        policies[f"{share:g}"] = copy.deepcopy(thresholds)
    with progress_bar("evaluating", held_out.images) as bar:
        evaluations = evaluate_policies(
            network, held_out, policies, device=run.torch_device, amp=run.amp_dtype, speed=False, progress=bar
        )
    return [
        {"budget": share, "share": e.share, "top1": e.top1, "top1_dense": e.dense_top1, "agreement": e.agreement}
        for share, e in zip(shares, evaluations.values(), strict=True)
    ]
