"""`ltmp bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ... import LTMPConfig, attach, load
from ...data import input_channels
from ...errors import UsageError
from ...evaluate import tables
from ...evaluate.bench import Bench, Row, table
from ...evaluate.synthetic import lively, smooth
from ...hosts.attach import thresholds_of
from ...learning.calibrate import calibrate
from .. import options as o
from ..options import ModelName, settings_of
from ..progress import progress_bar
from ..runs import name_in
from ..setup import DataOptions, ModelOptions, pick_device
from ..timing import Target, say_measured

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench_verb(
    model: ModelName = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="The file that `ltmp learn` wrote; without it, see --share.")
    ] = None,
    budget: o.Budget = None,
    milliseconds: o.Milliseconds = None,
    images_per_second: o.ImagesPerSecond = None,
    share: Annotated[
        float, typer.Option(help="FLOPs share to calibrate thresholds for, where no file is given.")
    ] = 0.55,
    scores: Annotated[
        str, typer.Option(help="paper, attention or best, like --scores of learn, where no file is given.")
    ] = "paper",
    data: Annotated[
        str | None,
        typer.Option(help="Images to time on, like --data of eval; default: smooth noise.", rich_help_panel="Data"),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated; default: 1, 8 and 32.", rich_help_panel="Running")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: of weights and images.", rich_help_panel="Running")
    ] = "float32",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time each way for about so long.")] = 2.0,
    compile: Annotated[bool, typer.Option(help="Time torch.compile of the dense model, too.")] = True,
    baseline: Annotated[bool, typer.Option(help="Time fixed-rate merging at the same share, too.")] = True,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    split: o.Split = None,
    data_root: o.DataRoot = None,
    class_map: o.ClassMap = None,
    device: o.Device = "auto",
    json: o.Json = None,
    csv: o.Csv = None,
    debug: o.Debug = False,
) -> None:
    """Time every way to run a model, in turns: dense (eager, compiled, in graphs), fixed-rate merging, engines.

    Each way is first compared with float32: one whose token counts or answers are off gets no speed, and the exit code
    is 1. Without --weights or --pretrained the weights are random, which is as fast. The ratio is over the fastest
    dense way, ideal is 1 / share.

    Example: ltmp bench --model deit_small_patch16_224 --share 0.55 --batch-size 32 --csv bench.csv
    """
    if dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if not 0 < share < 1:
        raise UsageError(f"--share {share}: expected a number between 0 and 1")
    if model is None and thresholds is None:
        raise UsageError("which model? give --model NAME, or --thresholds FILE of one that was learned")
    target = Target.of(milliseconds, images_per_second, budget)
    if thresholds is None and (target or budget is not None):
        raise UsageError("which dial? --budget, --milliseconds and --images-per-second set that of --thresholds FILE")
    if thresholds is not None and scores != "paper":
        raise UsageError("--scores is for thresholds of --share: those of a file know their own")
    config = LTMPConfig(**settings_of(scores))
    name = model or name_in(Path(thresholds or ""), budget)
    sizes, place = sorted(set(batch_size or (1, 8, 32))), pick_device(device)
    if target and len(sizes) != 1:
        raise UsageError("a time or a speed is for one batch size: give one --batch-size")
    options = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or [])
    network = _network(options).to(place, DTYPES[dtype])
    images = _images(network, max(sizes), data, split, DataOptions(data_root, class_map, batch_size=max(sizes)))
    images = images.to(place, DTYPES[dtype])
    if thresholds is not None:
        load(network, thresholds, budget=budget)
        if target:
            budget = target.meet(network, images[: sizes[0]], quiet="-" in (json, csv))
    else:
        few = images if data else smooth(64, (images.shape[-2], images.shape[-1]), images.shape[1], seed=1).to(images)
        calibrate(attach(network, config), few, share)
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    with progress_bar("timing", len(sizes)) as advance:
        for size in sizes:
            found = Bench(network, images[:size], compiled=compile, baseline=baseline).run(seconds)
            rows += [_plain(row, size) for row in found]
            if "-" not in (json, csv):
                pixels = "x".join(map(str, images.shape[-2:]))
                typer.echo(f"{name}, batch {size}, {pixels}, {dtype}, {where}\n{table(found)}\n")
                speeds = {row.way: row.images_per_second for row in found}
                if target and (own := speeds.get("auto", speeds.get("packed"))):
                    say_measured(size, own)
            advance()
    if json:
        file = str(thresholds) if thresholds else None
        about: dict[str, Any] = {"model": name, "thresholds": file, "budget": budget, "device": where, "dtype": dtype}
        about |= {"torch": torch.__version__, "scores": thresholds_of(network).config.scores}
        tables.write_json({**about, "image_size": list(images.shape[-2:]), "rows": rows}, json)
    if csv:
        tables.write_csv(rows, csv)
    if any(row["note"] and row["way"] != "dense, compiled" for row in rows):
        raise typer.Exit(1)


def _network(options: ModelOptions) -> nn.Module:
    network = options.build(random=True).requires_grad_(False)
    return network if options.has_weights else lively(network)


def _images(network: nn.Module, count: int, data: str | None, split: str | None, reading: DataOptions) -> Tensor:
    if data is not None:
        return next(iter(reading.open(data, network, split=split or "validation")))[0]
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or (224, 224)
    return smooth(count, tuple(size), input_channels(network))


def _plain(row: Row, size: int) -> dict[str, Any]:
    """A row's values; a distance that was not measured is none."""
    return {"batch": size, **{key: None if value != value else value for key, value in row.to_dict().items()}}
