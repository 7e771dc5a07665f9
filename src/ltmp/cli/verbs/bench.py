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
    """A model with thresholds from a file, or calibrated for a FLOPs share."""

    thresholds: Annotated[
        Path | None,
        option("Folder or file written by `ltmp dial` or `ltmp learn`; default: calibrate thresholds for --share."),
    ] = None
    share: Annotated[float, option("Without --thresholds: FLOPs share to calibrate for.", within=SHARE)] = 0.55
    scores: Annotated[
        str, option("Without --thresholds: scores to calibrate with (paper, attention or best, as in `ltmp dial`).")
    ] = "paper"
    every: Every = 1

    def check(self, target: Target | None, budget: float | None) -> None:
        """Refuse options that contradict one another."""
        if self.model is None and self.thresholds is None:
            raise UsageError("which model? give --model NAME, or --thresholds FILE of one that was learned")
        if self.thresholds is None and (target or budget is not None):
            raise UsageError(
                "which dial? --budget, --milliseconds and --images-per-second set that of --thresholds FILE"
            )
        for name, changed in {"--scores": self.scores != "paper", "--every": self.every != 1}.items():
            if changed and self.thresholds is not None:
                raise UsageError(f"{name} is for thresholds of --share: a file records its own")

    def network(self, name: str, budget: float | None) -> nn.Module:
        """Build the model, frozen; without weights, it gets random ones with as much variation as learned ones."""
        from ...evaluate.synthetic import randomize_weights

        network = self.build(name, budget=budget, random=True, classifier=False).requires_grad_(False)
        return network if self.has_weights(name, self.bundle(budget)) else randomize_weights(network)


@dataclass(frozen=True, kw_only=True)
class BenchData(Source):
    """The images to time on."""

    data: Annotated[
        str | None, option("Images to time on, as for --data of `ltmp eval`; default: smooth noise.", DATA)
    ] = None
    class_map: ClassMap = None

    def images(self, network: nn.Module, count: int) -> Tensor:
        """[count, C, H, W] from the dataset, or smooth noise without one."""
        from ...data import input_channels
        from ...evaluate.synthetic import smooth

        if self.data is not None:
            options = DataOptions(data_root=self.data_root, class_map=self.class_map, batch_size=count)
            return next(iter(options.open(self.data, network, split=self.split or "validation")))[0]
        config = getattr(network, "pretrained_cfg", None) or {}
        size = getattr(getattr(network, "patch_embed", None), "img_size", None) or config.get("input_size", (224,))[-2:]
        return smooth(count, (size[0], size[-1]), input_channels(network))


