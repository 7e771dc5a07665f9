"""`ltmp learn`."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ..options import OUTPUT, LearningData, NamedModel, OutputOptions, Resume, RunOptions, ScoreOptions, Seed, verb

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader
    from ...evaluate import Evaluation
    from ...learning import LearnResult, Tuning

VIEWS = 20_000
_TUNING = "Tuning"


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Which weights train along."""

    tune: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Train a few weights along, taught by the dense model: norms (norms, biases, layer scales) or lora.",
            rich_help_panel=_TUNING,
        ),
    ] = None
    tuned_weights: Annotated[
        Path | None,
        typer.Option(
            help="Where the tuned model goes; default: OUT/model.safetensors, for hf: models the folder OUT/model.",
            rich_help_panel=_TUNING,
        ),
    ] = None
    tune_lr: Annotated[
        float | None, typer.Option(help="Rate of the weights' AdamW.", rich_help_panel=_TUNING, show_default=False)
    ] = None
    labels: Annotated[
        float,
        typer.Option(help="Part of the loss from labels; the rest is from the dense model.", rich_help_panel=_TUNING),
    ] = 0.0
    lora_rank: Annotated[int, typer.Option(help="Rank of the updates of lora.", rich_help_panel=_TUNING)] = 8

    def tuning(self) -> Tuning | None:
        """The settings, or None where no weights train."""
        from ...learning import Tuning

        if self.tune is not None:
            return Tuning(self.tune, lr=self.tune_lr, labels=self.labels, rank=self.lora_rank)
        if self.tuned_weights is not None:
            raise UsageError(
                "--tuned-weights says where a tuned model goes: add --tune norms or --tune lora, or leave it out"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class LearningOptions(TuningOptions):
    """What to learn for, and from how much."""

    target: Annotated[float, typer.Option(help="Share of the dense model's FLOPs to end at, in (0, 1).")] = 0.6
    resume: Resume = False
    views: Annotated[
        int | None,
        typer.Option(min=0, help="Images to optimise on; 0: calibrate only. [default: 20000; one epoch with --tune]"),
    ] = None
    calibration: Annotated[int, typer.Option(min=2, help="Images to set the start and to meet the budget on.")] = 512
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1
    lr: Annotated[float, typer.Option(help="Factor on the learning rates.")] = 1.0
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the dense model's answers instead of labels.")
    ] = False
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Ignore folder names; implies --distill.")] = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class LearnOutput(OutputOptions):
    """Where the run goes."""

    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/MODEL-VARIANT-TARGET.", rich_help_panel=OUTPUT)
    ] = None
    log: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Write events for TensorBoard; wandb:PROJECT logs to Weights & Biases instead.",
            rich_help_panel=OUTPUT,
        ),
    ] = None


@verb
def learn_verb(
    data: LearningData,
    model: NamedModel,
    scores: ScoreOptions,
    learning: LearningOptions,
    run: RunOptions,
    output: LearnOutput,
) -> None:
    """Learn the thresholds of a model for a FLOPs budget; unless --tune is given, the model itself is not changed.

    Writes OUT/thresholds.safetensors: a few KB, and with --scores best also a probe, 0.6 MB for a ViT-S. Ctrl-C saves
    the run; --resume goes on with it.

    Example: ltmp learn --data imagenet/ --model deit_small_patch16_224 --pretrained --target 0.6
    """
    from ... import attach, distributed, save
    from ...evaluate import tables
    from ..runs import base_model, prepare, report_skipped, resumable, run_folder
    from ..screen import say

    folder = output.out or run_folder(model.model, scores.variant, f"{learning.target:g}")
    tuning = learning.tuning()
    run_file = prepare(folder, learning.resume)
    network = attach(model.build(model.model), scores.config())
    loader = data.open(
        data.data, network, split=data.split or "train",
        labelled=not learning.unlabelled, shuffle=True, seed=learning.seed,
    )  # fmt: skip
    checking = data.open_held_out(network)
    with distributed.group(run.place), resumable(run_file):
        # of the weights as they are now: afterwards nobody has them any more
        original = _evaluated(network, checking, run) if tuning else None
        result = _learned(network, loader, learning, tuning, run, run_file, output.log)
        evaluation = _evaluated(network, checking, run)
        distributed.merge(loader.skipped)
        if distributed.rank() > 0:
            return
    path = folder / "thresholds.safetensors"
    about = _about(model.model, result, evaluation)
    if tuning is None:
        about |= base_model(network, model.pretrained and not model.weights)
    else:
        about |= _about_tuning(tuning.parts if result.tuned else None, original, evaluation)
        about["weights"] = str(_write_weights(network, learning.tuned_weights, folder))
    save(network, path, **about)
    run_file.unlink(missing_ok=True)
    report_skipped(loader.skipped)
    if not output.quiet:
        tables.show([about])
        say(f"thresholds in {path}")
    if output.json:
        history = [asdict(step) for step in result.history]
        tables.write_json({**about, "thresholds": str(path), "history": history}, output.json)


def _learned(
    network: nn.Module,
    loader: Loader,
    options: LearningOptions,
    tuning: Tuning | None,
    run: RunOptions,
    run_file: Path,
    log: str | None,
) -> LearnResult:
    """The run itself, with a bar."""
    from ... import distributed
    from ...learning import learn, open_log, views_of
    from ..progress import progress_bar

    logger = open_log(log) if log and distributed.is_first() else None
    views = options.views
    if views is None:
        views = VIEWS if tuning is None else views_of(loader, 1, options.calibration)
    with closing(logger) if logger else nullcontext(), progress_bar("learning", None) as bar:
        return learn(
            network,
            loader,
            options.target,
            views=views,
            calibration=options.calibration,
            accumulate=options.accumulate,
            lr=options.lr,
            distill=options.distill or not getattr(loader.dataset, "labelled", True),
            seed=options.seed,
            device=run.place,
            amp=run.cast,
            checkpoint=run_file,
            on_step=lambda step: bar.reach(
                step.step, step.steps, f"learning, loss {step.loss:.3f}, share {step.share:.3f}"
            ),
            progress=bar.reach,
            log=logger,
            tuning=tuning,
        )


def _evaluated(network: nn.Module, checking: Loader | None, run: RunOptions) -> Evaluation | None:
    """How good the model is, where there is something to check it on."""
    from ..runs import evaluate_with_bar

    return evaluate_with_bar(network, checking, device=run.place, amp=run.cast, speed=False) if checking else None


def _write_weights(network: nn.Module, path: Path | None, folder: Path) -> Path:
    """Write the tuned model, of Hugging Face as a folder; returns where it is."""
    from ...zoo.build import save_weights
    from ...zoo.hugging_face import is_of_transformers

    path = path or folder / ("model" if is_of_transformers(network) else "model.safetensors")
    save_weights(network, path)
    return path


def _about_tuning(parts: str | None, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What a thresholds file says of the weights that belong to it; `top1_dense` is that of those before."""
    from ..screen import tell

    if parts is None:
        tell("tuning did not lower the loss on the images kept apart: the model keeps the weights it had")
    if before is None or after is None:
        return {"tuned": parts}
    return {"tuned": parts, "top1_dense": before.dense_top1, "top1_dense_tuned": after.dense_top1}


def _about(model: str, result: LearnResult, evaluation: Evaluation | None) -> dict[str, Any]:
    """What a thresholds file says about itself; measured on held-out images where there are any."""
    measured = {} if evaluation is None else {"top1_dense": evaluation.dense_top1, "top1": evaluation.top1}
    share = result.share if evaluation is None else evaluation.share
    return {"model_name": model, "target": result.target, "share": share, **measured, "views": result.views}
