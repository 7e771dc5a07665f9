"""The learning run: calibrate, optimise, meet the budget."""

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
from .batches import Batch, apart, batch_size, described, first, stream, watched
from .budget import check_target
from .calibrate import geometry_of
from .fit import Calibrator, settle_as, settled
from .heldout import Candidate, HeldOut
from .inputs import pixels_of
from .log import Journal
from .objective import Objective
from .optimiser import Step, ThresholdOptimiser
from .options import LearnOptions, LearnSettings, with_keywords
from .paper import PaperOptimiser, linear_gradients
from .probe import learn_probe
from .progress import Progress, telling
from .randomness import preserved_random_state
from .resume import restoring
from .schedule import Shape, check_every
from .weights import Weights, cut, tuned

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATED = 128
"""Images that the calibrated start is taken from: all of them are in memory at once, and have some 10,000 scores a
block. The budget is met on all that are kept apart."""


_LEARNED_WITH = ("recipe", "views", "accumulate", "lr", "distill", "budget_weight")


@dataclass(frozen=True)
class LearnResult:
    """How a run ended.

    Attributes:
        target: the share asked for; share: the share deployed, on the images kept apart.
        trained_share: of the last tenth of the steps, on their images; None where there were none.
        views: images looked at, calibration and final adjustment included.
        seconds: wall time of this process.
        history: one entry an optimisation step.
        tuned: whether the model has weights that were tuned along.
        distribution: how answers are read in the loss, see `ltmp.learning.Distribution`.
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
        """See the class."""
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
    """Learn an attached model's thresholds so that it costs `target` of the dense FLOPs; nothing else changes.

    Starts from thresholds calibrated block by block on the first images, optimises the 2 L numbers with gradients
    through the hard decisions (paper, section 3.4), and closes what is left to the budget by bisection on one scalar.
    Of the calibrated and the learned thresholds, those stay whose answers are closer to the dense model's, or with
    `tuning` those of less loss.

    Called by every rank of a `torch.distributed` process group, with the same model, loader and settings, this is one
    run: ranks take turns at the batches, a step looks at a batch of each, and all end with the same thresholds: those
    of one process with batches as large as all ranks' together. Rank 0 writes the checkpoint.

    Args:
        model: attached; left in eval mode on `device`.
        loader: shuffled batches: (images [B, 3, H, W], labels, ...), images alone (with `distill`), or a dict with
            `pixel_values` and `labels`; a `ltmp.data.Loader`, or any iterable that can be iterated again and again. A
            run resumes exactly where the loader gives the same batches again. Labels are class numbers [B]; [B, K] of
            0 and 1 for multi-label heads, whose outputs, like a single logit, are then compared one by one. What a
            processor of transformers returned goes to the model whole, labels left out. Models that answer with
            features, maps, boxes or text learn from the dense model's answers.
        target: share of the dense model's multiply-adds, in (0, 1).
        recipe: `ltmp`, as above, or `paper`, the paper's own training, for comparisons: SGD from a fixed start (merge
            0.9, prune 0), no calibration, label smoothing, and the thresholds of the last step with whatever share they
            have when deployed. Attach with `LTMPConfig(tau=0.5)`, take batches of 128 and augmented images, and look at
            each image once, as `ltmp learn --recipe paper` does.
        views: images to optimise on, 0 for the calibrated start alone; calibration and the final adjustment add at most
            `23 * calibration`, and a probe, where the scores ask for one, at most 512.
        accumulate: batches an optimisation step.
        lr: factor on the default learning rates.
        distill: learn from the dense model's output instead of labels.
        loss: your own, (answers [B, ...], the dense model's) to a loss [B] of each image; in place of the divergence of
            classes, of the next token of a text, or of features, depth and maps (their squared error relative to the
            variance of the dense model's).
        budget_weight: lambda of the budget loss.
        calibration: images kept for calibration and for the final adjustment.
        every: of how many blocks one removes tokens, see `ltmp.learn_dial`.
        seed: of whatever is random in the loader's transforms.
        device: where to learn; default the model's.
        amp: autocast type, e.g. `torch.bfloat16`.
        checkpoint: file to save the run in, every `save_every` steps and when interrupted; an existing one is resumed.
        on_step: called after every step.
        progress: called with (done, of how many, what) while images are read, calibrated on, learned from and judged;
            True for a bar, False for none, None for one in a terminal or a notebook.
        log: told of loss, share, thresholds and tokens of each block after every step, and given pictures of what a
            few images lost; `ltmp.learning.TensorBoard(folder)`, or any `ltmp.learning.Logger`.
        tuning: which of the model's weights train along; see `ltmp.tune`, which also counts the views.

    Returns:
        How it ended; the thresholds are in `model.ltmp`.

    Raises:
        UsageError: a target that cannot be reached, or settings that make no sense.
        LTMPError: NaN in images or loss, no images, or a checkpoint of another run.
        LostRankError: another rank is gone; like KeyboardInterrupt, passed on after the checkpoint was saved.
    """
    options = LearnOptions(**settings)
    with telling(options.progress if rank() == 0 else False) as progress:
        job = _Job(model, loader, target, options, progress)
        state = job.begin()
        with _only(model, job.thresholds), tuned(model, job.original, options.tuning, job.run.steps) as weights:
            job.optimise(weights, state)
            best, looks = job.choose(weights)
    return job.end(best, looks)


class _Job:
    """One call of `learn`: what it learns from, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        target: float,
        options: LearnOptions,
        progress: Progress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.progress = progress
        self.model, self.loader, self.target, self.options = model, loader, target, options
        made = attachment(model)
        self.thresholds = made.thresholds
        check_every(options.every, self.thresholds.depth)
        place = options.place(self.thresholds)
        model.to(place).eval()
        images, labels = first(loader, options.calibration, progress)
        self.images = images.to(place)
        self.seen = self.thresholds.seen = self.thresholds.seen or Seen()
        self.seen.add(pixels_of(images))
        check_target(target, geometry_of(model, self.images), made.body.protected)
        # once: weights may train
        self.subject = options.subject(model, loader, self.images)
        self.judge = Judge.of(model, self.images[:1], labels, options.loss)
        # nothing to compare labels with
        self.part = options.labels if self.judge.labelled else 0.0
        if options.paper and not self.part:
            raise UsageError("the paper's recipe learns from labels of classes: this model has no such answers")
        self.batch = batch_size(loader)
        # a checkpoint is of the scores that were given
        self.scores = self.thresholds.config.scores
        self.saved: dict[str, Any] | None = exchange(options.saved(self.settings))[0]
        self.calibrator, self.shape, self.before = self._settled()
        self.views_a_step = self.batch * world() * options.accumulate
        steps = max(1, round(options.views / self.views_a_step)) if options.views else 0
        optimiser = PaperOptimiser if options.paper else ThresholdOptimiser
        self.run = optimiser(self.thresholds, options.lr, steps=steps, every=options.every)
        # the teacher: weights that train are no longer those of the model as it was
        self.original = model if options.tuning is None else copy.deepcopy(model).requires_grad_(False)
        self.cast = options.cast(place)
        self.journal = Journal(options.log if rank() == 0 else None, model, self.images)
        self.held_out = self._held_out(labels)

    def _settled(self) -> tuple[Calibrator | None, Shape | None, int]:
        """Who calibrates the start, its shape, and how many images were looked at before.

        A saved run has begun: its images have settled everything, and nobody looks at them again.
        """
        thresholds, options, model = self.thresholds, self.options, self.model
        # older versions did not save it
        if self.saved is not None and "settled" in self.saved:
            with restoring(options.checkpoint):
                return None, None, settle_as(thresholds, self.saved["settled"])
        # again where there is one: a run is of its own images alone
        probed = (
            learn_probe(model, self.images, amp=options.amp, judge=self.judge, progress=self.progress)
            if thresholds.config.needs_probe
            else 0
        )
        if options.paper:
            return None, None, probed
        calibrator = Calibrator(model, self.images[:CALIBRATED], self.judge, options.every)
        return calibrator, calibrator.fit([self.target])[self.target], probed

    @property
    def looked(self) -> int:
        """Images looked at before the first step."""
        return self.before + (0 if self.calibrator is None else self.calibrator.views)

    def _held_out(self, labels: Tensor | None) -> HeldOut:
        """This rank's part of the images kept apart."""
        # frozen weights cannot be much better than the dense model, whose answers tell more than labels
        judged = self.part if self.options.tuning is not None else 0.0
        mine = slice(rank(), None, world())
        known = None if labels is None else labels[mine].to(self.images.device)
        own = self.images[mine].contiguous()
        original = self.original
        return HeldOut(self.model, own, self.batch, self.progress, original, known, judged, self.judge)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify a run; a checkpoint with others is refused."""
        options, config = self.options, self.thresholds.config
        return {
            "target": self.target,
            **{name: getattr(options, name) for name in _LEARNED_WITH},
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

    def begin(self) -> dict[str, Any] | None:
        """Take up a saved run and return its state, or start from calibrated thresholds."""
        options, run, state = self.options, self.run, self.saved
        if state is not None:
            with restoring(options.checkpoint):
                run.restore(state)
                self.seen.add_keys(state["seen"])
        else:
            with self.cast:
                run.begin(self._start())
                self.journal.deployed(0, run.start)
        torch.manual_seed(options.seed + run.step)
        self.objective = Objective(
            self.model, self.target, options.budget_weight, self.part, self.original, self.cast,
            self.judge, options.smoothing,
        )  # fmt: skip
        # thresholds that meet the budget on them anyway may learn from the images kept apart
        shared = options.tuning is None and not options.paper
        kept = 0 if shared else -(-apart(self.loader, len(self.images)) // self.batch)
        batches = stream(self.loader, kept + run.step * options.accumulate * world(), self.batch)
        self.batches = watched(self.seen, batches)
        return state

    def _start(self) -> Candidate:
        """Thresholds to start from: calibrated and on budget, or the paper's."""
        if self.calibrator is None or self.shape is None:
            set_paper_start(self.thresholds)
            return self.held_out.judged()
        self.calibrator.run(self.shape, self.target, slice(None), "calibrating")
        # ranks on unlike hardware may round unlike
        self.thresholds.set(*exchange((self.thresholds.merge.tolist(), self.thresholds.prune.tolist()))[0])
        return self.held_out.candidate(self.target)

    def optimise(self, weights: Weights | None, state: dict[str, Any] | None) -> None:
        """Take the steps that are left, and save where asked, at the latest when it is stopped."""
        if weights is not None and state is not None:
            with restoring(self.options.checkpoint):
                weights.restore(state["tuned"])
        self.run.complete(weights)
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
        with nullcontext() if joint else cut(self.thresholds):
            loss, share, kept = self.objective.gradients(self.batches, self.options.accumulate)
        if weights is not None:
            weights.update()
        run.update()
        step = Step(run.step, run.steps, loss, share, time.perf_counter() - self.started, kept)
        run.history.append(step)
        run.complete(weights)
        self.journal.step(step)
        if self.progress is not None:
            self.progress(run.step, run.steps, f"learning, loss {loss:.3f}, share {share:.3f}")
        if self.options.on_step is not None:
            self.options.on_step(step)
        if step.step % self.options.save_every == 0 or step.step == run.steps:
            self._save()

    def _save(self) -> None:
        self.options.save(self.settings, {
            **self.run.completed, "seen": self.seen.keys, "settled": settled(self.thresholds, self.looked),
        })  # fmt: skip

    def choose(self, weights: Weights | None) -> tuple[Candidate, int]:
        """The better of the calibrated and the learned thresholds, and how often the images kept apart were seen."""
        start = self.run.start
        if not self.run.step:
            return start, start.looks
        self.run.finish()
        if weights is not None:
            weights.fold()
        with self.cast:
            learned = self.held_out.judged() if self.options.paper else self.held_out.candidate(self.target)
        if self.options.paper:
            return learned, start.looks + learned.looks
        # single batches are noisy, and the calibrated start is good: learning must not end behind it
        best = min(learned, start, key=lambda candidate: candidate.loss)
        if weights is not None and best is not learned:
            weights.undo()
        elif weights is not None:
            # a dial of other weights
            self.thresholds.set_dial(None)
        return best, start.looks + learned.looks

    def end(self, best: Candidate, looks: int) -> LearnResult:
        """Set the thresholds that were chosen."""
        self.thresholds.set(best.merge, best.prune)
        with self.cast:
            self.journal.deployed(self.run.steps + 1, best)
        for keys in exchange(self.seen.keys):
            self.seen.add_keys(keys)
        seen = len(self.run.history) * self.views_a_step + len(self.images) * looks + self.looked
        stayed = self.options.tuning is not None and best is not self.run.start
        note(
            self.model,
            {**described(self.model, self.loader), "target": self.target, "share": best.share, "views": seen},
        )
        seconds = time.perf_counter() - self.started
        return LearnResult(self.target, best.share, seen, seconds, self.run.history, stayed, self.judge.distribution)


@contextmanager
def _only(model: nn.Module, thresholds: Thresholds) -> Iterator[None]:
    """Freeze everything but the thresholds inside."""
    mine = set(thresholds.parameters())
    trains = {p: p.requires_grad for p in model.parameters() if p not in mine}
    for parameter in trains:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in trains.items():
            parameter.requires_grad_(before)


@contextmanager
def _learning(thresholds: Thresholds) -> Iterator[None]:
    """Masked form inside, with gradients to the thresholds; the host stays in eval mode, without dropout."""
    before = thresholds.trains
    thresholds.train().requires_grad_(True)
    try:
        yield
    finally:
        thresholds.eval().requires_grad_(before)
        for parameter in thresholds.parameters():
            parameter.grad = None
