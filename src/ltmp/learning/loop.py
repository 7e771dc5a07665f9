"""The learning run: calibrate, optimise, meet the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LTMPError, UsageError
from ..models import stack_of, thresholds_of
from ..stack import dense, record
from ..thresholds import Thresholds
from .budget import budget_loss, check_target
from .calibrate import calibrate
from .objective import task_loss, teacher
from .resume import load_run, save_run

Batch = tuple[Tensor, Tensor]

CALIBRATED = 128
"""Images that the calibrated start is taken from; the budget is met on all that are kept apart."""


@dataclass(frozen=True)
class Step:
    """One optimisation step, for progress and logs.

    Attributes:
        step, steps: this one, counted from 1, and how many there will be.
        loss: task loss; share: mean FLOPs share of the step's images.
        seconds: since learning (or its continuation) began.
    """

    step: int
    steps: int
    loss: float
    share: float
    seconds: float


@dataclass(frozen=True)
class LearnResult:
    """How a run ended.

    Attributes:
        target: the share asked for; share: the share deployed, on the images kept apart.
        views: images looked at, calibration and final adjustment included.
        seconds: wall time of this process.
        history: one entry an optimisation step.
    """

    target: float
    share: float
    views: int
    seconds: float
    history: list[Step] = field(default_factory=list)


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
    depth: int


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
) -> LearnResult:
    """Learn an attached model's thresholds so that it costs `target` of the dense FLOPs; nothing else changes.

    Starts from thresholds calibrated block by block on the first images, optimises the 2 L numbers with gradients
    through the hard decisions (paper, section 3.4), and closes what is left to the budget by bisection on one scalar.
    Of the calibrated and the learned thresholds, those stay whose answers are closer to the dense model's.

    Args:
        model: attached; left in eval mode on `device`.
        loader: shuffled batches of images [B, 3, H, W] and labels [B]; a `ltmp.data.Loader`, or any iterable that can
            be iterated again and again. A run resumes exactly where the loader gives the same batches again.
        target: share of the dense model's multiply-adds, in (0, 1).
        views: images to optimise on; calibration and the final adjustment add at most `23 * calibration`.
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

    Returns:
        How it ended; the thresholds are in `model.ltmp`.

    Raises:
        UsageError: a target that cannot be reached, or settings that make no sense.
        LTMPError: NaN in images or loss, no images, or a checkpoint of another run.
        KeyboardInterrupt: passed on, after the checkpoint was saved.
    """
    start = time.perf_counter()
    stack, thresholds = stack_of(model), thresholds_of(model)
    place = torch.device(device) if device is not None else thresholds.merge.device
    model.to(place).eval()
    images = _first_images(loader, calibration).to(place)
    with record() as calls, dense(), torch.inference_mode():
        model(images[:1])
    check_target(target, calls.geometry[0], stack.protected)
    if views < 1 or accumulate < 1 or calibration < 2:
        raise UsageError("views and accumulate must be at least 1 and calibration at least 2")

    batch = getattr(loader, "batch_size", None) or next(iter(loader))[0].shape[0]
    settings = _Settings(target, views, accumulate, batch, lr, distill, budget_weight, images.shape[0], seed,
                         thresholds.config.variant, thresholds.depth)  # fmt: skip
    steps = max(1, round(views / (batch * accumulate)))
    run = _Run(thresholds, lr, steps)
    cast = torch.autocast(place.type, amp) if amp is not None else nullcontext()
    saved = load_run(checkpoint, asdict(settings)) if checkpoint is not None else None
    if saved is not None:
        run.restore(saved)
    else:
        with cast:
            # all of them are in memory at once, and 128 images have some 10,000 scores a block
            calibrate(model, images[:CALIBRATED], target)
            run.begin(_candidate(model, images, target, batch))
    torch.manual_seed(seed + run.step)

    def save() -> None:
        if checkpoint is not None:
            save_run(checkpoint, asdict(settings), run.state())

    try:
        with _only(model, thresholds), _learning(thresholds):
            batches = _stream(loader, run.step * accumulate, batch)
            while run.step < steps:
                loss, share = _accumulate(model, batches, accumulate, place, cast, distill, target, budget_weight)
                run.update()
                run.history.append(Step(run.step, steps, loss, share, time.perf_counter() - start))
                if on_step is not None:
                    on_step(run.history[-1])
                if run.step % save_every == 0:
                    save()
    except KeyboardInterrupt:
        save()
        raise
    save()
    run.finish()
    with cast:
        learned = _candidate(model, images, target, batch)
    # single batches are noisy, and the calibrated start is good: learning must not end behind it
    best = min(learned, run.start, key=lambda candidate: candidate.loss)
    thresholds.set(best.merge, best.prune)
    looked = images.shape[0] * (1 + run.start.looks + learned.looks)
    seen = len(run.history) * batch * accumulate + looked
    return LearnResult(target, best.share, seen, time.perf_counter() - start, run.history)


@dataclass(frozen=True)
class _Candidate:
    """Thresholds that meet the budget on the images kept apart.

    Attributes:
        merge, prune: float32 [L].
        share: deployed; loss: divergence from the dense model's answers.
        looks: how often the images were looked at.
    """

    merge: Tensor
    prune: Tensor
    share: float
    loss: float
    looks: int


def _candidate(model: nn.Module, images: Tensor, target: float, batch: int) -> _Candidate:
    """Move the thresholds onto the budget and judge them as deployed."""
    share, looks = meet_budget(model, images, target, batch)
    losses = []
    with torch.inference_mode():
        for part in images.split(batch):
            losses.append(len(part) * float(task_loss(model(part), None, teacher(model, part))))
    thresholds = thresholds_of(model)
    values = (thresholds.merge.detach().cpu().clone(), thresholds.prune.detach().cpu().clone())
    return _Candidate(*values, share, sum(losses) / len(images), looks + 1)


def _accumulate(
    model: nn.Module,
    batches: Iterator[Batch],
    accumulate: int,
    place: torch.device,
    cast: AbstractContextManager[Any],
    distill: bool,
    target: float,
    budget_weight: float,
) -> tuple[float, float]:
    """Gradients of one step; returns its mean task loss and share."""
    losses, shares = [], []
    for _ in range(accumulate):
        images, labels = (t.to(place, non_blocking=True) for t in next(batches))
        with cast:
            taught = teacher(model, images) if distill else None
            with record() as calls:
                logits = model(images)
        share = calls.share()
        task = task_loss(logits, labels, taught)
        total = task + budget_loss(share, target, budget_weight)
        if not total.isfinite():
            raise LTMPError(
                "the loss is not finite: look for NaN or infinity in the images and the model's weights, "
                "or learn without amp"
            )
        (total / accumulate).backward()
        losses.append(task.detach())
        shares.append(share.detach().mean())
    return float(torch.stack(losses).mean()), float(torch.stack(shares).mean())


class _Run:
    """The thresholds as the optimiser sees them: the merge threshold as it is, the prune threshold by its logarithm.

    Importance lives near 1/N; a step in its logarithm means the same for every model and block.
    """

    RATES: ClassVar = {"merge": 4e-3, "prune": 0.06}
    FULL_RUN = 250
    AVERAGED = 0.3

    def __init__(self, thresholds: Thresholds, lr: float, steps: int) -> None:
        self.thresholds = thresholds
        self.steps = steps
        self.names = thresholds.config.steps
        self.latent = {name: torch.zeros_like(getattr(thresholds, name).data) for name in self.names}
        self.mean = {name: torch.zeros_like(value) for name, value in self.latent.items()}
        # Adam's steps are all of one size at first: a short run takes smaller ones, or it would end in their noise
        lr *= min(1.0, math.sqrt(steps / self.FULL_RUN))
        self.optimizer = torch.optim.Adam(
            [{"params": [self.latent[name]], "lr": lr * self.RATES[name]} for name in self.names], betas=(0.9, 0.99)
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )
        self.start: _Candidate
        self.step = 0
        self.history: list[Step] = []

    def begin(self, start: _Candidate) -> None:
        """Take the thresholds as they are: those of the calibrated `start`."""
        self.start = start
        for name, latent in self.latent.items():
            value = getattr(self.thresholds, name).data
            latent.copy_(value.clamp_min(1e-6).log() if name == "prune" else value)

    def update(self) -> None:
        """One step of the optimiser from the gradients that the thresholds hold."""
        for name, latent in self.latent.items():
            threshold = getattr(self.thresholds, name)
            if name == "prune":
                # a threshold of 1 drops all there is, on purpose (see calibrate): it stays
                latent.grad = threshold.grad * threshold.data * (threshold.data < 1)
            else:
                latent.grad = threshold.grad
            threshold.grad = None
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        first = int(self.steps * (1 - self.AVERAGED))
        if self.step > first:
            for name, mean in self.mean.items():
                mean.lerp_(self.latent[name], 1 / (self.step - first))
        self.write(self.latent)

    def finish(self) -> None:
        """Set the average of the last steps: single steps are noisy."""
        self.write(self.mean if self.step else self.latent)

    def write(self, latent: dict[str, Tensor]) -> None:
        for name, value in latent.items():
            plain = value.exp().clamp(max=1) if name == "prune" else value.clamp(-1, 1)
            getattr(self.thresholds, name).data.copy_(plain)

    def state(self) -> dict[str, Any]:
        return {
            "start": asdict(self.start),
            "step": self.step,
            "latent": self.latent,
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": [asdict(step) for step in self.history],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.start = _Candidate(**saved["start"])
        self.step = saved["step"]
        for name in self.names:
            self.latent[name].copy_(saved["latent"][name])
            self.mean[name].copy_(saved["mean"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.history = [Step(**step) for step in saved["history"]]
        self.write(self.latent)


@torch.inference_mode()
def measure_share(model: nn.Module, images: Tensor, batch: int) -> float:
    """Mean deployed FLOPs share of `images` [B, 3, H, W]."""
    with record() as calls:
        for part in images.split(batch):
            model(part)
    return float(calls.share().mean())


def meet_budget(
    model: nn.Module, images: Tensor, target: float, batch: int, tolerance: float = 1e-3, tries: int = 10
) -> tuple[float, int]:
    """Move all thresholds together until the deployed share of `images` is `target`: bisection on one scalar.

    Returns:
        The share reached and how often the images were looked at.
    """
    thresholds = thresholds_of(model)
    merge, prune = thresholds.merge.detach().clone(), thresholds.prune.detach().clone()
    merges = merge < 1

    def move(shift: float) -> None:
        # one unit: 0.1 of cosine, and a factor e on importance
        moved = torch.where(merges, (merge - 0.1 * shift).clamp(-1, 1 - 1e-6), merge)
        thresholds.set(moved, torch.where(prune < 1, (prune * math.exp(shift)).clamp(max=1 - 1e-6), prune))

    low, high, shift = -1.0, 1.0, 0.0
    looks: list[tuple[float, float, float]] = []
    while len(looks) < tries:
        move(shift)
        share = measure_share(model, images, batch)
        looks.append((abs(share - target), shift, share))
        if abs(share - target) <= tolerance:
            break
        low, high = (shift, high) if share > target else (low, shift)
        # a small first step: learning ends near the budget
        shift = (low + high) / 2 if len(looks) > 1 else math.copysign(0.1, share - target)
    _, shift, share = min(looks)
    move(shift)
    return share, len(looks)


def _first_images(loader: Iterable[Batch], count: int) -> Tensor:
    """The first `count` images of the loader."""
    found: list[Tensor] = []
    for images, _ in loader:
        if not images.isfinite().all():
            raise LTMPError("an image holds NaN or infinity: check the data and its normalisation")
        found.append(images)
        if sum(len(part) for part in found) >= count:
            break
    if not found:
        raise LTMPError("there are no images to learn from: the loader is empty")
    return torch.cat(found)[:count]


def _stream(loader: Iterable[Batch], done: int, batch: int) -> Iterator[Batch]:
    """Endless batches, from the one after `done`."""
    stream = getattr(loader, "stream", None)
    if stream is not None:
        return stream(done * batch, 1 << 62)

    def again() -> Iterator[Batch]:
        skip = done
        while True:
            for item in loader:
                if skip:
                    skip -= 1
                else:
                    yield item

    return again()


@contextmanager
def _only(model: nn.Module, thresholds: Thresholds) -> Iterator[None]:
    """Freeze everything but the thresholds inside."""
    mine = set(thresholds.parameters())
    frozen = [p for p in model.parameters() if p not in mine and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def _learning(thresholds: Thresholds) -> Iterator[None]:
    """Masked form inside; the host stays in eval mode, without dropout."""
    thresholds.train()
    try:
        yield
    finally:
        thresholds.eval()
        for parameter in thresholds.parameters():
            parameter.grad = None
