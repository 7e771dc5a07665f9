"""`ltmp dial`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ... import attach, distributed, learn_dial, save
from ...data import Loader
from ...errors import UsageError
from ...evaluate import tables
from ...evaluate.accuracy import evaluate_policies
from ...hosts.attach import thresholds_of
from .. import options as o
from ..options import config_of
from ..progress import progress_bar
from ..runs import base_model, prepare, report_skipped, resumable, short_name, validation_folder
from ..setup import DataOptions, ModelOptions, autocast_type, pick_device

REPORTED = (0.8, 0.6, 0.47, 0.37)
"""Budgets to report on where nobody says which, as far as the dial goes."""


def dial_verb(
    data: o.Data,
    model: o.Model,
    low: Annotated[float, typer.Option(help="Smallest share of the dense model's FLOPs to be asked for.")] = 0.3,
    high: Annotated[float, typer.Option(help="Largest share to be asked for, but for 1.")] = 0.95,
    target: Annotated[float, typer.Option(help="Share that the file is saved at.")] = 0.6,
    variant: o.Variant = "ltmp",
    scores: o.Scores = "paper",
    similarity: o.Similarity = None,
    matching: o.Matching = None,
    importance: o.Importance = None,
    size_power: o.SizePower = None,
    class_power: o.ClassPower = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/MODEL-VARIANT-dial.", rich_help_panel="Output")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the output folder.")
    ] = False,
    knots: Annotated[int, typer.Option(min=2, help="Rows of the dial.")] = 14,
    views: Annotated[int, typer.Option(min=0, help="Images to search on; 0: calibrate only.")] = 9_000,
    calibration: Annotated[int, typer.Option(min=2, help="Images to make the table from.")] = 512,
    val: Annotated[
        str | None,
        typer.Option(help="Data to report accuracy on; default: val/ of the data folder.", rich_help_panel="Data"),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help=f"Share to report on; may be repeated. Default: {', '.join(map(str, REPORTED))}."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the images and the search.")] = 0,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
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
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Learn thresholds for every budget at once, from images without labels; --budget then picks, at no cost.

    Writes OUT/thresholds.safetensors. Ctrl-C saves the run; --resume goes on with it.

    Example: ltmp dial --data imagenet/ --model deit_small_patch16_224 --pretrained, and then
    ltmp eval --data imagenet/ --thresholds runs/deit_small_patch16_224-ltmp-dial --pretrained --budget 0.55
    """
    if not low <= target <= high:
        raise UsageError(f"--target {target:g} is not on the dial: give one from {low:g} to {high:g}")
    folder = out or Path("runs") / f"{short_name(model)}-{variant}-dial"
    run_file = prepare(folder, resume)
    network = attach(
        ModelOptions(model, weights, pretrained, num_classes, img_size, model_kwargs or []).build(),
        config_of(scores, variant, similarity, matching, importance, size_power, class_power),
    )
    reading = DataOptions(
        data_root, class_map, interpolation, mean, std, crop_pct, crop_mode, strict, batch_size, workers
    )
    loader = reading.open(data, network, split=split or "train", labelled=False, shuffle=True, seed=seed)
    held_out = val or validation_folder(data)
    checking = reading.open(held_out, network, split="validation") if held_out else None
    place, cast = pick_device(device), autocast_type(amp)
    with distributed.group(place), resumable(run_file):
        with progress_bar("learning", None) as bar:
            result = learn_dial(
                network, loader, low, high, knots=knots, views=views, calibration=calibration, seed=seed,
                device=place, amp=cast, checkpoint=run_file, progress=bar.reach,
            )  # fmt: skip
        rows = _reported(network, checking, budget, place, cast) if checking else []
        distributed.merge(loader.skipped)
        if distributed.rank() > 0:
            return
    # few images may end a dial a little off its ends
    dial = thresholds_of(network).dial
    assert dial is not None
    thresholds_of(network).set_budget(dial.nearest(target))
    path = folder / "thresholds.safetensors"
    about = {
        "model_name": model, "target": target, "share": target, "views": result.views, "budgets": rows,
        **base_model(network, pretrained and not weights),
    }  # fmt: skip
    save(network, path, **about)
    run_file.unlink(missing_ok=True)
    report_skipped(loader.skipped)
    if json != "-":
        made = [
            {"budget": share, "divergence": d} for share, d in zip(dial.share.tolist(), result.divergence, strict=True)
        ]
        tables.show(rows or made, f"a dial from {dial.lowest:g} to {dial.highest:g} in {path}")
    if json:
        tables.write_json({**about, "thresholds": str(path), "seconds": result.seconds}, json)


def _reported(
    network: nn.Module, checking: Loader, budgets: list[float] | None, place: torch.device, cast: torch.dtype | None
) -> list[dict[str, Any]]:
    """A row for each budget: what the dial gives on images that it was not made on."""
    thresholds = thresholds_of(network)
    dial = thresholds.dial
    assert dial is not None
    shares = budgets or [share for share in REPORTED if dial.lowest <= share <= dial.highest]
    policies = {}
    for share in shares:
        thresholds.set_budget(share)
        policies[f"{share:g}"] = copy.deepcopy(thresholds)
    with progress_bar("evaluating", checking.images) as bar:
        found = evaluate_policies(network, checking, policies, device=place, amp=cast, speed=False, progress=bar)
    return [
        {"budget": share, "share": e.share, "top1": e.top1, "top1_dense": e.dense_top1, "agreement": e.agreement}
        for share, e in zip(shares, found.values(), strict=True)
    ]
