"""Learn thresholds by the command line of the paper's code; a thin door to `ltmp.learn`.

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
from common import add_options, build, open_images, run, tell, variant
from torch import nn

import ltmp
from ltmp.cli.options import autocast_type, pick_device
from ltmp.errors import UsageError
from ltmp.evaluate import Evaluation, evaluate, tables
from ltmp.files import atomic_path
from ltmp.hosts.attach import thresholds_of
from ltmp.learning import LearnResult, Step

SEED_RATES = (5e-6, 5e-3)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=128)
    parser.add_argument("--reduction-target", type=float, default=0.75, help="share of the dense FLOPs to end at")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=list(SEED_RATES),
        metavar="RATE",
        help="the paper code's SGD rates for the prune and the merge thresholds. Our optimiser works on other scales "
        "(the logarithm of the prune threshold) and has its own rates: the pair only scales them, by the geometric "
        "mean of its ratios to the paper's 5e-6 and 5e-3",
    )
    parser.add_argument("--tau", type=float, default=ltmp.LTMPConfig.tau, help="temperature of the merge gradient")
    parser.add_argument("--views", type=int, default=16_000, help="images to look at")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="output folder; default: output/MODEL-TARGET")
    return parser.parse_args(arguments)


def rate_factor(rates: list[float]) -> float:
    """What the pair of rates means to `ltmp.learn`: a factor on its own."""
    if len(rates) > 2 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(f"--lr {' '.join(map(str, rates))}: expected two positive rates, for prune and merge")
    pair = rates if len(rates) == 2 else [SEED_RATES[0] * rates[0] / SEED_RATES[1], rates[0]]
    return math.sqrt(math.prod(rate / usual for rate, usual in zip(pair, SEED_RATES, strict=True)))


def train(args: argparse.Namespace) -> None:
    folder = args.output or Path("output") / f"{args.model}-{args.reduction_target:g}"
    device, amp = pick_device(args.device), autocast_type(args.amp)
    model = ltmp.attach(build(args, args.weights), ltmp.LTMPConfig(variant=variant(args), tau=args.tau))
    loader = open_images(args, model, "train", shuffle=True)
    run_file = folder / "run.pt"
    try:
        result = ltmp.learn(
            model,
            loader,
            args.reduction_target,
            views=args.views,
            lr=rate_factor(args.lr),
            seed=args.seed,
            device=device,
            amp=amp,
            checkpoint=run_file,
            on_step=show_step,
            progress=False,
        )
    except KeyboardInterrupt:
        tell(f"the run is saved in {run_file}: the same command goes on from there")
        raise
    evaluation = None
    if any((Path(args.data_dir) / name).is_dir() for name in ("val", "validation")):
        evaluation = evaluate(model, open_images(args, model, "validation"), device=device, amp=amp, speed=False)
    write(model, args.model, folder, result, evaluation)
    run_file.unlink(missing_ok=True)
    if evaluation:
        tables.show(tables.comparison(evaluation), f"{args.model}, {evaluation.images} validation images")
    print(f"share {result.share:.4f} of the dense FLOPs (target {result.target:g}); thresholds in {folder}")


def show_step(step: Step) -> None:
    if step.step % 10 == 0 or step.step == step.steps:
        left = step.seconds / step.step * (step.steps - step.step)
        tell(f"step {step.step}/{step.steps}  loss {step.loss:.4f}  share {step.share:.4f}  {left:.0f} s left")


def write(model: nn.Module, name: str, folder: Path, result: LearnResult, evaluation: Evaluation | None) -> None:
    """The thresholds alone, and a whole checkpoint with the paper code's keys, as its own training wrote them."""
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
    """The host's weights, and the thresholds as `blocks.N.merge_masker.threshold` and so for prune."""
    thresholds = thresholds_of(model)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("ltmp.")}
    for step in thresholds.config.steps:
        for i, value in enumerate(getattr(thresholds, step).detach()):
            state[f"blocks.{i}.{step}_masker.threshold"] = value.clone()
    return state


if __name__ == "__main__":
    sys.exit(run(train, parse()))
