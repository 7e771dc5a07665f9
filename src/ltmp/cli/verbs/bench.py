"""`ltmp bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ...ranges import BATCH, PIXELS, SECONDS, SHARE
from ..extras import RUNTIMES
from ..options import (
    DATA,
    RUN,
    AgainstOptions,
    ClassMap,
    DataOptions,
    Device,
    Every,
    SavedModel,
    Source,
    SpeedOptions,
    TableOptions,
    config_of,
    name_in,
    option,
    pick_device,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...evaluate.bench import Other, Row
    from ..timing import Target

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchModel(SavedModel):
    """Which model, and which thresholds."""

    thresholds: Annotated[Path | None, option("The file that `ltmp learn` wrote; without it, see --share.")] = None
    share: Annotated[
        float, option("FLOPs share to calibrate thresholds for, where no file is given.", within=SHARE)
    ] = 0.55
    scores: Annotated[str, option("paper, attention or best, like --scores of learn, where no file is given.")] = (
        "paper"
    )
    every: Every = 1

    def check(self, target: Target | None, budget: float | None) -> None:
        """Refuse what does not go together."""
        if self.model is None and self.thresholds is None:
            raise UsageError("which model? give --model NAME, or --thresholds FILE of one that was learned")
        if self.thresholds is None and (target or budget is not None):
            raise UsageError(
                "which dial? --budget, --milliseconds and --images-per-second set that of --thresholds FILE"
            )
        for name, given in {"--scores": self.scores != "paper", "--every": self.every != 1}.items():
            if given and self.thresholds is not None:
                raise UsageError(f"{name} is for thresholds of --share: those of a file know their own")

    def network(self, name: str, budget: float | None) -> nn.Module:
        """The model, frozen; without weights of its own with random ones that are as varied as learned ones."""
        from ...evaluate.synthetic import lively

        network = self.build(name, budget=budget, random=True, classifier=False).requires_grad_(False)
        return network if self.has_weights(name, self.opened(budget)) else lively(network)


@dataclass(frozen=True, kw_only=True)
class BenchData(Source):
    """Options for the images that are timed."""

    data: Annotated[str | None, option("Images to time on, like --data of eval; default: smooth noise.", DATA)] = None
    class_map: ClassMap = None

    def images(self, network: nn.Module, count: int) -> Tensor:
        """[count, C, H, W], made where no data is given."""
        from ...data import input_channels
        from ...evaluate.synthetic import smooth

        if self.data is not None:
            reading = DataOptions(data_root=self.data_root, class_map=self.class_map, batch_size=count)
            return next(iter(reading.open(self.data, network, split=self.split or "validation")))[0]
        config = getattr(network, "pretrained_cfg", None) or {}
        size = getattr(getattr(network, "patch_embed", None), "img_size", None) or config.get("input_size", (224,))[-2:]
        return smooth(count, (size[0], size[-1]), input_channels(network))


@dataclass(frozen=True, kw_only=True)
class BenchOptions(AgainstOptions):
    """Which ways are timed, for how long."""

    batch_size: Annotated[list[int] | None, option("May be repeated; default: 1, 8 and 32.", RUN, within=BATCH)] = None
    dtype: Annotated[str, option("Type of weights and images: float32, bfloat16 or float16.", RUN)] = "float32"
    seconds: Annotated[float, option("Metadata how many seconds to time each way.", within=SECONDS)] = 2.0
    compile: Annotated[bool, option("Time torch.compile of the dense model, too.")] = True
    baseline: Annotated[bool, option("Time fixed-rate merging at the same share, too.")] = True
    resize: Annotated[
        list[int] | None, option("Time the dense model at so many pixels a side, too; may be repeated.", within=PIXELS)
    ] = None
    runtimes: Annotated[
        bool, option("Time exports in ONNX Runtime and OpenVINO, too, where they are installed; takes minutes.")
    ] = False
    device: Device = "auto"

    @property
    def sizes(self) -> list[int]:
        """Images a batch, ascending."""
        return sorted(set(self.batch_size or (1, 8, 32)))

    @property
    def type(self) -> torch.dtype:
        """Of weights and images."""
        import torch

        if self.dtype not in DTYPES:
            raise UsageError(f"no dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        return getattr(torch, self.dtype)


@verb
def bench_verb(
    model: BenchModel, budget: SpeedOptions, data: BenchData, options: BenchOptions, output: TableOptions
) -> None:
    """Time every way to run a model, in turns: dense (eager, compiled, in graphs), fixed-rate merging, engines.

    Baselines that cost nothing to try take part where they are asked for: the same model at lower resolution
    (--resize), a smaller one (--against), and exports in other runtimes (--runtimes).

    Each way is first compared with float32: one whose token counts or answers are off gets no speed, and the exit code
    is 1. Without --weights or --pretrained the weights are random, which is as fast. The ratio is over the fastest
    dense way, ideal is 1 / share.

    Example: ltmp bench --model deit_small_patch16_224 --share 0.55 --batch-size 32 --csv bench.csv
    """
    from ...evaluate import tables
    from ..screen import suggest
    from ..timing import Target

    dtype, target = options.type, Target.of(budget)
    model.check(target, budget.budget)
    if target and len(options.sizes) != 1:
        raise UsageError("a time or a speed is for one batch size: give one --batch-size")
    name, place = model.model or name_in(Path(model.thresholds or ""), budget.budget), pick_device(options.device)
    network = model.network(name, budget.budget).to(place, dtype)
    images = data.images(network, options.sizes[-1]).to(place, dtype)
    asked = budget.share(network, model.thresholds, None, budget.budget)
    share = _reduce(network, images, model, asked, made=data.data is None)
    if target:
        share = target.meet(network, images[: options.sizes[0]], quiet=output.quiet)
    about = _about(name, model, place, options.dtype) | {"budget": share}
    if place.type == "cpu" and not output.quiet:
        _say_if_slow()
    given = model.has_weights(name, model.opened(budget.budget)) and model.pretrained
    others = _others(network, images, options, pretrained=given)
    rows = _timed(network, images, options, others, timed=target is not None, title=None if output.quiet else about)
    if output.json:
        about["scores"] = _scores(network)
        tables.write_json({**about, "image_size": list(images.shape[-2:]), "rows": rows}, output.json)
    if output.csv:
        tables.write_csv(rows, output.csv)
    if any(row["note"] and row["way"] != "dense, compiled" for row in rows):
        raise typer.Exit(1)
    if not output.quiet:
        learn = ("ltmp", "dial", "--data", data.data or "IMAGES", *model.again(None), "--scores", "best")
        suggest(*(model.deploy(model.thresholds, budget=share) if model.thresholds else learn))


def _say_if_slow() -> None:
    from ...ops.compiled import unavailable

    if reason := unavailable():
        typer.echo(f"plans run in plain torch, which is slower on a CPU: compiling them {reason}")


def _reduce(network: nn.Module, images: Tensor, model: BenchModel, budget: float | None, *, made: bool) -> float | None:
    """Attach the thresholds of the file, or calibrated ones; returns the budget asked for."""
    import torch

    from ... import attach, load
    from ...evaluate.synthetic import smooth
    from ...hosts.attach import thresholds_of
    from ...hosts.outputs import answers_in
    from ...learning import calibrate

    with torch.inference_mode():
        places = answers_in(network(images[:1])).ndim > 2
    if model.thresholds is not None:
        load(network, model.thresholds, budget=budget)
    else:
        few = smooth(64, (images.shape[-2], images.shape[-1]), images.shape[1], seed=1).to(images) if made else images
        calibrate(attach(network, config_of(model.scores)), few, model.share, model.every)
    if places:
        # an answer for each patch, whatever is left of it
        thresholds_of(network).tokens = "grid"
    return None if model.thresholds is None else budget


def _timed(
    network: nn.Module,
    images: Tensor,
    options: BenchOptions,
    others: list[Other],
    *,
    timed: bool,
    title: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """A row each way and batch size, shown under a title as they are found."""
    from ...evaluate.bench import Bench, table
    from ..progress import progress_bar
    from ..screen import say
    from ..timing import say_measured

    rows = []
    with progress_bar("timing", len(options.sizes)) as advance:
        for size in options.sizes:
            bench = Bench(network, images[:size], compiled=options.compile, baseline=options.baseline, others=others)
            found = bench.run(options.seconds)
            rows += [_plain(row, size) for row in found]
            if title is not None:
                pixels = "x".join(map(str, images.shape[-2:]))
                say(f"{title['model']}, batch {size}, {pixels}, {title['dtype']}, {title['device']}")
                typer.echo(f"{table(found)}\n")
                speeds = {row.way: row.images_per_second for row in found}
                if timed and (own := speeds.get("auto", speeds.get("packed"))):
                    say_measured(size, own)
            advance()
    return rows


def _others(network: nn.Module, images: Tensor, options: BenchOptions, *, pretrained: bool) -> list[Other]:
    """Baselines and exports that are asked for."""
    from ...evaluate.bench import Other

    baselines = options.baselines(network, images[:1], options.resize or (), pretrained=pretrained)
    found = [Other(baseline.name, baseline.run, baseline.share, baseline.prepared) for baseline in baselines]
    return [*found, *(_exported(network, images) if options.runtimes else ())]


def _exported(network: nn.Module, images: Tensor) -> Iterator[Other]:
    """The dense and the reduced model in each runtime that is installed: one form for any batch."""
    import importlib.util

    from ...evaluate.bench import Other
    from ...export.job import in_runtime

    if images.is_cuda or str(images.dtype) != "torch.float32":
        raise UsageError("--runtimes is for float32 on a CPU: exports are made of that")
    for runtime, (title, package) in RUNTIMES.items():
        if not importlib.util.find_spec(package):
            continue
        sessions = in_runtime(network, runtime, images=images[:8])
        yield Other(f"{title}, dense", sessions.dense_model, 1.0)
        yield Other(f"{title}, reduced", sessions.reduced, None)


def _about(name: str, model: BenchModel, place: torch.device, dtype: str) -> dict[str, Any]:
    import torch

    where = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    file = str(model.thresholds) if model.thresholds else None
    return {"model": name, "thresholds": file, "device": where, "dtype": dtype, "torch": torch.__version__}


def _scores(network: nn.Module) -> Any:
    from ...hosts.attach import attachment

    return asdict(attachment(network).policy.config.scores)


def _plain(row: Row, size: int) -> dict[str, Any]:
    """A row's values; a distance that was not measured is none."""
    return {"batch": size, **{key: None if value != value else value for key, value in row.to_dict().items()}}
