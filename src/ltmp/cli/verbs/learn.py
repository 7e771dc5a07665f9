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
from ..extras import need
from ..options import (
    OUTPUT,
    FolderOptions,
    LearningData,
    NamedModel,
    RunOptions,
    ScoreOptions,
    Seed,
    StageOptions,
    option,
    verb,
    words,
)

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader
    from ...evaluate import Evaluation
    from ...learning import Logger, Tuning
    from ..runs import Run

LOOKED_AT = 20_000
_TUNING = "Tuning"


def _check_beside(path: Path) -> None:
    """Refuse a model, a file or a folder, that cannot be written."""
    check_writable(path.parent)


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Which weights train along."""

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
            "Where to write the tuned model; default: OUT/model.safetensors, for hf: models the folder OUT/model.",
            _TUNING,
            writes=_check_beside,
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
            "Weight of labels in the loss, 0 to 1; the rest is distilled from the dense model.", _TUNING, within=PART
        ),
    ] = 0.0
    lora_rank: Annotated[int, option("Rank of LoRA updates.", _TUNING, within=RANK)] = 8

    def tuning(self) -> Tuning | None:
        """The settings, or None where no weights train."""
        from ...learning import Tuning

        if self.tune == "lora":
            need("peft")
        if self.tune is not None:
            return Tuning(self.tune, lr=self.tune_lr, labels=self.labels, rank=self.lora_rank)
        for word in words(TuningOptions(**{field.name: getattr(self, field.name) for field in fields(TuningOptions)})):
            if word.startswith("--"):
                raise UsageError(f"{word} is for a tuned model: add --tune norms or --tune lora, or leave it out")
        return None


@dataclass(frozen=True, kw_only=True)
class LearningOptions(TuningOptions, StageOptions):
    """Options for the budget, and for how much to learn from."""

    target: Annotated[float, option("Share of the dense model's FLOPs to end at, in (0, 1).")] = 0.6
    views: Annotated[
        int | None,
        option(
            "Images to look at while optimising, each time counted; 0: calibrate only.",
            within=VIEWS,
            show_default=f"{LOOKED_AT}; with --tune one epoch",
        ),
    ] = None
    calibration: Annotated[
        int, option("Images kept apart, to calibrate the start and to meet the budget.", within=CALIBRATION)
    ] = 512
    recipe: Annotated[
        str,
        option(
            "ltmp, or paper: the paper's own training, for comparisons (SGD, no calibration, batches of 128, augmented "
            "images, tau 0.5, 2 % of the images kept apart)."
        ),
    ] = "ltmp"
    tau: Annotated[
        float | None,
        option(
            "Temperature of the decisions' gradients.", within=TEMPERATURE, show_default="0.1; with --recipe paper 0.5"
        ),
    ] = None
    accumulate: Annotated[int, option("Batches per step.", within=BATCH)] = 1
    lr: Annotated[float, option("Factor on the learning rates.", within=FACTOR)] = 1.0
    distill: Annotated[bool, option("Learn from the dense model's answers instead of labels.", None, "--distill")] = (
        False
    )
    unlabelled: Annotated[bool, option("Ignore folder names; implies --distill.", None, "--unlabelled")] = False
    seed: Seed = 0

    def counted(self, loader: Loader) -> LearningOptions:
        """With the number of images to optimise on."""
        from ...learning import views_of
        from ...learning.paper import HELD_OUT

        apart = self.calibration
        if self.recipe == "paper":
            apart = max(2, round(HELD_OUT * loader.images)) if loader.images else apart
        once = self.tune is not None or self.recipe == "paper"
        views = self.views if self.views is not None else views_of(loader, 1, apart) if once else LOOKED_AT
        return replace(self, views=views, calibration=apart)

    def temperature(self) -> float:
        """That of --tau, or the recipe's."""
        from ...learning.options import check_recipe
        from ...learning.paper import TAU

        check_recipe(self.recipe)
        return self.tau if self.tau is not None else TAU if self.recipe == "paper" else LTMPConfig.tau

    def from_answers(self, loader: Loader) -> bool:
        """Whether the dense model's answers stand for labels."""
        return self.distill or not getattr(loader.dataset, "labelled", True)