@dataclass(frozen=True, kw_only=True)
class BenchOptions(AgainstOptions):
    """What to time and for how long."""

    batch_size: Annotated[
        list[int] | None, option("Images per batch; may be repeated. Default: 1, 8 and 32.", RUN, within=BATCH)
    ] = None
    dtype: Annotated[str, option("Data type of weights and images: float32, bfloat16 or float16.", RUN)] = "float32"
    seconds: Annotated[float, option("About how many seconds to time each variant.", within=SECONDS)] = 2.0
    compile: Annotated[bool, option("Also time the dense model under torch.compile.")] = True
    baseline: Annotated[bool, option("Also time fixed-rate merging at the same FLOPs share.")] = True
    resize: Annotated[
        list[int] | None,
        option("Also time the dense model at this image size in pixels; may be repeated.", within=PIXELS),
    ] = None
    runtimes: Annotated[
        bool, option("Also time exports in ONNX Runtime and OpenVINO, if they are installed; takes minutes.")
    ] = False
    device: Device = "auto"

    @property
    def sizes(self) -> list[int]:
        """Batch sizes, ascending."""
        return sorted(set(self.batch_size or (1, 8, 32)))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type of weights and images."""
        import torch

        if self.dtype not in DTYPES:
            raise UsageError(f"no dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        return getattr(torch, self.dtype)


@verb
def bench_verb(
    model: BenchModel, speed: SpeedOptions, data: BenchData, options: BenchOptions, output: TableOptions
) -> None:
    """Time every way to run a model, side by side: dense (eager, compiled, graphs), fixed-rate merging, all engines.

    Cheaper dense alternatives can take part as well: the same model at lower resolution (--resize), a smaller model
    (--against), and exports in other runtimes (--runtimes).

    Every variant is first checked against float32. If its token counts or outputs are wrong, it gets no speed and the
    exit code is 1. Without --weights or --pretrained the weights are random, which does not change the speed. The ratio
    is relative to the fastest dense variant; ideally it is 1 / share.

    Example: ltmp bench --model deit_small_patch16_224 --share 0.55 --batch-size 32 --csv bench.csv
    """
    from ...evaluate import tables
    from ..screen import suggest
    from ..timing import Target

    dtype, target, budget = options.torch_dtype, Target.from_options(speed), speed.budget
    model.check(target, budget)
    if target and len(options.sizes) != 1:
        raise UsageError("a time or a speed is for one batch size: give one --batch-size")
    name, device = model.model or name_in(Path(model.thresholds or ""), budget), pick_device(options.device)
    network = model.network(name, budget).to(device, dtype)
    images = data.images(network, options.sizes[-1]).to(device, dtype)
    budget = speed.resolve_budget(network, model.thresholds, None, budget)
    _attach_thresholds(network, images, model, budget, synthetic=data.data is None)
    if target:
        budget = target.meet(network, images[: options.sizes[0]], quiet=output.quiet)
    metadata = _metadata(name, model, device, options.dtype) | {"budget": budget}
    if device.type == "cpu" and not output.quiet:
        _note_slow_plans()
    baselines = _baselines(network, images, options, pretrained=model.pretrained)
    shown = None if output.quiet else metadata
    rows = _time_all(network, images, options, baselines, timed=target is not None, metadata=shown)
    if output.json:
        metadata["scores"] = _scores(network)
        tables.write_json({**metadata, "image_size": list(images.shape[-2:]), "rows": rows}, output.json)
    if output.csv:
        tables.write_csv(rows, output.csv)
    if any(row["note"] and row["way"] != "dense, compiled" for row in rows):
        raise typer.Exit(1)
    if not output.quiet:
        if model.thresholds:
            suggest(*model.deploy_command(model.thresholds, budget=budget))
        else:
            suggest("ltmp", "dial", "--data", data.data or "IMAGES", *model.arguments_for(None), "--scores", "best")


def _note_slow_plans() -> None:
    """Print why the CPU kernels are not available, if so."""
    from ...ops.compiled import unavailable
    from ..screen import print_result

    if reason := unavailable():
        print_result(f"plans run in plain torch, which is slower on a CPU: compiling them {reason}")


def _attach_thresholds(
    network: nn.Module, images: Tensor, model: BenchModel, budget: float | None, *, synthetic: bool
) -> None:
    """Attach the thresholds of the file at a budget, or calibrate some on `images`, or on more of them if synthetic."""
    import torch

    from ... import attach, load
    from ...evaluate.synthetic import smooth
    from ...hosts.attach import thresholds_of
    from ...hosts.outputs import answers_in
    from ...learning import calibrate

    with torch.inference_mode():
        per_patch = answers_in(network(images[:1])).ndim > 2
    if model.thresholds is not None:
        load(network, model.thresholds, budget=budget)
    else:
        if synthetic:
            images = smooth(64, (images.shape[-2], images.shape[-1]), images.shape[1], seed=1).to(images)
        calibrate(attach(network, config_of(model.scores)), images, model.share, model.every)
    if per_patch:
        # the model answers for every patch, also for those that are merged or pruned
        thresholds_of(network).tokens = "grid"


def _time_all(
    network: nn.Module,
    images: Tensor,
    options: BenchOptions,
    others: list[Other],
    *,
    timed: bool,
    metadata: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Time every variant at every batch size, one row each, printing a table per batch size if there is `metadata`.

    Args:
        timed: whether the budget was chosen for a time or a speed, so that the measured one is printed as well.
        metadata: the parts of the title.
    """
    from ...evaluate.bench import Bench, table
    from ..progress import progress_bar
    from ..screen import print_result
    from ..timing import print_measured

    rows = []
    with progress_bar("timing", len(options.sizes)) as advance:
        for size in options.sizes:
            bench = Bench(network, images[:size], compiled=options.compile, baseline=options.baseline, others=others)
            results = bench.run(options.seconds)
            rows += [_row_values(row, size) for row in results]
            if metadata is not None:
                pixels = "x".join(map(str, images.shape[-2:]))
                print_result(f"{metadata['model']}, batch {size}, {pixels}, {metadata['dtype']}, {metadata['device']}")
                typer.echo(f"{table(results)}\n")
                speeds = {row.way: row.images_per_second for row in results}
                if timed and (reduced := speeds.get("auto", speeds.get("packed"))):
                    print_measured(size, reduced)
            advance()
    return rows


def _baselines(network: nn.Module, images: Tensor, options: BenchOptions, *, pretrained: bool) -> list[Other]:
    """The baselines of --resize and --against, and the exports of --runtimes."""
    from ...evaluate.bench import Other

    baselines = options.baselines(network, images[:1], options.resize or (), pretrained=pretrained)
    others = [Other(baseline.name, baseline.run, baseline.share, baseline.prepared) for baseline in baselines]
    return [*others, *(_exported(network, images) if options.runtimes else ())]


def _exported(network: nn.Module, images: Tensor) -> Iterator[Other]:
    """The dense and the reduced model in each installed runtime, exported in the form for any batch size."""
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


def _metadata(name: str, model: BenchModel, device: torch.device, dtype: str) -> dict[str, Any]:
    import torch

    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    file = str(model.thresholds) if model.thresholds else None
    return {"model": name, "thresholds": file, "device": machine, "dtype": dtype, "torch": torch.__version__}


def _scores(network: nn.Module) -> Any:
    from ...hosts.attach import attachment

    return asdict(attachment(network).policy.config.scores)


def _row_values(row: Row, size: int) -> dict[str, Any]:
    """The values of a row for JSON and CSV, with None for NaN."""
    return {"batch": size, **{key: None if value != value else value for key, value in row.to_dict().items()}}
