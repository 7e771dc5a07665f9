"""One run of bulk scoring: find the shards, leave out the finished ones, score the rest here or on Ray, sum up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from ..errors import LTMPError
from ..files import locked
from . import manifest
from .predictor import Predictor, Scoring
from .ray import RayOptions, score_on_ray
from .shards import Shard
from .sources import find_shards
from .writer import Written, finished, merge_errors

Report = Callable[[int, int, str], None]
"""Called with the images done in this run, how many there are (estimated for tars) and a line about it."""


@dataclass(frozen=True)
class Summary:
    """Result of a run, including the parts that an earlier, interrupted run had finished.

    Attributes:
        images: rows written.
        broken: images that could not be read; `errors` is the file that lists them with the reason.
        duplicates: rows whose key appears in their shard before.
        shards: output files; `continued` of them were finished before.
        seconds: scoring time of this run, `images_per_second` its throughput; None where nothing was left to do.
        share: mean FLOPs share of the images.
    """

    out: str
    images: int
    broken: int
    duplicates: int
    shards: int
    continued: int
    seconds: float
    images_per_second: float | None
    share: float
    errors: str | None


def predict(
    sources: Sequence[str | Path],
    out: str | Path,
    scoring: Scoring,
    *,
    shard_size: int = 1024,
    column: str | None = None,
    key_column: str | None = None,
    overwrite: bool = False,
    ray: RayOptions | None = None,
    report: Report | None = None,
) -> Summary:
    """Score every image of `sources` into `out`, a Parquet file a shard; called again it goes on where it stopped.

    Args:
        sources: see `find_shards`.
        out: a folder, new or of the same run.
        scoring: the model, and what to keep.
        shard_size: images a file, where the source is a folder of images.
        column, key_column: columns of a Parquet source.
        overwrite: remove an earlier run from `out` and start anew.
        ray: run on Ray; None runs here.
        report: told about progress.

    Raises:
        UsageError: no such source, or `out` holds something else.
        LTMPError: no image could be read, the model cannot be built, or nothing can be written.
    """
    out = Path(out).absolute()
    shards = find_shards(sources, shard_size=shard_size, column=column, key_column=key_column)
    manifest.prepare(out, sources, shards)
    with locked(out):
        # whoever starts a cluster may have no GPU: the model is only looked at here
        predictor = Predictor(replace(scoring, device="cpu") if ray else scoring, out)
        if overwrite:
            manifest.clear(out, shards)
        manifest.begin(out, shards, {**manifest.settings_of(predictor), "device": scoring.device.partition(":")[0]})
        before = [written for shard in shards if (written := finished(out, shard))]
        names = {written.name for written in before}
        left = [shard for shard in shards if shard.name not in names]
        meter = Meter(left, report)
        if left and ray:
            del predictor
            now = [meter.shard(written) for written in score_on_ray(scoring, out, left, ray)]
        else:
            now = [meter.shard(written) for written in predictor.score(left, meter.batch)]
        return _sum_up(out, shards, before, now, perf_counter() - meter.start)


def _sum_up(
    out: Path, shards: Sequence[Shard], before: Sequence[Written], now: Sequence[Written], seconds: float
) -> Summary:
    everything = [*before, *now]
    images = sum(written.images for written in everything)
    gone = [shard.name for shard in shards if finished(out, shard) is None]
    if gone:
        raise LTMPError(
            f"{len(gone)} of {len(shards)} files are gone from {out} again, such as {gone[0]}.parquet: somebody "
            "removed them during the run; the same command scores what is missing"
        )
    errors = merge_errors(out, shards)
    if not images:
        if errors is None:
            raise LTMPError(
                f"there are no images to score in {shards[0].source}: its files hold no rows and no members"
            )
        raise LTMPError(f"none of the images could be read; {errors} lists the reasons")
    read = sum(written.images + written.broken for written in now)
    return Summary(
        out=str(out),
        images=images,
        broken=sum(written.broken for written in everything),
        duplicates=sum(written.duplicates for written in everything),
        shards=len(shards),
        continued=len(before),
        seconds=seconds,
        images_per_second=read / seconds if now else None,
        share=sum(written.share * written.images for written in everything) / images,
        errors=str(errors) if errors else None,
    )


class Meter:
    """How far a run is. Tars do not say how many images they hold: their part done is taken by size."""

    def __init__(self, shards: Sequence[Shard], report: Report | None) -> None:
        self.report = report
        self.start = perf_counter()
        known = all(shard.images is not None for shard in shards)
        self.weights = {s.name: float(s.images or 0) if known else _size(s) for s in shards}
        self.order = [shard.name for shard in shards]
        self.total = sum(self.weights.values())
        self.behind = 0.0  # weight of the finished shards
        self.images = 0  # read, broken ones counted
        self.finished = 0  # those of finished shards
        self.scored = 0  # those that could be read
        self.shares = 0.0  # sum over these

    def batch(self, images: int, position: float) -> None:
        """A batch was scored that ends at `position` of its shard."""
        self.images += images
        self._tell(self.behind + position * self.weights[self.order[0]])

    def shard(self, written: Written) -> Written:
        """A shard was written; gives it back."""
        self.finished += written.images + written.broken
        self.scored += written.images
        self.shares += written.share * written.images
        self.images = max(self.images, self.finished)
        self.order.remove(written.name)
        self.behind += self.weights[written.name]
        self._tell(self.behind)
        return written

    def _tell(self, weight: float) -> None:
        if self.report is None:
            return
        total = round(self.images * self.total / weight) if weight else self.images
        text = f"scoring, {self.images / (perf_counter() - self.start):.0f} images/s"
        if self.shares < self.scored:
            text += f", share {self.shares / self.scored:.2f}"
        self.report(self.images, max(total, self.images), text)


def _size(shard: Shard) -> float:
    return float(Path(shard.path).stat().st_size)
