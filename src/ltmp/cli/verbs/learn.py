"""`ltmp learn`."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...config import LTMPConfig
from ...errors import UsageError
from ...files import check_writable
from ...ranges import BATCH, CALIBRATION, FACTOR, PART, RANK, RATE, TEMPERATURE, VIEWS
from ..extras import require
from ..options import (
    OUTPUT,
    FolderOptions,
    LearningData,
    NamedModel,
    RunOptions,
    ScoreOptions,
    Seed,
    StageOptions,
    as_arguments,
    option,
    verb,
)

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader
    from ...evaluate import Evaluation
    from ...learning import Logger, Tuning
    from ..runs import Run

DEFAULT_VIEWS = 20_000
_TUNING = "Tuning"


def _check_parent(path: Path) -> None:
    """Refuse a model path, of a file or a folder, whose parent folder cannot be written."""
    check_writable(path.parent)


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Which weights are trained together with the thresholds, and how."""

    tune: Annotated[
        str | None,
        option(
            "Also train a few weights, distilled from the dense model: norms (norms, biases, layer scales) or lora.",
            _TUNING,
            metavar="PARTS",
        ),
    ] = None
    tuned_weights: Annotated[
        Path | None,
        option(
            "Where to write the tuned model; default: OUT/model.safetensors, or the folder OUT/model for hf: models.",
            _TUNING,
            check_path=_check_parent,
        ),
    ] = None
    tune_lr: Annotated[
        float | None,
        option(
            "Learning rate of the tuned weights.", _TUNING, within=RATE, show_default="1e-3 for norms, 3e-4 for lora"
        ),
    ] = None
    labels: Annotated[
        float,
        option(
            "Weight of the labels in the loss, from 0 to 1; the rest is distillation from the dense model.",
            _TUNING,
            within=PART,
        ),
    ] = 0.0
    lora_rank: Annotated[int, option("Rank of the LoRA updates.", _TUNING, within=RANK)] = 8

    def tuning(self) -> Tuning | None:
        """The settings, or None without --tune.

        Raises:
            UsageError: another option of tuning is given without --tune.
            MissingExtraError: LoRA needs peft.
        """
        from ...learning import Tuning

        if self.tune == "lora":
            require("peft")
        if self.tune is not None:
            return Tuning(self.tune, lr=self.tune_lr, labels=self.labels, rank=self.lora_rank)
        # without the options of subclasses
        own = TuningOptions(**{field.name: getattr(self, field.name) for field in fields(TuningOptions)})
        if changed := as_arguments(own):
            raise UsageError(f"{changed[0]} is for a tuned model: add --tune norms or --tune lora, or leave it out")
        return None


@dataclass(frozen=True, kw_only=True)
class LearningOptions(TuningOptions, StageOptions):
    """Options for the budget and the optimisation."""

    target: Annotated[
        float, option("Budget to meet: a share of the dense model's FLOPs between 0 and 1, e.g. 0.6.")
    ] = 0.6
    views: Annotated[
        int | None,
        option(
            "Images to optimise on, counted each time an image is used; 0 only calibrates.",
            within=VIEWS,
            show_default=f"{DEFAULT_VIEWS}; one epoch with --tune or --recipe paper",
        ),
    ] = None
    calibration: Annotated[
        int,
        option(
            "Images set aside to calibrate the initial thresholds and to meet the budget at the end.",
            within=CALIBRATION,
        ),
    ] = 512
    recipe: Annotated[
        str,
        option(
            "Training recipe: ltmp, or paper, which is the paper's own training for comparisons (SGD, no calibration, "
            "batches of 128, augmented images, tau 0.5, 2 % of the images set aside)."
        ),
    ] = "ltmp"
    tau: Annotated[
        float | None,
        option(
            "Temperature of the merge decision's gradient, in units of cosine similarity.",
            within=TEMPERATURE,
            show_default="0.1; with --recipe paper 0.5",
        ),
    ] = None
    accumulate: Annotated[int, option("Batches per optimiser step.", within=BATCH)] = 1
    lr: Annotated[float, option("Factor on all learning rates.", within=FACTOR)] = 1.0
    distill: Annotated[
        bool, option("Learn from the dense model's predictions instead of labels.", None, "--distill")
    ] = False
    unlabelled: Annotated[
        bool, option("Do not take folder names as labels; implies --distill.", None, "--unlabelled")
    ] = False
    seed: Seed = 0

    def resolved(self, loader: Loader) -> LearningOptions:
        """These options with the defaults of `views` and `calibration` that depend on the recipe and the data."""
        from ...learning import views_of
        from ...learning.paper import HELD_OUT

        calibration, views = self.calibration, self.views
        if self.recipe == "paper" and loader.images:
            calibration = max(2, round(HELD_OUT * loader.images))
        if views is None:
            one_epoch = self.tune is not None or self.recipe == "paper"
            views = views_of(loader, 1, calibration) if one_epoch else DEFAULT_VIEWS
        return replace(self, views=views, calibration=calibration)

    def temperature(self) -> float:
        """The value of --tau, or the recipe's default."""
        from ...learning.options import check_recipe
        from ...learning.paper import TAU

        check_recipe(self.recipe)
        if self.tau is not None:
            return self.tau
        return TAU if self.recipe == "paper" else LTMPConfig.tau

    def distils(self, loader: Loader) -> bool:
        """Whether to learn from the dense model's predictions: on request, or because there are no labels."""
        return self.distill or not getattr(loader.dataset, "labelled", True)


