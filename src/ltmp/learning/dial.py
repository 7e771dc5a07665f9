"""Learn thresholds for every budget at once: search schedules at a few budgets, then calibrate a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import record
from ..checkpoint.describe import note
from ..distributed import exchange, rank
from ..fingerprint import Seen
from ..hosts.attach import attachment, thresholds_of
from ..method.dial import Dial, keep_on
from .answers import Distribution, Judge
from .batches import first_images, loader_metadata, unpack, watched
from .budget import check_target
from .inputs import Images, call, pixels_of
from .options import DialOptions, DialSettings, with_keywords
from .probe import PROBED, learn_probe
from .progress import Progress, reporting
from .randomness import preserved_random_state
from .resume import restoring
from .schedule import Shape, adapted_shape, check_every
from .search import POPULATION, evolve
from .start import MAX_PASSES, SCORED, Calibrated, Calibrator, restore_start, start_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

ANCHORS = 3
"""Budgets at which shapes are searched. Between them shapes are interpolated; beyond them they follow the default."""


@dataclass(frozen=True)
class DialResult:
    """Result of a run; the dial is in `model.ltmp.dial`.

    Attributes:
        divergence: [K], for each share of the dial: the square root of an image's divergence from the dense model's
            answer, averaged over the images that the dial was calibrated on.
        shapes: how removal is spread over the blocks, at `ANCHORS` shares.
        views: images processed.
        seconds: wall time of this process.
        distribution: how answers are compared, see `ltmp.learning.Distribution`.
    """

    divergence: list[float]
    shapes: dict[float, Shape]
    views: int
    seconds: float
    distribution: Distribution = "categorical"


@with_keywords(DialOptions)
@preserved_random_state()
def learn_dial(
    model: nn.Module,
    loader: Any,
    low: float = 0.3,
    high: float = 0.95,
    **settings: Unpack[DialSettings],
) -> DialResult:
    """Learn thresholds for every FLOPs share from `low` to `high`; `model.ltmp.set_budget(0.55)` then selects one.

    Needs images but no labels, and forward passes only (a probe, if the scores need one, also takes a backward pass).
    The images first settle whether pruning pays and, for scores given by name, what merged tokens count as
    (`ltmp.learning.start`). At `ANCHORS` budgets a search finds how removal is best spread over the blocks, judged by
    how far answers are from the dense model's. Then thresholds are calibrated for `knots` budgets on the same images,
    and each row of the dial records the share that these images cost. As the mean share of 512 photographs varies by
    about 0.004, the shares are then corrected by what more images (`checked`) cost at a few of these budgets.

    Args:
        model: attached, with learned thresholds; left in eval mode on `device`.
        loader: batches as in `ltmp.learn`, with or without labels; the first `calibration` images are used.
        low, high: ends of the dial, shares of the dense model's multiply-adds.
        knots: rows of the dial.
        views: images to search on, in passes over `SCORED` at a time; 0 skips the search. `max_views` gives the number
            of images that everything else processes, and a probe adds `PROBED`.
        calibration: images to calibrate the table on.
        every: remove tokens in one of this many blocks, starting with the first: with 2, every other block removes
            what both would have. Fewer decisions take less time (docs/dial.md shows where that pays), and the blocks
            between run as fast as the host's own.
        checked: images, starting with these, whose cost corrects the shares; limited to what the loader has.
        seed: of the search.
        device: where to learn; default the model's.
        amp: autocast dtype of the search; the table is calibrated in the model's own precision.
        checkpoint: file to save the run in after each search; an existing one is resumed.
        progress: called with (done, total, description); True for a bar, False for none, None for one in a terminal or
            a notebook.

    Raises:
        UsageError: a range that cannot be reached, or settings that make no sense.
        LTMPError: NaN in images, no images, or a checkpoint of another run.
    """
    options, thresholds = DialOptions(**settings), thresholds_of(model)
    options.check(low, high)
    check_every(options.every, thresholds.depth)
    with reporting(options.progress if rank() == 0 else False) as progress:
        dial, result = _learn(model, loader, (low, high), options, progress)
    thresholds.set_dial(dial)
    thresholds.set_budget((dial.lowest + dial.highest) / 2)
    note(model, {**loader_metadata(model, loader), "views": result.views})
    return result


def _learn(
    model: nn.Module, loader: Any, ends: tuple[float, float], options: DialOptions, progress: Progress | None
) -> tuple[Dial, DialResult]:
    """Make a dial; the model's thresholds are left at some row of it."""
    started = time.perf_counter()
    (low, high), thresholds = ends, thresholds_of(model)
    device = options.device_for(thresholds)
    model.to(device).eval()
    images = first_images(loader, options.calibration, progress)[0].to(device)
    seen = thresholds.seen = thresholds.seen or Seen()
    seen.add(pixels_of(images))
    settings = _settings(model, loader, images, ends, options)
    state = exchange(options.load(settings))[0] or {"shapes": {}}
    maker = _Maker(model, images, options, progress, state.get("settled"))
    for end in ends:
        check_target(end, maker.geometry, attachment(model).body.protected)
    # the length of a streaming source is unknown
    checked = min(options.checked, getattr(loader, "images", 0) or options.checked)
    checked = checked if checked > len(images) else 0
    shapes = _search(maker, anchors_of(low, high), options, settings, state, checked)
    knots = options.knots - 1
    dial, divergence = maker.table([low + (high - low) * i / knots for i in range(options.knots)], shapes)
    thresholds.set_dial(dial)
    if checked:
        dial = maker.corrected(dial, anchors_of(low, high), watched(seen, map(unpack, loader)), checked)
    maker.done()
    seconds = time.perf_counter() - started
    return dial, DialResult(divergence, shapes, maker.views, seconds, maker.judge.distribution)


