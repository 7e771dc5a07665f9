"""`ltmp compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ... import attach
from ... import learn as run_learning
from ...checkpoint import apply, read
from ...config import LTMPConfig
from ...data import Loader
from ...errors import UsageError
from ...evaluate import Evaluation, tables
from ...evaluate import compare as job
from ...hosts.attach import stack_of, thresholds_of
from .. import options as o
from ..progress import progress_bar
from ..setup import DataOptions, ModelOptions, autocast_type, pick_device


def compare_verb(
    data: o.Data,
    model: o.Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="ltmp, ltpm, ltm, ltp, m, p, mp, pm, topk, evit, random; m:16 at that rate. May be repeated."
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="FLOPs share that methods without a rate, and files with a dial, are to meet; may be repeated. "
            "Default: 0.6, and what a file was saved at."
        ),
    ] = None,
    thresholds: Annotated[
        list[Path] | None, typer.Option(help="A file of learned thresholds that takes part; may be repeated.")
    ] = None,
    learn_data: Annotated[
        str | None, typer.Option(help="Images that ltmp, ltpm, ltm and ltp learn on, not those of --data.")
    ] = None,
    views: Annotated[int, typer.Option(min=0, help="Images to optimise thresholds on; 0: calibrate only.")] = 0,
    calibration: Annotated[int, typer.Option(min=2, help="Images to calibrate thresholds on.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder of compare.csv, compare.json and compare.png.")] = Path("compare"),
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure images per second, too.")] = True,
    seed: Annotated[int, typer.Option(help="Order of the images learned on.")] = 0,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    engine: o.Engine = None,
    split: o.Split = None,
    data_root: o.DataRoot = None,
    class_map: o.ClassMap = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    strict: o.Strict = False,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 0,
    device: o.Device = "auto",
    amp: o.Amp = False,
    debug: o.Debug = False,
) -> None:
    """Compare token-reduction methods at several budgets on one model and data set: a table and a plot.

    All run on the same engine. Learned thresholds come from --thresholds files or are made here from --learn-data;
    methods with fixed rates take the rate whose FLOPs share is closest to each budget.

    Example: ltmp compare --data imagenet/val --model deit_small_patch16_224 --pretrained --method ltmp --method m
    --method topk --budget 0.6 --budget 0.5 --learn-data imagenet/train
    """
    wanted = [job.Wanted.parse(text) for text in dict.fromkeys(method or (() if thresholds else ("ltmp", "m")))]
    if any(w.learned for w in wanted) and learn_data is None:
        raise UsageError("learned methods need images to learn on: give --learn-data, or files as --thresholds")
    place = pick_device(device)
    network = ModelOptions(model, weights, pretrained, num_classes, img_size, model_kwargs or []).build().to(place)
    reading = DataOptions(
        data_root, class_map, interpolation, mean, std, crop_pct, crop_mode, strict, batch_size, workers
    )
    loader = reading.open(data, network, split=split or "validation")
    settings: dict[str, Any] = {"engine": engine} if engine else {}
    attach(network, LTMPConfig(**settings))
    few = next(iter(loader))[0][:1].to(place)
    entries = [entry for path in thresholds or [] for entry in _from_file(network, path, settings, budget or [])]
    budgets = budget or [0.6]
    for w in wanted:
        if w.learned:
            learning = reading.open(learn_data or "", network, split="train", shuffle=True, seed=seed)
            for target in budgets:
                how = {"views": views, "calibration": calibration, "seed": seed, "amp": autocast_type(amp)}
                entries.append(_learned(network, w.variant, target, learning, settings, how))
        else:
            entries += [job.fixed_entry(network, w, few, target) for target in ([None] if w.r is not None else budgets)]
    attach(network, LTMPConfig(**settings))
    with progress_bar("comparing", min(limit or loader.images, loader.images)) as advance:
        results = job.compare(
            network, loader, entries, device=place, amp=autocast_type(amp), limit=limit, speed=speed, progress=advance
        )
    _write(out, model, entries, results)


def _from_file(
    network: nn.Module, path: Path, settings: dict[str, Any], budgets: Sequence[float]
) -> Iterator[job.Entry]:
    """A file's thresholds: with a dial at each budget that is asked for, or as they were saved."""
    saved = read(path)
    name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
    dialled = budgets if saved.dial is not None else ()
    for budget in dialled or (None,):
        file = saved if budget is None else saved.at(budget, source=str(path))
        attach(network, LTMPConfig.from_dict({**file.config.to_dict(), **settings}))
        apply(network, file, source=str(path))
        target = file.metadata.get("target") if budget is None else budget
        yield job.Entry(
            name if budget is None else f"{name} {budget:g}", file.config.variant, target, stack_of(network).thresholds
        )


def _learned(
    network: nn.Module, variant: str, target: float, loader: Loader, settings: dict[str, Any], how: dict[str, Any]
) -> job.Entry:
    attach(network, LTMPConfig(variant=variant, **settings))
    with progress_bar(f"learning {variant} at {target:g}", None) as bar:
        run_learning(
            network, loader, target, distill=not getattr(loader.dataset, "labelled", True),
            progress=bar.reach, **how,
        )  # fmt: skip
    return job.Entry(f"{variant} {target:g}", variant, target, thresholds_of(network))


def _write(out: Path, model: str, entries: list[job.Entry], results: dict[str, Evaluation]) -> None:
    from ...visualize.curves import plot_methods

    rows = job.rows(entries, results)
    images = next(iter(results.values())).images
    names = {
        "name": "method",
        "share": "share",
        "ideal": "ideal",
        "top1": "top-1",
        "top5": "top-5",
        "agreement": "agree",
    }
    names |= {"images_per_second": "img/s", "speedup": "speed-up"}
    tables.show([{new: row[old] for old, new in names.items()} for row in rows], f"{model}, {images} images")
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    tables.write_json(job.as_json(entries, results, model=model, threads=threads), out / "compare.json")
    tables.write_csv(rows, out / "compare.csv")
    plot_methods(rows, out / "compare.png", title=model)
    typer.echo(f"table and plot: {out}/compare.csv, compare.json, compare.png")
