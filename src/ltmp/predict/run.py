"""One run of bulk scoring: find the shards, skip finished ones, score the rest locally or on Ray, summarise."""

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
"""Called with the number of images done in this run, the total (estimated for tars), and a status line."""


@dataclass(frozen=True)
class Summary:
    """Result of a run, including what an earlier, interrupted run had finished.

    Attributes:
        out: output folder.
        images: number of rows written.
        broken: number of images that could not be read.
        duplicates: number of rows whose key appears earlier in their shard.
        shards: number of output files.
        continued: number of those that an earlier run had finished.
        seconds: scoring time of this run.
        images_per_second: throughput of this run, including broken images; None if nothing was left to do.
        share: mean FLOPs share of the images.
        errors: file that lists the broken images with the reasons; None if there are none.
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
    """Score every image of `sources` into `out`, one Parquet file per shard.

    Called again after an interruption, it continues with the shards that are left.

    Args:
        sources: folders, files or patterns; see `find_shards`.
        out: output folder, new or of the same run.
        scoring: the model, and which of its outputs to keep.
        shard_size: images per output file if the source is a folder of images.
        column, key_column: columns of a Parquet source.
        overwrite: remove an earlier run from `out` and start over.
        ray: how to run on Ray; None runs in this process.
        report: called with the progress.

    Raises:
        UsageError: a source does not exist, or `out` holds something else.
        LTMPError: no image could be read, the model cannot be built, or nothing can be written.
    """
    out = Path(out).absolute()
    shards = find_shards(sources, shard_size=shard_size, column=column, key_column=key_column)
    manifest.prepare(out, sources, shards)
    with locked(out):
        # The machine that starts a Ray run may have no GPU; the model is only inspected here.
        predictor = Predictor(replace(scoring, device="cpu") if ray else scoring, out)
        if overwrite:
            manifest.clear(out, shards)
        manifest.begin(out, shards, {**manifest.settings_of(predictor), "device": scoring.device.partition(":")[0]})
        continued = [written for shard in shards if (written := finished(out, shard))]
        names = {written.name for written in continued}
        remaining = [shard for shard in shards if shard.name not in names]
        progress = _Progress(remaining, report)
        if remaining and ray:
            del predictor
            results = score_on_ray(scoring, out, remaining, ray)
        else:
            results = predictor.score(remaining, progress.add_batch)
        scored = []
        for written in results:
            progress.add_shard(written)
            scored.append(written)
        return _summarise(out, shards, continued, scored, perf_counter() - progress.start)


def _summarise(
    out: Path, shards: Sequence[Shard], continued: Sequence[Written], scored: Sequence[Written], seconds: float
) -> Summary:
    """Check that every shard has its output file, merge the lists of broken images, and add up the shards."""
    results = [*continued, *scored]
    images = sum(written.images for written in results)
    missing = [shard.name for shard in shards if finished(out, shard) is None]
    if missing:
        raise LTMPError(
            f"{len(missing)} of {len(shards)} files are gone from {out} again, such as {missing[0]}.parquet: they were "
            "removed during the run; repeat the same command to score what is missing"
        )
    errors = merge_errors(out, shards)
    if not images:
        if errors is None:
            raise LTMPError(
                f"there are no images to score in {shards[0].source}: its files hold no rows and no members"
            )
        raise LTMPError(f"none of the images could be read; {errors} lists the reasons")
    read = sum(written.images + written.broken for written in scored)
    return Summary(
        out=str(out),
        images=images,
        broken=sum(written.broken for written in results),
        duplicates=sum(written.duplicates for written in results),
        shards=len(shards),
        continued=len(continued),
        seconds=seconds,
        images_per_second=read / seconds if scored else None,
        share=sum(written.share * written.images for written in results) / images,
        errors=str(errors) if errors else None,
    )


class _Progress:
    """Progress of a run. As tars do not state how many images they hold, their progress is measured in bytes."""

    def __init__(self, shards: Sequence[Shard], report: Report | None) -> None:
        self.report = report
        self.start = perf_counter()
        counted = all(shard.images is not None for shard in shards)
        self.weights = {shard.name: float(shard.images or 0) if counted else _size(shard) for shard in shards}
        self.pending = [shard.name for shard in shards]
        self.total_weight = sum(self.weights.values())
        self.finished_weight = 0.0
        self.images = 0  # read so far, broken ones included
        self.finished_images = 0  # of finished shards, broken ones included
        self.scored = 0  # of finished shards, broken ones excluded
        self.share_sum = 0.0  # over the scored images

    def add_batch(self, images: int, position: float) -> None:
        """Count a scored batch that ends at `position` (share in [0, 1]) of the current shard."""
        self.images += images
        self._report(self.finished_weight + position * self.weights[self.pending[0]])

    def add_shard(self, written: Written) -> None:
        """Count a finished shard."""
        self.finished_images += written.images + written.broken
        self.scored += written.images
        self.share_sum += written.share * written.images
        self.images = max(self.images, self.finished_images)
        self.pending.remove(written.name)
        self.finished_weight += self.weights[written.name]
        self._report(self.finished_weight)

    def _report(self, weight: float) -> None:
        if self.report is None:
            return
        total = round(self.images * self.total_weight / weight) if weight else self.images
        text = f"scoring, {self.images / (perf_counter() - self.start):.0f} images/s"
        if self.share_sum < self.scored:
            text += f", share {self.share_sum / self.scored:.2f}"
        self.report(self.images, max(total, self.images), text)


def _size(shard: Shard) -> float:
    return float(Path(shard.path).stat().st_size)