def _settings(
    model: nn.Module, loader: Any, images: Images, ends: tuple[float, float], options: DialOptions
) -> dict[str, Any]:
    """The settings that identify a run; a checkpoint with others is refused."""
    thresholds = thresholds_of(model)
    return {
        "dial": list(ends), "views": options.views, "calibrate": len(images), "seed": options.seed,
        "depth": thresholds.depth, "variant": thresholds.config.variant, **asdict(thresholds.config.scores),
        **options.spacing, **options.subject(model, loader, images),
    }  # fmt: skip


def _search(
    maker: _Maker,
    anchors: list[float],
    options: DialOptions,
    settings: dict[str, Any],
    state: dict[str, Any],
    checked: int,
) -> dict[float, Shape]:
    """The shape at each anchor; those that the saved run lacks are searched, and saved one by one."""
    thresholds, count = thresholds_of(maker.model), len(maker.images)
    with restoring(options.checkpoint):
        shapes = {share: Shape(**numbers) for share, numbers in state["shapes"].items()}
        starts = {share: Shape(**numbers) for share, numbers in state.get("starts", {}).items()}
    probed = min(PROBED, count) if thresholds.config.needs_probe else 0
    generation = POPULATION * min(SCORED, count)
    generations = round(options.views / ANCHORS / generation)
    searched = ANCHORS * (generations * generation + 2 * count) if generations else 0
    scored = maker.passes(ANCHORS) * min(SCORED, count)
    maker.expected = probed + scored + searched + (options.knots + 1) * count + ANCHORS * checked
    # older versions did not save starts
    starts = starts or maker.choose_starts(anchors)
    if not generations:
        return starts
    for i, share in enumerate(anchors):
        if share not in shapes:
            generator = torch.Generator().manual_seed(options.seed * ANCHORS + i)
            shapes[share] = maker.search(starts[share], share, generations, generator)
            options.save(settings, {
                "shapes": {at: asdict(shape) for at, shape in shapes.items()},
                "starts": {at: asdict(shape) for at, shape in starts.items()},
                "settled": start_state(thresholds, maker.views),
            })  # fmt: skip
    return shapes


def max_views(options: DialOptions, images: int) -> int:
    """The largest number of images processed to learn a dial from `images` images, without a probe."""
    table = (options.knots + 2 * ANCHORS + 1) * options.calibration
    return options.views + table + ANCHORS * (min(options.checked, images) + MAX_PASSES * SCORED)


def anchors_of(low: float, high: float) -> list[float]:
    """The budgets at which shapes are searched: closer together at small budgets, where shapes change faster."""
    return [low + (high - low) * ((i + 0.5) / ANCHORS) ** 1.5 for i in range(ANCHORS)]


