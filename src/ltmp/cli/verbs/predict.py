"""`ltmp predict`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config import ENGINES
from ...errors import UsageError
from ...ranges import CLASSES, WORKERS, Range
from ..options import (
    DATA,
    MODEL,
    OUTPUT,
    RUN,
    BatchSize,
    Budget,
    CertifiedOption,
    ClassMap,
    OutputOptions,
    PreprocessingOptions,
    RunOptions,
    SavedModel,
    name_in,
    option,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...predict import RayOptions, Scoring, Summary

_RAY = "Ray"


@dataclass(frozen=True, kw_only=True)
class PredictModel(SavedModel, CertifiedOption):
    """A model, reduced if thresholds are given and dense otherwise."""

    thresholds: Annotated[
        Path | None,
        option(
            "Folder or file written by `ltmp dial`, `ltmp learn` or `ltmp pack`, or USER/REPO; without it the model "
            "runs dense.",
            MODEL,
        ),
    ] = None
    budget: Budget = None

    def name(self, engine: str | None) -> str:
        """The model's name.

        Raises:
            UsageError: there is none, the engine is unknown, or an option of reduced models is given for a dense one.
        """
        if engine is not None and engine not in ENGINES:
            raise UsageError(f"unknown engine {engine!r}: expected {', '.join(ENGINES)}, or ray")
        if self.thresholds is not None:
            return self.model or name_in(self.thresholds, self.budget)
        for name, value in (("--engine", engine), ("--budget", self.budget)):
            if value is not None:
                raise UsageError(f"{name} is for reduced models: give --thresholds FILE, or leave it out")
        if self.certified:
            raise UsageError("--certified is for thresholds that were certified: give --thresholds FILE")
        if self.model is None:
            raise UsageError("which model? give --thresholds FILE, or --model NAME for a dense one")
        return self.model

    def absolute(self) -> PredictModel:
        """These options with absolute paths, for processes with another working directory."""
        thresholds = self.thresholds
        # what does not exist here names a repository on the Hub
        if thresholds is not None and thresholds.exists():
            thresholds = thresholds.absolute()
        return replace(self, weights=self.weights and self.weights.absolute(), thresholds=thresholds)


@dataclass(frozen=True, kw_only=True)
class PredictData(PreprocessingOptions):
    """How images are read, and class names."""

    class_map: ClassMap = None
    column: Annotated[str | None, option("Parquet column with images or their paths.", DATA)] = None
    key_column: Annotated[str | None, option("Parquet column with a name for each row.", DATA)] = None


@dataclass(frozen=True, kw_only=True)
class PredictRun(RunOptions):
    """Where and how the model runs."""

    batch_size: BatchSize = 64
    workers: Annotated[
        int | None,
        option("Worker processes that decode images ahead; default: 1, or up to 8 with a GPU.", RUN, within=WORKERS),
    ] = None
    engine: Annotated[
        str | None,
        option(
            "Engine: auto, packed, triton or graph; default: the one in the thresholds file. ray is short for --runner "
            "ray.",
            RUN,
        ),
    ] = None
    runner: Annotated[str, option("Where to run: local (this process) or ray (a Ray cluster).", _RAY)] = "local"
    actors: Annotated[
        int | None,
        option(
            "Number of model replicas; default: one per GPU, or per CPU without GPUs.",
            _RAY,
            within=Range(min=1, max=4096),
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        option("Address of a running Ray cluster; default: RAY_ADDRESS, or a local cluster for this run.", _RAY),
    ] = None

    def ray(self) -> RayOptions | None:
        """The Ray cluster to run on; None to run in this process."""
        from ...predict import RayOptions

        if self.runner not in ("local", "ray"):
            raise UsageError(f"unknown runner {self.runner!r}: expected local or ray")
        if self.runner == "ray" or self.engine == "ray":
            return RayOptions(self.actors, self.ray_address)
        if self.actors is not None or self.ray_address is not None:
            raise UsageError("--actors and --ray-address are for --runner ray: add it, or leave them out")
        return None


@dataclass(frozen=True, kw_only=True)
class PredictOutput(OutputOptions):
    """What is written, and where."""

    out: Annotated[Path, option("Output folder; an interrupted run there is continued.", OUTPUT)]
    top: Annotated[
        int | None,
        option(
            "Classes to keep per image; default: 5, or all if the model has fewer.",
            OUTPUT,
            within=Range(min=1, max=CLASSES.max),
        ),
    ] = None
    embeddings: Annotated[
        bool, option("Write embeddings (the input of the classifier) instead of classes.", OUTPUT, "--embeddings")
    ] = False
    shard_size: Annotated[
        int,
        option("Images per output file if SOURCE is a folder of images.", OUTPUT, within=Range(min=1, max=10**6)),
    ] = 1024
    overwrite: Annotated[bool, option("Delete the run in --out and start over.", OUTPUT, "--overwrite")] = False


@verb
def predict_verb(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Folder with images at any depth; or tar (WebDataset) or Parquet shards, as files, a folder or a "
            "pattern such as 'shards/{000..099}.tar'.",
        ),
    ],
    model: PredictModel,
    data: PredictData,
    run: PredictRun,
    output: PredictOutput,
) -> None:
    """Score every image of a large collection and write top classes or embeddings to Parquet.

    Writes one file per shard. If the run is interrupted or killed, the same command continues it.

    Example: ltmp predict images/ --out scores --thresholds runs/deit/thresholds.safetensors --pretrained
    """
    from ...evaluate import tables
    from ...predict import predict
    from ..progress import progress_bar
    from ..runs import InterruptedRunError
    from ..screen import suggest

    ray, scoring = run.ray(), _scoring(model, data, run, output)
    with progress_bar("scoring", None) as bar:
        try:
            summary = predict(
                source,
                output.out,
                scoring,
                shard_size=output.shard_size,
                column=data.column,
                key_column=data.key_column,
                overwrite=output.overwrite,
                ray=ray,
                report=bar.reach,
            )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted: the same command goes on with the shards left in {output.out}"
            ) from None
    if not output.quiet:
        _print_summary(summary)
        suggest("python", "-c", f"import pyarrow.parquet as pq; print(pq.read_table({json.dumps(str(output.out))}))")
    if output.json:
        tables.write_json(asdict(summary), output.json)


def _scoring(model: PredictModel, data: PredictData, run: PredictRun, output: PredictOutput) -> Scoring:
    from ...data import read_names
    from ...predict import Scoring

    ray = run.ray()
    engine = None if run.engine == "ray" else run.engine
    name = model.name(engine)
    return Scoring(
        partial(build_reduced, model.absolute(), name, engine, run.amp_dtype),
        top=output.top,
        embeddings=output.embeddings,
        class_names=tuple(read_names(data.class_map)) if data.class_map else None,
        pretrained=model.pretrained and model.weights is None,
        transform=data.transform,
        batch_size=run.batch_size,
        workers=run.workers,
        device=run.device if ray and run.device != "auto" else str(run.torch_device),
        amp=run.amp,
        about={"name": name, "model_kwargs": model.model_kwargs, "img_size": model.img_size},
    )


def build_reduced(model: PredictModel, name: str, engine: str | None, amp: torch.dtype | None = None) -> nn.Module:
    """Build the model, with thresholds if there are any. At module level, so that worker processes can unpickle it."""
    from ... import load

    network = model.build(name, budget=model.budget)
    if model.thresholds is not None:
        budget = model.resolve_budget(network, model.thresholds, amp, model.budget)
        load(network, model.thresholds, engine=engine, budget=budget)
    return network


def _print_summary(summary: Summary) -> None:
    from ...evaluate import tables
    from ..screen import print_note, print_result

    row: dict[str, Any] = {
        "images": summary.images,
        "broken": summary.broken,
        "shards": summary.shards,
        "done earlier": summary.continued,
        "share": summary.share,
        "img/s": summary.images_per_second,
    }
    tables.show([row])
    print_result(f"scores written to {summary.out}")
    if summary.errors:
        print_note(f"unreadable images: {summary.broken}, with the reasons in {summary.errors}")
    if summary.duplicates:
        print_note(f"keys repeated within their shard: {summary.duplicates}; the column `row` distinguishes them")
