"""`ltmp learn`."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ... import LearnResult, attach, distributed, save
from ... import learn as run_learning
from ...data import Loader
from ...errors import UsageError
from ...evaluate import Evaluation, tables
from ...learning import Tuning, open_log, views_of
from ...zoo.build import save_weights
from ...zoo.hugging_face import is_of_transformers
from .. import options as o
from ..options import config_of
from ..progress import console, progress_bar
from ..runs import base_model, evaluate_with_bar, prepare, report_skipped, resumable, short_name, validation_folder
from ..setup import DataOptions, ModelOptions, autocast_type, pick_device

VIEWS = 20_000
_TUNING = "Tuning"


def learn_verb(
    data: o.Data,
    model: o.Model,
    target: Annotated[float, typer.Option(help="Share of the dense model's FLOPs to end at, in (0, 1).")] = 0.6,
    variant: o.Variant = "ltmp",
    scores: o.Scores = "paper",
    similarity: o.Similarity = None,
    matching: o.Matching = None,
    importance: o.Importance = None,
    size_power: o.SizePower = None,
    class_power: o.ClassPower = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/MODEL-VARIANT-TARGET.", rich_help_panel="Output")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the output folder.")
    ] = False,
    views: Annotated[
        int | None,
        typer.Option(min=0, help="Images to optimise on; 0: calibrate only. [default: 20000; one epoch with --tune]"),
    ] = None,
    calibration: Annotated[int, typer.Option(min=2, help="Images to set the start and to meet the budget on.")] = 512,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Factor on the learning rates.")] = 1.0,
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the dense model's answers instead of labels.")
    ] = False,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Ignore folder names; implies --distill.")] = False,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Train a few weights along, taught by the dense model: norms (norms, biases, layer scales) or lora.",
            rich_help_panel=_TUNING,
        ),
    ] = None,
    tuned_weights: Annotated[
        Path | None,
        typer.Option(
            help="Where the tuned model goes; default: OUT/model.safetensors, for hf: models the folder OUT/model.",
            rich_help_panel=_TUNING,
        ),
    ] = None,
    tune_lr: Annotated[
        float | None, typer.Option(help="Rate of the weights' AdamW.", rich_help_panel=_TUNING, show_default=False)
    ] = None,
    labels: Annotated[
        float,
        typer.Option(help="Part of the loss from labels; the rest is from the dense model.", rich_help_panel=_TUNING),
    ] = Tuning.labels,
    lora_rank: Annotated[int, typer.Option(help="Rank of the updates of lora.", rich_help_panel=_TUNING)] = Tuning.rank,
    val: Annotated[
        str | None,
        typer.Option(help="Data to report accuracy on; default: val/ of the data folder.", rich_help_panel="Data"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the images.")] = 0,
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
    log: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Write events for TensorBoard; wandb:PROJECT logs to Weights & Biases instead.",
            rich_help_panel="Output",
        ),
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Learn the thresholds of a model for a FLOPs budget; unless --tune is given, the model itself is not changed.

    Writes OUT/thresholds.safetensors (under 10 KB). Ctrl-C saves the run; --resume goes on with it.

    Example: ltmp learn --data imagenet/ --model deit_small_patch16_224 --pretrained --target 0.6
    """
    folder = out or Path("runs") / f"{short_name(model)}-{variant}-{target:g}"
    tuning = Tuning(tune, lr=tune_lr, labels=labels, rank=lora_rank) if tune is not None else None
    if tuning is None and tuned_weights is not None:
        raise UsageError(
            "--tuned-weights says where a tuned model goes: add --tune norms or --tune lora, or leave it out"
        )
    run_file = prepare(folder, resume)
    network = attach(
        ModelOptions(model, weights, pretrained, num_classes, img_size, model_kwargs or []).build(),
        config_of(scores, variant, similarity, matching, importance, size_power, class_power),
    )
    reading = DataOptions(
        data_root, class_map, interpolation, mean, std, crop_pct, crop_mode, strict, batch_size, workers
    )
    loader = reading.open(data, network, split=split or "train", labelled=not unlabelled, shuffle=True, seed=seed)
    distill = distill or not getattr(loader.dataset, "labelled", True)
    held_out = val or validation_folder(data)
    checking = reading.open(held_out, network, split="validation") if held_out else None
    place, cast = pick_device(device), autocast_type(amp)
    logger = open_log(log) if log and distributed.is_first() else None
    if views is None:
        views = VIEWS if tuning is None else views_of(loader, 1, calibration)
    with distributed.group(place), resumable(run_file):
        # of the weights as they are now: afterwards nobody has them any more
        original = _evaluated(network, checking, place, cast) if tuning else None
        with closing(logger) if logger else nullcontext(), progress_bar("learning", None) as bar:
            result = run_learning(
                network,
                loader,
                target,
                views=views,
                calibration=calibration,
                accumulate=accumulate,
                lr=lr,
                distill=distill,
                seed=seed,
                device=place,
                amp=cast,
                checkpoint=run_file,
                on_step=lambda step: bar.reach(
                    step.step, step.steps, f"learning, loss {step.loss:.3f}, share {step.share:.3f}"
                ),
                progress=bar.reach,
                log=logger,
                tuning=tuning,
            )
        evaluation = _evaluated(network, checking, place, cast)
        distributed.merge(loader.skipped)
        if distributed.rank() > 0:
            return
    path = folder / "thresholds.safetensors"
    about = _about(model, result, evaluation)
    if tuning is None:
        about |= base_model(network, pretrained and not weights)
    else:
        about |= _about_tuning(tuning.parts if result.tuned else None, original, evaluation)
        model_file = tuned_weights or folder / ("model" if is_of_transformers(network) else "model.safetensors")
        save_weights(network, model_file)
        about["weights"] = str(model_file)
    save(network, path, **about)
    run_file.unlink(missing_ok=True)
    report_skipped(loader.skipped)
    if json != "-":
        tables.show([about], f"thresholds in {path}")
    if json:
        tables.write_json(
            {**about, "thresholds": str(path), "history": [asdict(step) for step in result.history]}, json
        )


def _evaluated(network: nn.Module, checking: Loader | None, place: torch.device, cast: Any) -> Evaluation | None:
    """How good the model is, where there is something to check it on."""
    return evaluate_with_bar(network, checking, device=place, amp=cast, speed=False) if checking else None


def _about_tuning(parts: str | None, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What a thresholds file says of the weights that belong to it; `top1_dense` is that of those before."""
    if parts is None:
        console.print("tuning did not lower the loss on the images kept apart: the model keeps the weights it had")
    if before is None or after is None:
        return {"tuned": parts}
    return {"tuned": parts, "top1_dense": before.dense_top1, "top1_dense_tuned": after.dense_top1}


def _about(model: str, result: LearnResult, evaluation: Evaluation | None) -> dict[str, Any]:
    """What a thresholds file says about itself; measured on held-out images where there are any."""
    measured = {} if evaluation is None else {"top1_dense": evaluation.dense_top1, "top1": evaluation.top1}
    share = result.share if evaluation is None else evaluation.share
    return {"model_name": model, "target": result.target, "share": share, **measured, "views": result.views}
