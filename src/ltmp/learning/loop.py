"""The learning run: calibrate, optimise, meet the budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed import LostRankError, exchange, rank, world
from ..errors import UsageError
from ..hosts.attach import attachment
from ..method.thresholds import Thresholds
from .batches import Batch, apart, first, split, stream
from .budget import check_target
from .calibrate import calibrate, geometry_of
from .heldout import HeldOut, Progress
from .log import Journal, Logger
from .objective import Objective
from .optimiser import Run, Step
from .probe import learn_probe
from .resume import load_run, save_run
from .weights import Tuning, cut, tuned

CALIBRATED = 128
"""Images that the calibrated start is taken from; the budget is met on all that are kept apart."""


@dataclass(frozen=True)
class LearnResult:
    """How a run ended.

    Attributes:
        target: the share asked for; share: the share deployed, on the images kept apart.
        views: images looked at, calibration and final adjustment included.
        seconds: wall time of this process.
        history: one entry an optimisation step.
        tuned: whether the model has weights that were tuned along.
    """

    target: float
    share: float
    views: int
    seconds: float
    history: list[Step] = field(default_factory=list)
    tuned: bool = False


@dataclass(frozen=True)
class _Settings:
    """What makes two runs the same run; a checkpoint of another one is refused."""

    target: float
    views: int
    accumulate: int
    batch: int
    lr: float
    distill: bool
    budget_weight: float
    calibrate: int
    seed: int
    variant: str
    scores: dict[str, str | float]
    depth: int
    tuning: dict[str, Any] | None


def learn(
    model: nn.Module,
    loader: Iterable[Batch],
    target: float = 0.6,
    *,
    views: int = 16_000,
    accumulate: int = 1,
    lr: float = 1.0,
    distill: bool = False,
    budget_weight: float = 10.0,
    calibration: int = 512,
    seed: int = 0,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 20,
    on_step: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
    log: Logger | None = None,
    tuning: Tuning | None = None,
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
        loader: shuffled batches of images [B, 3, H, W] and labels [B], as `ltmp.learning.batches.split` takes them
            (pairs, triples, dictionaries, images alone); a `ltmp.data.Loader`, or any iterable that can be iterated
            again and again. A run resumes exactly where the loader gives the same batches again.
        target: share of the dense model's multiply-adds, in (0, 1).
        views: images to optimise on, 0 for the calibrated start alone; calibration and the final adjustment add at most
            `23 * calibration`, and a probe, where the scores ask for one, at most 512.
        accumulate: batches an optimisation step.
        lr: factor on the default learning rates.
        distill: learn from the dense model's output instead of labels.
        budget_weight: lambda of the budget loss.
        calibration: images kept for calibration and for the final adjustment.
        seed: of whatever is random in the loader's transforms.
        device: where to learn; default the model's.
        amp: autocast type, e.g. `torch.bfloat16`.
        checkpoint: file to save the run in, every `save_every` steps and when interrupted; an existing one is resumed.
        on_step: called after every step.
        progress: called with (done, of how many, what) while images are read, calibrated on and judged.
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
    start = time.perf_counter()
    made = attachment(model)
    thresholds = made.thresholds
    if views < 0 or accumulate < 1 or calibration < 2:
        raise UsageError("views must be at least 0, accumulate at least 1 and calibration at least 2")
    place = torch.device(device) if device is not None else thresholds.merge.device
    model.to(place).eval()
    images, labels = first(loader, calibration, progress)
    images = images.to(place)
    check_target(target, geometry_of(model, images), made.body.protected)

    # again where there is one: a run is of its own images alone, resumed or not
    probed = learn_probe(model, images, amp=amp, progress=progress) if thresholds.config.asks_probe else 0
    batch = getattr(loader, "batch_size", None) or len(split(next(iter(loader)))[0])
    views_a_step = batch * world() * accumulate
    settings = _Settings(target, views, accumulate, batch * world(), lr, distill, budget_weight, len(images), seed,
                         thresholds.config.variant, thresholds.config.scores, thresholds.depth,
                         asdict(tuning) if tuning else None)  # fmt: skip
    run = Run(thresholds, lr, steps=max(1, round(views / views_a_step)) if views else 0)
    # the teacher: weights that train are no longer those of the model as it was
    original = model if tuning is None else copy.deepcopy(model).requires_grad_(False)
    cast = torch.autocast(place.type, amp) if amp is not None else nullcontext()
    journal = Journal(log if rank() == 0 else None, model, images)
    part = float(not distill) * (1.0 if tuning is None else tuning.labels)
    # frozen weights cannot be much better than the dense model, whose answers tell more than labels
    judged = part if tuning is not None else 0.0
    mine = slice(rank(), None, world())
    known = None if labels is None else labels[mine].to(place)
    held_out = HeldOut(model, images[mine].contiguous(), batch, progress, original, known, judged)

    def save() -> None:
        if checkpoint is not None and rank() == 0:
            along = {"tuned": weights.state()} if weights is not None else {}
            save_run(checkpoint, asdict(settings), {**run.state(), **along})

    def tell(step: Step) -> None:
        run.history.append(step)
        journal.step(step)
        if on_step is not None:
            on_step(step)
        if step.step % save_every == 0 or step.step == run.steps:
            save()

    def saved() -> dict[str, Any] | None:
        return load_run(checkpoint, asdict(settings)) if checkpoint is not None and rank() == 0 else None

    state = exchange(saved())[0]
    if state is not None:
        run.restore(state)
    else:
        with cast:
            # all of them are in memory at once, and 128 images have some 10,000 scores a block
            calibrate(model, images[:CALIBRATED], target)
            # ranks on unlike hardware may round unlike
            thresholds.set(*exchange((thresholds.merge.tolist(), thresholds.prune.tolist()))[0])
            run.begin(held_out.candidate(target))
            journal.deployed(0, run.start)
    torch.manual_seed(seed + run.step)
    objective = Objective(model, target, budget_weight, part, original, cast)
    skipped = 0 if tuning is None else -(-apart(loader, len(images)) // batch)
    batches = stream(loader, skipped + run.step * accumulate * world(), batch)
    with _only(model, thresholds), tuned(model, original, tuning, run.steps) as weights:
        if weights is not None and state is not None:
            weights.restore(state["tuned"])
        try:
            with _learning(thresholds):
                while run.step < run.steps:
                    joint = tuning is None or run.step % tuning.joint_every == 0
                    with nullcontext() if joint else cut(thresholds):
                        loss, share, kept = objective.gradients(batches, accumulate)
                    if weights is not None:
                        weights.update()
                    run.update()
                    tell(Step(run.step, run.steps, loss, share, time.perf_counter() - start, kept))
        except (KeyboardInterrupt, LostRankError):
            save()
            raise
        best, looks = run.start, run.start.looks
        if run.step:
            run.finish()
            if weights is not None:
                weights.fold()
            with cast:
                learned = held_out.candidate(target)
            # single batches are noisy, and the calibrated start is good: learning must not end behind it
            best, looks = min(learned, best, key=lambda candidate: candidate.loss), looks + learned.looks
            if weights is not None and best is not learned:
                weights.undo()
            elif weights is not None:
                # a dial of other weights
                thresholds.set_dial(None)
    thresholds.set(best.merge, best.prune)
    with cast:
        journal.deployed(run.steps + 1, best)
    looked = len(images) * (1 + looks) + probed
    seen = len(run.history) * views_a_step + looked
    stayed = tuning is not None and best is not run.start
    return LearnResult(target, best.share, seen, time.perf_counter() - start, run.history, stayed)


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
    trained = {parameter: parameter.requires_grad for parameter in thresholds.parameters()}
    thresholds.train().requires_grad_(True)
    try:
        yield
    finally:
        thresholds.eval()
        for parameter, before in trained.items():
            parameter.grad = None
            parameter.requires_grad_(before)
