"""A learning run: calibrate a start, optimise the thresholds, meet the budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.describe import note
from ..distributed import LostRankError, exchange, rank, world
from ..errors import UsageError
from ..fingerprint import Seen
from ..hosts.attach import attachment
from ..method.paper import set_paper_start
from ..method.thresholds import Thresholds
from .answers import Distribution, Judge
from .batches import Batch, batch_size, first_images, held_out_count, loader_metadata, stream, watched
from .budget import check_target
from .calibrate import geometry_of
from .heldout import Candidate, HeldOut
from .inputs import pixels_of
from .log import Journal
from .objective import Objective
from .optimiser import Step, ThresholdOptimiser
from .options import LearnOptions, LearnSettings, with_keywords
from .paper import PaperOptimiser, linear_gradients
from .probe import learn_probe
from .progress import Progress, reporting
from .randomness import preserved_random_state
from .resume import restoring
from .schedule import Shape, check_every
from .start import Calibrator, restore_start, start_state
from .weights import Weights, tuned, weights_only

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATED = 128
"""Images that the start is calibrated on. They run as one batch, whose scores (some 10,000 per block) are all held in
memory; the budget is then met on all held-out images."""

_SETTINGS = ("recipe", "views", "accumulate", "lr", "distill", "budget_weight")
"""Options that identify a run."""


@dataclass(frozen=True)
class LearnResult:
    """Result of a learning run.

    Attributes:
        target: the requested share.
        share: the deployed share, measured on the held-out images.
        views: images processed, including calibration and the final adjustment.
        seconds: wall time of this process.
        history: one entry per optimisation step.
        tuned: whether the model keeps weights that were tuned along with the thresholds.
        distribution: how the loss reads the model's answers, see `ltmp.learning.Distribution`.
    """

    target: float
    share: float
    views: int
    seconds: float
    history: list[Step] = field(default_factory=list)
    tuned: bool = False
    distribution: Distribution = "categorical"

    @property
    def trained_share(self) -> float | None:
        """Mean share of the last tenth of the steps, on their images; None without steps."""
        last = self.history[-max(1, len(self.history) // 10) :]
        return sum(step.share for step in last) / len(last) if last else None


@with_keywords(LearnOptions)
@preserved_random_state()
def learn(
    model: nn.Module,
    loader: Iterable[Batch],
    target: float = 0.6,
    **settings: Unpack[LearnSettings],
) -> LearnResult:
    """Learn the thresholds of an attached model so that it costs `target` of the dense FLOPs; nothing else changes.

    Starts from thresholds calibrated block by block on the first images, optimises the 2 L numbers with gradients
    through the hard decisions (paper, section 3.4), and closes the remaining gap to the budget by bisection on one
    scalar. Of the calibrated and the learned thresholds, it keeps those whose answers are closer to the dense model's,
    or, with `tuning`, those with the lower loss.

    If every rank of a `torch.distributed` process group calls this with the same model, loader and settings, they
    perform one run: batches are dealt out to the ranks, each step uses one batch per rank, and all ranks end with the
    same thresholds, those of a single process whose batches are as large as all ranks' together. Rank 0 writes the
    checkpoint.

    Args:
        model: attached; left in eval mode on `device`.
        loader: shuffled batches: (images [B, 3, H, W], labels, ...), images alone (with `distill`), or a dict with
            `pixel_values` and `labels`; a `ltmp.data.Loader`, or any iterable that can be iterated more than once. A
            run resumes exactly if the loader yields the same batches again. Labels are class indices [B], or [B, K] of
            0 and 1 for multi-label heads, whose outputs, like a single logit, are compared one by one. The output of a
            transformers processor is passed to the model whole, except for labels. Models that answer with features,
            maps, boxes or text learn from the dense model's answers.
        target: share of the dense model's multiply-adds, in (0, 1).
        recipe: `ltmp`, as above, or `paper`, the paper's own training, for comparisons: SGD from a fixed start (merge
            0.9, prune 0), no calibration, label smoothing, and the thresholds of the last step at whatever share they
            have when deployed. Attach with `LTMPConfig(tau=0.5)`, use batches of 128 and augmented images, and see
            each image once, as `ltmp learn --recipe paper` does.
        views: images to optimise on, 0 for the calibrated start alone; calibration and the final adjustment add at most
            `23 * calibration`, and a probe, if the scores need one, at most 512.
        accumulate: batches per optimisation step.
        lr: factor on the default learning rates.
        distill: learn from the dense model's output instead of labels.
        loss: your own loss, a function of (answers [B, ...], the dense model's answers) that returns the loss of each
            image [B]; replaces the divergence of classes or of a text's next token, and the squared error, relative to
            the variance of the dense model's, of features, depth and maps.
        budget_weight: lambda of the budget loss.
        calibration: images held out for calibration and the final adjustment.
        every: remove tokens in one of this many blocks, see `ltmp.learn_dial`.
        seed: of the random transforms in the loader.
        device: where to learn; default the model's.
        amp: autocast dtype, e.g. `torch.bfloat16`.
        checkpoint: file to save the run in, every `save_every` steps and when interrupted; an existing one is resumed.
        on_step: called after every step.
        progress: called with (done, total, description) while images are read, calibrated on, learned from and
            evaluated; True for a bar, False for none, None for one in a terminal or a notebook.
        log: receives the loss, the share, and the thresholds and tokens of each block after every step, and pictures of
            the tokens that a few images lost; `ltmp.learning.TensorBoard(folder)`, or any `ltmp.learning.Logger`.
        tuning: which of the model's weights train along; see `ltmp.tune`, which also computes `views`.

    Returns:
        Figures of the run; the thresholds are in `model.ltmp`.

    Raises:
        UsageError: a target that cannot be reached, or settings that make no sense.
        LTMPError: NaN in images or loss, no images, or a checkpoint of another run.
        LostRankError: another rank is gone; like KeyboardInterrupt, re-raised after the checkpoint was saved.
    """
    options = LearnOptions(**settings)
    with reporting(options.progress if rank() == 0 else False) as progress:
        job = _Job(model, loader, target, options, progress)
        job.begin()
        tuning = tuned(model, job.teacher, options.tuning, job.run.steps)
        with _frozen_weights(model, job.thresholds), tuning as weights:
            job.optimise(weights)
            best, looks = job.choose(weights)
    return job.end(best, looks)


class _Job:
    """State of one call of `learn`."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        target: float,
        options: LearnOptions,
        progress: Progress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.loader, self.target, self.options = model, loader, target, options
        self.progress = progress
        attached = attachment(model)
        self.thresholds = attached.thresholds
        check_every(options.every, self.thresholds.depth)
        device = options.device_for(self.thresholds)
        model.to(device).eval()
        images, labels = first_images(loader, options.calibration, progress)
        self.images = images.to(device)
        self.seen = self.thresholds.seen = self.thresholds.seen or Seen()
        self.seen.add(pixels_of(images))
        check_target(target, geometry_of(model, self.images), attached.body.protected)
        # computed once, before any weight trains
        self.subject = options.subject(model, loader, self.images)
        self.judge = Judge.of(model, self.images[:1], labels, options.loss)
        self.label_weight = options.label_weight if self.judge.labelled else 0.0
        if options.paper and not self.label_weight:
            raise UsageError("the paper's recipe learns from labels of classes: this model has no such answers")
        self.batch = batch_size(loader)
        # a checkpoint is identified by the scores of the call; choosing the start may change them
        self.scores = self.thresholds.config.scores
        self.saved: dict[str, Any] | None = exchange(options.load(self.settings))[0]
        self.calibrator, self.shape, self.earlier_views = self._choose_start()
        self.views_per_step = self.batch * world() * options.accumulate
        steps = max(1, round(options.views / self.views_per_step)) if options.views else 0
        optimiser = PaperOptimiser if options.paper else ThresholdOptimiser
        self.run = optimiser(self.thresholds, options.lr, steps=steps, every=options.every)
        # weights that train along must not change the teacher
        self.teacher = model if options.tuning is None else copy.deepcopy(model).requires_grad_(False)
        self.autocast = options.autocast(device)
        self.journal = Journal(options.log if rank() == 0 else None, model, self.images)
        self.held_out = self._held_out(labels)

    def _choose_start(self) -> tuple[Calibrator | None, Shape | None, int]:
        """What calibrates the start, its shape, and the number of images processed so far.

        A resumed run takes what its images settled from the checkpoint and calibrates nothing.
        """
        thresholds, options, model = self.thresholds, self.options, self.model
        # older versions did not save it
        if self.saved is not None and "settled" in self.saved:
            with restoring(options.checkpoint):
                return None, None, restore_start(thresholds, self.saved["settled"])
        probed = 0
        if thresholds.config.needs_probe:
            # even if the model has a probe: a run depends on its own images alone
            probed = learn_probe(model, self.images, amp=options.amp, judge=self.judge, progress=self.progress)
        if options.paper:
            return None, None, probed
        calibrator = Calibrator(model, self.images[:CALIBRATED], self.judge, options.every)
        return calibrator, calibrator.choose_starts([self.target])[self.target], probed

    @property
    def start_views(self) -> int:
        """Images processed before the first step, apart from meeting the budget."""
        return self.earlier_views + (0 if self.calibrator is None else self.calibrator.views)

    def _held_out(self, labels: Tensor | None) -> HeldOut:
        """This rank's share of the held-out images."""
        mine = slice(rank(), None, world())
        # frozen weights cannot do much better than the dense model, whose answers carry more information than labels
        label_weight = self.label_weight if self.options.tuning is not None else 0.0
        return HeldOut(
            self.model, self.images[mine].contiguous(), self.batch, self.progress, self.teacher,
            None if labels is None else labels[mine].to(self.images.device), label_weight, self.judge,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify a run; a checkpoint with others is refused."""
        options, config = self.options, self.thresholds.config
        return {
            "target": self.target,
            **{name: getattr(options, name) for name in _SETTINGS},
            "batch": self.batch * world(),
            "calibrate": len(self.images),
            "seed": options.seed,
            "variant": config.variant,
            "scores": asdict(self.scores),
            **options.spacing,
            "depth": self.thresholds.depth,
            "tuning": asdict(options.tuning) if options.tuning else None,
            **self.subject,
        }

    def begin(self) -> None:
        """Restore the saved run, or start from calibrated thresholds; prepare the objective and its batches."""
        options, run = self.options, self.run
        if self.saved is not None:
            with restoring(options.checkpoint):
                run.restore(self.saved)
                self.seen.add_keys(self.saved["seen"])
        else:
            with self.autocast:
                run.begin(self._start())
                self.journal.deployed(0, run.start)
        torch.manual_seed(options.seed + run.step)
        self.objective = Objective(
            self.model, self.target, options.budget_weight, self.label_weight, self.teacher, self.autocast,
            self.judge, options.smoothing,
        )  # fmt: skip
        # thresholds meet the budget on the held-out images in any case, so they may also learn from them
        shared = options.tuning is None and not options.paper
        skipped = 0 if shared else -(-held_out_count(self.loader, len(self.images)) // self.batch)
        batches = stream(self.loader, skipped + run.step * options.accumulate * world(), self.batch)
        self.batches = watched(self.seen, batches)

    def _start(self) -> Candidate:
        """Thresholds to start from: calibrated and on budget, or the paper's."""
        if self.calibrator is None or self.shape is None:
            set_paper_start(self.thresholds)
            return self.held_out.evaluate()
        self.calibrator.run(self.shape, self.target, slice(None), "calibrating")
        # rank 0's, because different hardware may round differently
        self.thresholds.set(*exchange((self.thresholds.merge.tolist(), self.thresholds.prune.tolist()))[0])
        return self.held_out.candidate(self.target)

    def optimise(self, weights: Weights | None) -> None:
        """Take the remaining steps; save every `save_every` of them, at the end, and when interrupted."""
        if weights is not None and self.saved is not None:
            with restoring(self.options.checkpoint):
                weights.restore(self.saved["tuned"])
        self.run.take_snapshot(weights)
        try:
            with _learning(self.thresholds), linear_gradients(self.thresholds, self.options.paper):
                while self.run.step < self.run.steps:
                    self._step(weights)
        except (KeyboardInterrupt, LostRankError):
            self._save()
            raise

    def _step(self, weights: Weights | None) -> None:
        run, tuning = self.run, self.options.tuning
        joint = tuning is None or run.step % tuning.joint_every == 0
        with nullcontext() if joint else weights_only(self.thresholds):
            loss, share, kept = self.objective.gradients(self.batches, self.options.accumulate)
        if weights is not None:
            weights.update()
        run.update()
        step = Step(run.step, run.steps, loss, share, time.perf_counter() - self.started, kept)
        run.history.append(step)
        run.take_snapshot(weights)
        self.journal.step(step)
        if self.progress is not None:
            self.progress(run.step, run.steps, f"learning, loss {loss:.3f}, share {share:.3f}")
        if self.options.on_step is not None:
            self.options.on_step(step)
        if step.step % self.options.save_every == 0 or step.step == run.steps:
            self._save()

    def _save(self) -> None:
        settled = start_state(self.thresholds, self.start_views)
        self.options.save(self.settings, {**self.run.snapshot, "seen": self.seen.keys, "settled": settled})

    def choose(self, weights: Weights | None) -> tuple[Candidate, int]:
        """The better of the calibrated and the learned thresholds, and the number of passes over held-out images."""
        start = self.run.start
        if not self.run.step:
            return start, start.looks
        self.run.finish()
        if weights is not None:
            weights.fold()
        with self.autocast:
            learned = self.held_out.evaluate() if self.options.paper else self.held_out.candidate(self.target)
        if self.options.paper:
            return learned, start.looks + learned.looks
        # steps are noisy and the calibrated start is good: learning must not end worse than it began
        best = min(learned, start, key=lambda candidate: candidate.loss)
        if weights is not None and best is not learned:
            weights.undo()
        elif weights is not None:
            # the dial was made for other weights
            self.thresholds.set_dial(None)
        return best, start.looks + learned.looks

    def end(self, best: Candidate, looks: int) -> LearnResult:
        """Set the chosen thresholds and note their metadata."""
        self.thresholds.set(best.merge, best.prune)
        with self.autocast:
            self.journal.deployed(self.run.steps + 1, best)
        for keys in exchange(self.seen.keys):
            self.seen.add_keys(keys)
        views = len(self.run.history) * self.views_per_step + len(self.images) * looks + self.start_views
        metadata = {**loader_metadata(self.model, self.loader), "target": self.target}
        note(self.model, {**metadata, "share": best.share, "views": views})
        return LearnResult(
            target=self.target,
            share=best.share,
            views=views,
            seconds=time.perf_counter() - self.started,
            history=self.run.history,
            tuned=self.options.tuning is not None and best is not self.run.start,
            distribution=self.judge.distribution,
        )


@contextmanager
def _frozen_weights(model: nn.Module, thresholds: Thresholds) -> Iterator[None]:
    """Freeze all parameters but the thresholds inside."""
    own = set(thresholds.parameters())
    trains = {p: p.requires_grad for p in model.parameters() if p not in own}
    for parameter in trains:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in trains.items():
            parameter.requires_grad_(before)


@contextmanager
def _learning(thresholds: Thresholds) -> Iterator[None]:
    """Mask tokens inside, with gradients to the thresholds; the host stays in eval mode, without dropout."""
    before = thresholds.trains
    thresholds.train().requires_grad_(True)
    try:
        yield
    finally:
        thresholds.eval().requires_grad_(before)
        for parameter in thresholds.parameters():
            parameter.grad = None