@dataclass(frozen=True, kw_only=True)
class LearnOutput(FolderOptions):
    """The folder of the run, and its log."""

    log: Annotated[
        str | None,
        option(
            "Log to TensorBoard events in this folder, or to Weights & Biases with wandb:PROJECT.",
            OUTPUT,
            metavar="FOLDER",
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
    """Learn thresholds that meet one FLOPs budget; the weights stay as they are unless --tune is given.

    Writes OUT/thresholds.safetensors: a few KB, plus a probe with --scores best (0.6 MB for a ViT-S). Ctrl-C saves the
    run; --resume continues it.

    Example: ltmp learn --data imagenet/ --model deit_small_patch16_224 --pretrained --target 0.6
    """
    from ... import attach, distributed
    from ...learning import open_log
    from ...learning.budget import check_share
    from ...learning.paper import BATCH
    from ..runs import Run, base_model, identifying_settings, report_skipped
    from ..screen import suggest

    check_share(learning.target)
    tuning, config, device = learning.tuning(), replace(scores.config(), tau=learning.temperature()), run.torch_device
    paper = learning.recipe == "paper"
    if paper and data.batch_size == LearningData.batch_size:
        # the paper's batch size, unless --batch-size gives another
        data = replace(data, batch_size=BATCH)
    folder = output.folder(model.model, scores.variant, f"{learning.target:g}")
    job = Run(folder, identifying_settings(data, model, scores, learning, run), learning.resume)
    log = open_log(output.log) if output.log and distributed.is_first() else None
    network = attach(model.build(model.model), config)
    loader, held_out = data.open_both(
        network, labelled=not learning.unlabelled, seed=learning.seed, check=not learning.no_eval, augment=paper
    )
    learning = learning.resolved(loader)
    if learning.dry_run:
        _print_dry_run(network, loader, held_out, learning, run, job)
        return
    with job.resumable():
        with distributed.group(device):
            job.check_subject(network, loader, run)
            before = _top1_before(job, network, held_out, run) if tuning else None
            _learn(job, network, loader, learning, run, log)
            after = _evaluate(network, held_out, run)
            learned = job.result("learning")
            distributed.merge(loader.skipped)
            if distributed.rank() > 0:
                return
        metadata = _metadata(model.model, learned, before, after)
        if tuning is None:
            metadata |= base_model(network, model.pretrained and not model.weights)
        _report(job, network, metadata, learned["history"], output)
    report_skipped(loader.skipped)
    if not output.quiet:
        tuned = Path(learned["weights"]) if learned.get("tuned") else None
        suggest(*model.deploy_command(job.thresholds, tuned))


def _top1_before(job: Run, network: nn.Module, held_out: Loader | None, run: RunOptions) -> float | None:
    """Top-1 accuracy of the dense model before tuning changes its weights; measured once, also by a resumed run."""
    if held_out is None:
        return None
    result = job.result("before")
    if result is None:
        evaluation = _evaluate(network, held_out, run)
        result = {"top1": evaluation.dense_top1 if evaluation else None}
        job.finish("before", result)
    return result["top1"]


def _learn(
    job: Run, network: nn.Module, loader: Loader, options: LearningOptions, run: RunOptions, log: Logger | None
) -> None:
    """Learn thresholds and save them, or load them if the resumed run has learned them already."""
    from ... import distributed, save
    from ...learning import learn
    from ..progress import progress_bar
    from ..runs import fingerprints

    done = job.result("learning")
    if done is not None:
        job.check_files(done.get("files", {}))
        _restore(job, network, done)
        return
    tuning = options.tuning()
    with closing(log) if log else nullcontext(), progress_bar("learning", None) as bar:  # type: ignore[type-var]
        result = learn(
            network,
            loader,
            options.target,
            views=options.views or 0,
            calibration=options.calibration,
            every=options.every,
            recipe=options.recipe,
            accumulate=options.accumulate,
            lr=options.lr,
            distill=options.distils(loader),
            seed=options.seed,
            device=run.torch_device,
            amp=run.amp_dtype,
            checkpoint=job.checkpoint,
            progress=bar.reach,
            log=log,
            tuning=tuning,
        )
    learned: dict[str, Any] = {"target": result.target, "share": result.share, "views": result.views}
    if options.recipe == "paper":
        learned |= {"recipe": options.recipe, "trained_share": result.trained_share}
    if tuning is not None:
        learned["tuned"] = tuning.parts if result.tuned else None
    if distributed.rank() == 0:
        if tuning is not None:
            learned["weights"] = str(_write_weights(network, options.tuned_weights, job.folder))
        # saved before the evaluation, so that an interruption there loses nothing
        save(network, job.thresholds, **learned)
        written = [job.thresholds, *([_weights_file(learned["weights"])] if "weights" in learned else [])]
        learned["files"] = fingerprints(written)
    job.finish("learning", {**learned, "history": [asdict(step) for step in result.history]})


def _restore(job: Run, network: nn.Module, done: dict[str, Any]) -> None:
    """Load the thresholds of the interrupted run, and the tuned weights that belong to them."""
    from ... import detach, load
    from ...zoo.build import load_weights

    weights = done.get("weights")
    if weights is not None:
        load_weights(detach(network), _weights_file(weights))
    load(network, job.thresholds)


def _weights_file(weights: str) -> Path:
    """The weights file of a tuned model; a Hugging Face model is a folder."""
    path = Path(weights)
    return path / "model.safetensors" if path.is_dir() else path


def _evaluate(network: nn.Module, held_out: Loader | None, run: RunOptions) -> Evaluation | None:
    """Evaluate the model on the held-out images, if there are any."""
    from ..runs import evaluate_with_bar

    if held_out is None:
        return None
    return evaluate_with_bar(network, held_out, device=run.torch_device, amp=run.amp_dtype, speed=False)


def _write_weights(network: nn.Module, path: Path | None, folder: Path) -> Path:
    """Write the tuned model and return its path: a folder for a Hugging Face model, otherwise a file."""
    from ...zoo.build import save_weights
    from ...zoo.hugging_face import is_transformers_model

    path = path or folder / ("model" if is_transformers_model(network) else "model.safetensors")
    save_weights(network, path)
    return path


def _metadata(model: str, learned: dict[str, Any], before: float | None, after: Evaluation | None) -> dict[str, Any]:
    """Metadata for the thresholds file; share and accuracies come from the held-out images if there are any.

    With tuned weights, `top1_dense` is the accuracy before tuning.
    """
    metadata: dict[str, Any] = {"model_name": model, "target": learned["target"], "share": learned["share"]}
    if after is not None:
        metadata |= {"share": after.share, "top1_dense": after.dense_top1, "top1": after.top1}
    metadata |= {name: learned[name] for name in ("views", "recipe", "trained_share") if name in learned}
    if "tuned" in learned:
        metadata["tuned"] = learned["tuned"]
        if after is not None:
            metadata |= {"top1_dense": before, "top1_dense_tuned": after.dense_top1}
        metadata["weights"] = learned["weights"]
    return metadata


def _report(
    job: Run, network: nn.Module, metadata: dict[str, Any], history: list[dict[str, Any]], output: LearnOutput
) -> None:
    """Save the thresholds with their metadata, end the run and print the results."""
    from ... import save
    from ...evaluate import tables
    from ..screen import print_note, print_result

    save(network, job.thresholds, **metadata)
    job.close()
    if "tuned" in metadata and metadata["tuned"] is None:
        print_note("tuning did not lower the loss on the images set aside: the model keeps the weights it had")
    if not output.quiet:
        headings = {
            "model_name": "model",
            "target": "target",
            "share": "share",
            "top1_dense": "top-1 dense",
            "trained_share": "share in training",
            "top1_dense_tuned": "top-1 tuned",
            "top1": "top-1",
            "views": "views",
        }
        tables.show([{heading: metadata[name] for name, heading in headings.items() if name in metadata}])
        print_result(f"thresholds written to {job.thresholds}")
        if "weights" in metadata:
            print_result(f"tuned model written to {metadata['weights']}")
    if output.json:
        tables.write_json({**metadata, "thresholds": str(job.thresholds), "history": history}, output.json)


def _print_dry_run(
    network: nn.Module, loader: Loader, held_out: Loader | None, options: LearningOptions, run: RunOptions, job: Run
) -> None:
    """Print what would be done, and an estimate of the time."""
    from ..runs import estimate_time
    from ..screen import print_result

    views, batch, distil = options.views or 0, loader.batch_size * options.accumulate, options.distils(loader)
    steps = max(1, round(views / batch)) if views else 0
    held_out_images = held_out.images if held_out else 0
    print_result(
        f"would learn thresholds for a FLOPs share of {options.target:g} from "
        f"{'the predictions of the dense model' if distil else 'labels'}, in {steps:,} steps of {batch} images "
        f"({views:,} views of {loader.images:,} images)"
    )
    if held_out_images:
        print_result(f"would report accuracy on {held_out_images:,} images")
    else:
        print_result("would report no accuracy")
    print_result(f"would write {job.thresholds}")
    # A step costs a forward pass, a backward pass of about two, and a pass of the teacher if there is one. Calibrating
    # before and meeting the budget after pass the images set aside about seven times each.
    teacher = int(distil or options.tune is not None)
    evaluations = 2 * held_out_images * (1 if options.tune is None else 2)
    passes = views * (3 + teacher) + 14 * options.calibration + evaluations
    reads = views + options.calibration + evaluations // 2
    print_result(estimate_time(network, loader, run, passes=passes, reads=reads))