@dataclass(frozen=True, kw_only=True)
class LearnOutput(FolderOptions):
    """Where the run goes."""

    log: Annotated[
        str | None,
        option(
            "Write events for TensorBoard; wandb:PROJECT logs to Weights & Biases instead.", OUTPUT, metavar="FOLDER"
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
    from ... import attach, distributed
    from ...learning import open_log
    from ...learning.budget import check_share
    from ...learning.paper import BATCH
    from ..runs import Run, base_model, report_skipped, settings_of
    from ..screen import suggest

    check_share(learning.target)
    tuning, config, place = learning.tuning(), replace(scores.config(), tau=learning.temperature()), run.place
    paper = learning.recipe == "paper"
    if paper and data.batch_size == LearningData.batch_size:
        # the paper's, unless another one is asked for
        data = replace(data, batch_size=BATCH)
    folder = output.folder(model.model, scores.variant, f"{learning.target:g}")
    job = Run(folder, settings_of(data, model, scores, learning, run), learning.resume)
    log = open_log(output.log) if output.log and distributed.is_first() else None
    network = attach(model.build(model.model), config)
    loader, checking = data.open_both(
        network, labelled=not learning.unlabelled, seed=learning.seed, check=not learning.no_eval, augment=paper
    )
    learning = learning.counted(loader)
    if learning.dry_run:
        _foretell(network, loader, checking, learning, run, job)
        return
    with job.resumable():
        with distributed.group(place):
            job.of(network, loader, run)
            before = _before(job, network, checking, run) if tuning else None
            _learn(job, network, loader, learning, run, log)
            after = _evaluated(network, checking, run)
            learned = job.done("learning")
            distributed.merge(loader.skipped)
            if distributed.rank() > 0:
                return
        about = _about(model.model, learned, before, after)
        if tuning is None:
            about |= base_model(network, model.pretrained and not model.weights)
        _report(job, network, about, learned["history"], output)
    report_skipped(loader.skipped)
    if not output.quiet:
        tuned = Path(learned["weights"]) if learned.get("tuned") else None
        suggest(*model.deploy(job.thresholds, tuned))


def _before(job: Run, network: nn.Module, checking: Loader | None, run: RunOptions) -> float | None:
    """Top-1 of the weights as they are now: afterwards nobody has them any more."""
    if checking is None:
        return None
    found = job.done("before")
    if found is None:
        evaluation = _evaluated(network, checking, run)
        found = {"top1": evaluation.dense_top1 if evaluation else None}
        job.finish("before", found)
    return found["top1"]


def _learn(
    job: Run, network: nn.Module, loader: Loader, options: LearningOptions, run: RunOptions, log: Logger | None
) -> None:
    """Learn thresholds and write them, or read those of a run that came as far."""
    from ... import distributed, save
    from ...learning import learn
    from ..progress import progress_bar
    from ..runs import fingerprints

    done = job.done("learning")
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
            distill=options.from_answers(loader),
            seed=options.seed,
            device=run.place,
            amp=run.cast,
            checkpoint=job.checkpoint,
            progress=bar.reach,
            log=log,
            tuning=tuning,
        )
    found: dict[str, Any] = {"target": result.target, "share": result.share, "views": result.views}
    if options.recipe == "paper":
        found |= {"recipe": options.recipe, "trained_share": result.trained_share}
    if tuning is not None:
        found["tuned"] = tuning.parts if result.tuned else None
    if distributed.rank() == 0:
        if tuning is not None:
            found["weights"] = str(_write_weights(network, options.tuned_weights, job.folder))
        # before anything else is done with them
        save(network, job.thresholds, **found)
        written = [job.thresholds, *([_weights_file(found["weights"])] if "weights" in found else [])]
        found["files"] = fingerprints(written)
    job.finish("learning", {**found, "history": [asdict(step) for step in result.history]})


def _restore(job: Run, network: nn.Module, done: dict[str, Any]) -> None:
    """The thresholds of an earlier attempt, and the weights that belong to them."""
    from ... import detach, load
    from ...zoo.build import load_weights

    weights = done.get("weights")
    if weights is not None:
        load_weights(detach(network), _weights_file(weights))
    load(network, job.thresholds)


def _weights_file(weights: str) -> Path:
    """The file of a tuned model, which is a folder for Hugging Face."""
    path = Path(weights)
    return path / "model.safetensors" if path.is_dir() else path


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


def _about(model: str, learned: dict[str, Any], before: float | None, after: Evaluation | None) -> dict[str, Any]:
    """Metadata for the thresholds file; measured on held-out images where there are any.

    With tuned weights `top1_dense` is that of those before.
    """
    about: dict[str, Any] = {"model_name": model, "target": learned["target"], "share": learned["share"]}
    if after is not None:
        about |= {"share": after.share, "top1_dense": after.dense_top1, "top1": after.top1}
    about |= {name: learned[name] for name in ("views", "recipe", "trained_share") if name in learned}
    if "tuned" in learned:
        about["tuned"] = learned["tuned"]
        if after is not None:
            about |= {"top1_dense": before, "top1_dense_tuned": after.dense_top1}
        about["weights"] = learned["weights"]
    return about


def _report(
    job: Run, network: nn.Module, about: dict[str, Any], history: list[dict[str, Any]], output: LearnOutput
) -> None:
    from ... import save
    from ...evaluate import tables
    from ..screen import say, tell

    save(network, job.thresholds, **about)
    job.close()
    if "tuned" in about and about["tuned"] is None:
        tell("tuning did not lower the loss on the images kept apart: the model keeps the weights it had")
    if not output.quiet:
        names = {"model_name": "model", "target": "target", "share": "share", "top1_dense": "top-1 dense"}
        names |= {"trained_share": "share in training"}
        names |= {"top1_dense_tuned": "top-1 tuned", "top1": "top-1", "views": "images looked at"}
        tables.show([{new: about[old] for old, new in names.items() if old in about}])
        say(f"thresholds in {job.thresholds}")
        if "weights" in about:
            say(f"tuned model in {about['weights']}")
    if output.json:
        tables.write_json({**about, "thresholds": str(job.thresholds), "history": history}, output.json)


def _foretell(
    network: nn.Module, loader: Loader, checking: Loader | None, options: LearningOptions, run: RunOptions, job: Run
) -> None:
    """Say what would be done, and how long it takes about."""
    from ..runs import foretell_time
    from ..screen import say

    views, size, answers = options.views or 0, loader.batch_size * options.accumulate, options.from_answers(loader)
    taught = "the dense model's answers" if answers else "labels"
    checked = checking.images if checking else 0
    say(
        f"would learn thresholds for a share of {options.target:g} on {views:,} images of {loader.images:,}, in "
        f"{max(1, round(views / size)) if views else 0:,} steps of {size}, from {taught}"
    )
    say(f"would report accuracy on {checked:,} images" if checked else "would report no accuracy")
    say(f"would write {job.thresholds}")
    # a step costs a pass forwards and about two backwards, a pass of the teacher where there is one, and before and
    # after the images kept apart are looked at some seven times each
    teachers = int(answers or options.tune is not None)
    evaluations = 2 * checked * (1 if options.tune is None else 2)
    passes = views * (3 + teachers) + 14 * options.calibration + evaluations
    say(foretell_time(network, loader, run, passes=passes, reads=views + options.calibration + evaluations // 2))
