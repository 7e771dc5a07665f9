"""Learning thresholds for every budget at once: a search of schedules at a few budgets, and a calibrated table."""

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
from .batches import described, first, pair, watched
from .budget import check_target
from .fit import JUDGED, PASSES, Calibrated, Calibrator, settle_as, settled
from .inputs import Images, call, pixels_of
from .options import DialOptions, DialSettings, with_keywords
from .probe import PROBED, learn_probe
from .progress import Progress, telling
from .randomness import preserved_random_state
from .resume import restoring
from .schedule import Shape, check_every, searched
from .search import POPULATION, evolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

ANCHORS = 3
"""Budgets that shapes are searched at; between them they are mixed, and beyond them move as the usual one does."""


@dataclass(frozen=True)
class DialResult:
    """How a run ended; the dial is in `model.ltmp.dial`.

    Attributes:
        divergence: [K], at each of the dial's shares: the mean root of an image's divergence from the dense model's
            answer, on the images that the dial is made of.
        shapes: how removal is spread over the blocks at `ANCHORS` shares.
        views: images looked at.
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
    """Learn thresholds for every FLOPs share from `low` to `high`; `model.ltmp.set_budget(0.55)` then picks.

    Needs images and no labels, forward passes and no gradients. The images first settle what `ltmp.learning.fit` says:
    whether pruning pays, and, where scores were named, what merged tokens count as. At `ANCHORS` budgets it searches
    how removal is best spread over the blocks, judged by how far answers are from the dense model's; then thresholds
    are calibrated for `knots` budgets on the same images, and each row of the dial says what these cost, corrected by
    what more images cost at those few budgets: the mean share of 512 photographs varies by about 0.004.

    Args:
        model: attached, with learned thresholds; left in eval mode on `device`.
        loader: batches as `ltmp.learn` takes them, labels or not; the first `calibration` images are used.
        low, high: ends of the dial, shares of the dense model's multiply-adds.
        knots: rows of the dial.
        views: images to search on, in passes over `JUDGED` at a time; 0 searches nothing. `most_views` says how many
            images the rest looks at, and a probe adds `PROBED`.
        calibration: images to make the table from.
        every: of how many blocks one removes tokens, the first of them: with 2 every other block does, and takes what
            both would have. Fewer decisions take less time (docs/dial.md says where that pays), and the blocks between
            run as fast as the host's.
        checked: images, beginning with these, that say what the dial costs; no more than there are.
        seed: of the search.
        device: where to learn; default the model's.
        amp: autocast type of the search; the table is made in the model's own precision.
        checkpoint: file to save the run in after each search; an existing one is resumed.
        progress: called with (done, of how many, what); True for a bar, False for none, None for one in a terminal or a
            notebook.

    Raises:
        UsageError: a range that cannot be reached, or settings that make no sense.
        LTMPError: NaN in images, no images, or a checkpoint of another run.
    """
    start = time.perf_counter()
    options, thresholds = DialOptions(**settings), thresholds_of(model)
    options.check(low, high)
    check_every(options.every, thresholds.depth)
    with telling(options.progress if rank() == 0 else False) as progress:
        dial, divergence, maker, shapes = _made(model, loader, (low, high), options, progress)
    thresholds.set_dial(dial)
    thresholds.set_budget((dial.lowest + dial.highest) / 2)
    note(model, {**described(model, loader), "views": maker.views})
    return DialResult(divergence, shapes, maker.views, time.perf_counter() - start, maker.judge.distribution)


def _made(
    model: nn.Module, loader: Any, ends: tuple[float, float], options: DialOptions, progress: Progress | None
) -> tuple[Dial, list[float], _Maker, dict[float, Shape]]:
    """The dial, how far each row's answers are from the dense model's, who made it, and the shapes found."""
    (low, high), thresholds = ends, thresholds_of(model)
    place = options.place(thresholds)
    model.to(place).eval()
    images = first(loader, options.calibration, progress)[0].to(place)
    seen = thresholds.seen = thresholds.seen or Seen()
    seen.add(pixels_of(images))
    settings = _settings(model, loader, images, ends, options)
    state = exchange(options.saved(settings))[0] or {"shapes": {}}
    maker = _Maker(model, images, options, progress, state.get("settled"))
    for end in ends:
        check_target(end, maker.geometry, attachment(model).body.protected)
    # a streaming source does not say how many it has
    more = min(options.checked, getattr(loader, "images", 0) or options.checked)
    more = more if more > len(images) else 0
    shapes = _search(maker, anchors_of(low, high), options, settings, state, checked=more)
    knots = options.knots - 1
    dial, divergence = maker.table([low + (high - low) * i / knots for i in range(options.knots)], shapes)
    thresholds.set_dial(dial)
    if more:
        dial = maker.corrected(dial, anchors_of(low, high), watched(seen, map(pair, loader)), more)
    maker.done()
    return dial, divergence, maker, shapes


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
    """A shape for each anchor that has none in a saved run; each is saved when it is found."""
    thresholds, count = thresholds_of(maker.model), len(maker.images)
    with restoring(options.checkpoint):
        shapes = {share: Shape(**numbers) for share, numbers in state["shapes"].items()}
        starts = {share: Shape(**numbers) for share, numbers in state.get("starts", {}).items()}
    probed = min(PROBED, count) if thresholds.config.needs_probe else 0
    generation = POPULATION * min(JUDGED, count)
    generations = round(options.views / ANCHORS / generation)
    chosen = ANCHORS * (generations * generation + 2 * count) if generations else 0
    judged = maker.passes(ANCHORS) * min(JUDGED, count)
    maker.expected = probed + judged + chosen + (options.knots + 1) * count + ANCHORS * checked
    # a new run, or one of an older version
    starts = starts or maker.fit(anchors)
    if not generations:
        return starts
    for i, share in enumerate(anchors):
        if share not in shapes:
            generator = torch.Generator().manual_seed(options.seed * ANCHORS + i)
            shapes[share] = maker.search(starts[share], share, generations, generator)
            found = {name: {at: asdict(shape) for at, shape in made.items()}
                     for name, made in (("shapes", shapes), ("starts", starts))}  # fmt: skip
            options.save(settings, {**found, "settled": settled(thresholds, maker.views)})
    return shapes


def most_views(options: DialOptions, images: int) -> int:
    """Images looked at for a dial at most, where there are so many; without a probe."""
    table = (options.knots + 2 * ANCHORS + 1) * options.calibration
    return options.views + table + ANCHORS * (min(options.checked, images) + PASSES * JUDGED)


def anchors_of(low: float, high: float) -> list[float]:
    """The budgets that shapes are searched at: closer together where little is left, as there they change faster."""
    return [low + (high - low) * ((i + 0.5) / ANCHORS) ** 1.5 for i in range(ANCHORS)]


class _Maker(Calibrator):
    """An attached model, the images that its dial is made of, and the dense model's answers to them."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        options: DialOptions,
        progress: Progress | None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.amp, self.progress, self.expected = options.amp, progress, 0
        judge, looked, thresholds = Judge.of(model, images[:1], loss=options.loss), 0, thresholds_of(model)
        if saved is not None:
            with restoring(options.checkpoint):
                looked = settle_as(thresholds, saved)
        elif thresholds.config.needs_probe:
            # again where there is one: a run is of its own images alone
            looked = learn_probe(model, images, amp=self.amp, judge=judge, progress=progress)
        super().__init__(model, images, judge, options.every)
        self.views += looked

    def looked(self, images: int, text: str) -> None:
        super().looked(images, text)
        if self.progress is not None and self.expected:
            self.progress(min(self.views, self.expected), self.expected, text)

    def done(self) -> None:
        """Tell that nothing is left: a streaming source may have had fewer images than it was asked for."""
        if self.progress is not None:
            self.progress(self.expected, self.expected, "the dial is made")

    def search(self, start: Shape, share: float, generations: int, generator: torch.Generator) -> Shape:
        """`start`, or a better shape for a share where evolution finds one."""
        whole = slice(0, len(self.images))
        count = max(1, len(self.images) // JUDGED)
        asked = 0

        def judge(shape: Shape) -> float:
            # a generation is judged on the same images, the next one on others
            nonlocal asked
            at = asked // POPULATION % count * JUDGED
            asked += 1
            return self.score(shape, share, slice(at, at + JUDGED))

        device = self.images.device.type
        with torch.autocast(device, self.amp) if self.amp is not None else nullcontext():
            found = evolve(judge, start, generations, generator)
            # ranks on unlike hardware may round unlike
            found = Shape(*exchange(astuple(found))[0])
            return min((start, found), key=lambda shape: self.score(shape, share, whole))

    def table(self, shares: list[float], shapes: dict[float, Shape]) -> tuple[Dial, list[float]]:
        """A dial with a row near each of `shares`, and each row's divergence."""
        rows: list[Calibrated] = []
        for share in shares:
            row = self.run(searched(self.usual, shapes, share), share, slice(0, len(self.images)), "calibrating")
            # few images leave neighbours in the wrong order
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
        """The dial with shares that are true of more images: what these cost at some budgets says by how much to move.

        Args:
            budgets: where to look, at the knot that is nearest.
            images: how many of the batches'.
        """
        thresholds = thresholds_of(self.model)
        knots = dial.share.tolist()
        at = sorted({min(knots, key=lambda knot: abs(knot - budget)) for budget in budgets})
        self.expected -= (len(budgets) - len(at)) * images
        cost, seen = torch.zeros(len(at), dtype=torch.float64), 0
        for batch, _ in batches:
            batch = batch[: images - seen].to(self.images.device)
            for i, budget in enumerate(at):
                thresholds.set_budget(budget)
                with record() as calls:
                    call(self.model, batch)
                cost[i] += calls.share().double().sum().cpu()
                self.looked(len(batch), "checking what it costs")
            seen += len(batch)
            if seen >= images:
                break
        off = torch.tensor(exchange((cost / seen).tolist())[0], dtype=torch.float64) - torch.tensor(at).double()
        shares = torch.from_numpy(np.interp(dial.share.double().numpy(), at, off.numpy())) + dial.share
        rises = torch.cat([torch.tensor([True]), shares.diff() > 0])
        return Dial(*(values[rises] for values in (shares, dial.merge, dial.prune, dial.kept)))
