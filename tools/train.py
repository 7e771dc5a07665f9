"""Learn thresholds with the command line of the paper's code; a thin wrapper around `ltmp.learn`.

    python tools/train.py /path/to/imagenet --model ltmp_deit_small_patch16_224 --pretrained -b 128 \
        --lr 0.000005 0.005 --reduction-target 0.75
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import add_options, build, log, open_images, run, variant
from torch import nn

import ltmp
from ltmp.cli.options import autocast_type, pick_device
from ltmp.errors import UsageError
from ltmp.evaluate import Evaluation, evaluate, tables
from ltmp.files import atomic_path
from ltmp.hosts.attach import thresholds_of
from ltmp.learning import LearnResult, Step, views_of
from ltmp.learning.paper import HELD_OUT, TAU

VIEWS = 16_000
SEED_RATES = (5e-6, 5e-3)
"""The paper code's learning rates of the prune and the merge thresholds."""

UNSUPPORTED = {
    "--epochs": "--views is a number of images; --recipe paper trains on each once",
    "--resume": "the same command continues the run in --output",
    "--experiment": "--output is the folder",
    "--validation-batch-size": "-b is the batch size of both",
    "--smoothing": "it is 0.1 with --recipe paper",
    **dict.fromkeys(("--opt", "--momentum", "--weight-decay"), "SGD with neither is --recipe paper"),
    **dict.fromkeys(("--sched", "--warmup-epochs", "--warmup-lr", "--min-lr"), "--recipe paper has constant rates"),
    **dict.fromkeys(("--scale", "--ratio", "--hflip", "--color-jitter"), "--recipe paper augments as the paper does"),
    **dict.fromkeys(
        ("--aa", "--mixup", "--cutmix", "--reprob", "--drop", "--drop-path", "--model-ema", "--sync-bn"),
        "two numbers per block need none of it",
    ),
    **dict.fromkeys(("--native-amp", "--apex-amp"), "--amp computes in bfloat16"),
    **dict.fromkeys(("--log-wandb", "--log-interval"), "`ltmp learn --log` writes logs"),
}
"""Unsupported options of timm's training script, which the paper's code extends, and what to use instead."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=128)
    parser.add_argument("--reduction-target", type=float, default=0.75, help="target share of the dense FLOPs")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=list(SEED_RATES),
        metavar="RATE",
        help="SGD rates of the paper's code for the prune and the merge thresholds. ltmp's optimiser uses other scales "
        "(the logarithm of the prune threshold) and its own rates: the pair only scales these, by the geometric mean "
        "of its ratios to the paper's 5e-6 and 5e-3",
    )
    parser.add_argument(
        "--recipe",
        default="ltmp",
        choices=("ltmp", "paper"),
        help="paper: train as the paper's code does (SGD, one epoch, augmented images, label smoothing)",
    )
    parser.add_argument("--tau", type=float, help="temperature of the gradients; default 0.1, with --recipe paper 0.5")
    parser.add_argument("--views", type=int, help="images to train on; default 16,000, with --recipe paper one epoch")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="output folder; default: output/MODEL-TARGET")
    args, rest = parser.parse_known_args(arguments)
    for argument in rest:
        name = argument.partition("=")[0]
        if name in UNSUPPORTED:
            parser.error(f"{name} is not supported here: {UNSUPPORTED[name]}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def rate_factor(rates: list[float], recipe: str = "ltmp") -> float:
    """Convert --lr to the `lr` of `ltmp.learn`, a factor on its own rates.

    Raises:
        UsageError: a rate is not positive or, with the paper's recipe, the pair is no multiple of the paper's.
    """
    if len(rates) > 2 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(f"--lr {' '.join(map(str, rates))}: expected two positive rates, for prune and merge")
    pair = rates if len(rates) == 2 else [SEED_RATES[0] * rates[0] / SEED_RATES[1], rates[0]]
    factors = [rate / seed_rate for rate, seed_rate in zip(pair, SEED_RATES, strict=True)]
    if recipe == "paper" and not math.isclose(*factors, rel_tol=1e-6):
        raise UsageError(f"--lr {pair[0]:g} {pair[1]:g}: --recipe paper takes multiples of {SEED_RATES[0]:g} "
                         f"{SEED_RATES[1]:g}")  # fmt: skip
    return math.sqrt(math.prod(factors))


def train(args: argparse.Namespace) -> None:
    folder = args.output or Path("output") / f"{args.model}-{args.reduction_target:g}"
    device, amp = pick_device(args.device), autocast_type(args.amp)
    paper, lr = args.recipe == "paper", rate_factor(args.lr, args.recipe)
    tau = args.tau or (TAU if paper else ltmp.LTMPConfig.tau)
    model = ltmp.attach(build(args, args.weights), ltmp.LTMPConfig(variant=variant(args), tau=tau))
    loader = open_images(args, model, "train", shuffle=True, augment=paper)
    held_out = {"calibration": max(2, round(HELD_OUT * loader.images))} if paper else {}
    views = args.views or (views_of(loader, 1, held_out["calibration"]) if paper else VIEWS)
    run_file = folder / "run.pt"
    try:
        result = ltmp.learn(
            model,
            loader,
            args.reduction_target,
            views=views,
            recipe=args.recipe,
            lr=lr,
            **held_out,
            seed=args.seed,
            device=device,
            amp=amp,
            checkpoint=run_file,
            on_step=show_step,
            progress=False,
        )
    except KeyboardInterrupt:
        log(f"the run is saved in {run_file}: the same command continues it")
        raise
    evaluation = None
    if any((Path(args.data_dir) / name).is_dir() for name in ("val", "validation")):
        evaluation = evaluate(model, open_images(args, model, "validation"), device=device, amp=amp, speed=False)
    write(model, args.model, folder, result, evaluation)
    run_file.unlink(missing_ok=True)
    if evaluation:
        tables.show(tables.comparison(evaluation), f"{args.model}, {evaluation.images} validation images")
    if paper:
        print(f"share in training {result.trained_share:.4f}")
    print(f"share {result.share:.4f} of the dense FLOPs (target {result.target:g}); thresholds in {folder}")


def show_step(step: Step) -> None:
    if step.step % 10 == 0 or step.step == step.steps:
        left = step.seconds / step.step * (step.steps - step.step)
        log(f"step {step.step}/{step.steps}  loss {step.loss:.4f}  share {step.share:.4f}  {left:.0f} s left")


def write(model: nn.Module, name: str, folder: Path, result: LearnResult, evaluation: Evaluation | None) -> None:
    """Save a thresholds file, and a full checkpoint with the keys of the paper's code, as its training writes."""
    measured = {"top1": evaluation.top1, "top1_dense": evaluation.dense_top1} if evaluation else {}
    ltmp.save(
        model,
        folder / "thresholds.safetensors",
        target=result.target,
        views=result.views,
        share=evaluation.share if evaluation else result.share,
        **measured,
    )
    with atomic_path(folder / "checkpoint.pth.tar") as temporary:
        torch.save({"arch": name, "state_dict": seed_state(model)}, temporary)


def seed_state(model: nn.Module) -> dict[str, Any]:
    """The weights of the host, and its thresholds as `blocks.N.merge_masker.threshold` and likewise for prune."""
    thresholds = thresholds_of(model)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("ltmp.")}
    for step in thresholds.config.steps:
        for i, value in enumerate(getattr(thresholds, step).detach()):
            state[f"blocks.{i}.{step}_masker.threshold"] = value.clone()
    return state


if __name__ == "__main__":
    sys.exit(run(train, parse()))