class _Maker(Calibrator):
    """Searches shapes for an attached model and makes a dial of them, with progress.

    Args:
        saved: what the images settled in the run that is resumed, see `start_state`.

    Attributes:
        expected: images that will have been processed at the end, once that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        options: DialOptions,
        progress: Progress | None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.amp, self.progress, self.expected = options.amp, progress, 0
        judge, thresholds = Judge.of(model, images[:1], loss=options.loss), thresholds_of(model)
        views = 0
        if saved is not None:
            with restoring(options.checkpoint):
                views = restore_start(thresholds, saved)
        elif thresholds.config.needs_probe:
            # even if the model has a probe: a run depends on its own images alone
            views = learn_probe(model, images, amp=self.amp, judge=judge, progress=progress)
        super().__init__(model, images, judge, options.every)
        self.views += views

    def count_views(self, images: int, text: str) -> None:
        super().count_views(images, text)
        if self.progress is not None and self.expected:
            self.progress(min(self.views, self.expected), self.expected, text)

    def done(self) -> None:
        """Report completion: a streaming source may have had fewer images than expected."""
        if self.progress is not None:
            self.progress(self.expected, self.expected, "the dial is made")

    def search(self, start: Shape, share: float, generations: int, generator: torch.Generator) -> Shape:
        """The shape for a share that evolution finds, or `start` if that scores better."""
        everything = slice(0, len(self.images))
        parts = max(1, len(self.images) // SCORED)
        evaluated = 0

        def score(shape: Shape) -> float:
            # all shapes of a generation are scored on the same images, the next generation on others
            nonlocal evaluated
            first = evaluated // POPULATION % parts * SCORED
            evaluated += 1
            return self.score(shape, share, slice(first, first + SCORED))

        device = self.images.device.type
        with torch.autocast(device, self.amp) if self.amp is not None else nullcontext():
            found = evolve(score, start, generations, generator)
            # rank 0's, because different hardware may round differently
            found = Shape(*exchange(astuple(found))[0])
            return min((start, found), key=lambda shape: self.score(shape, share, everything))

    def table(self, shares: list[float], shapes: dict[float, Shape]) -> tuple[Dial, list[float]]:
        """A dial with a row near each of `shares`, and the divergence of each row."""
        rows: list[Calibrated] = []
        for share in shares:
            shape = adapted_shape(self.default_shape, shapes, share)
            row = self.run(shape, share, slice(0, len(self.images)), "calibrating")
            # on few images, neighbouring rows may come out in the wrong order
            if not rows or row.share > rows[-1].share:
                rows.append(row)
        rows = exchange(rows)[0]
        merge, prune = keep_on(torch.stack([row.merge for row in rows]), torch.stack([row.prune for row in rows]))
        dial = Dial(torch.tensor([row.share for row in rows]), merge, prune, torch.stack([row.kept for row in rows]))
        return dial, [row.divergence for row in rows]

    @torch.inference_mode()
    def corrected(
        self, dial: Dial, budgets: list[float], batches: Iterator[tuple[Images, Tensor | None]], images: int
    ) -> Dial:
        """The dial with its shares corrected by what more images cost.

        The deviation is measured at the knots nearest to `budgets` and interpolated between them.

        Args:
            images: how many of the batches' images to measure.
        """
        thresholds = thresholds_of(self.model)
        knots = dial.share.tolist()
        measured = sorted({min(knots, key=lambda knot: abs(knot - budget)) for budget in budgets})
        self.expected -= (len(budgets) - len(measured)) * images
        cost, seen = torch.zeros(len(measured), dtype=torch.float64), 0
        for batch, _ in batches:
            batch = batch[: images - seen].to(self.images.device)
            for i, budget in enumerate(measured):
                thresholds.set_budget(budget)
                with record() as calls:
                    call(self.model, batch)
                cost[i] += calls.share().double().sum().cpu()
                self.count_views(len(batch), "checking what it costs")
            seen += len(batch)
            if seen >= images:
                break
        mean_cost = torch.tensor(exchange((cost / seen).tolist())[0], dtype=torch.float64)
        deviation = mean_cost - torch.tensor(measured).double()
        shares = torch.from_numpy(np.interp(dial.share.double().numpy(), measured, deviation.numpy())) + dial.share
        rises = torch.cat([torch.tensor([True]), shares.diff() > 0])
        return Dial(*(values[rises] for values in (shares, dial.merge, dial.prune, dial.kept)))
