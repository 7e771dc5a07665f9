"""The dial against fixed-rate merging at the same shares: accuracy and measured share at each requested budget.

    python benchmarks/budgets.py --demo ltmp-demo --low 0.35 --out budgets-demo
    python benchmarks/budgets.py --amp --model vit_small_patch14_dinov2 --img-size 224 --num-classes 200 \
        --weights vit.safetensors --learn learn.tar --val val.tar --out budgets

Dials are learned on --learn, one per seed, and evaluated on --val, all in one pass. Writes budgets.csv, budgets.json
and budgets.png. --demo uses the model that `ltmp demo` left in a folder, and its digits.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import nn

import ltmp
from ltmp.cli.progress import progress_bar
from ltmp.config import SCORES, Scores
from ltmp.data import Loader, eval_transform, make_loader, open_dataset
from ltmp.data.embedded import load_digits
from ltmp.demo import Setup, trained_model
from ltmp.evaluate import describe_machine, tables
from ltmp.evaluate.accuracy import evaluate_policies
from ltmp.evaluate.compare import rates_for
from ltmp.hosts.attach import thresholds_of
from ltmp.learning.options import DialOptions
from ltmp.method.policy import Policy
from ltmp.visualize.curves import new_figure, save_figure
from ltmp.zoo.build import build_model

BUDGETS = (0.37, 0.42, 0.47, 0.54, 0.6, 0.7, 0.8, 0.9)
REPORTED = (0.37, 0.47, 0.6, 0.8)

Open = Callable[[int], Loader]


def parts(options: argparse.Namespace) -> tuple[nn.Module, Open, Loader]:
    """The model, a function from a seed to a loader of the learning images, and a loader of the evaluation images."""
    if options.demo:
        model = trained_model(options.demo / "vit.safetensors", Setup(), 0, progress_bar)
        learning = load_digits("learn")
        return (
            model,
            lambda seed: make_loader(learning, 50, shuffle=True, seed=seed),
            make_loader(load_digits("val"), 50),
        )
    model = build_model(
        options.model, weights=options.weights, num_classes=options.num_classes, image_size=options.img_size
    )
    transform = eval_transform(model, crop_pct=1.0, crop_mode="squash")
    learning = open_dataset(str(options.learn), split="train", transform=transform, labelled=False)
    reporting = open_dataset(str(options.val), split="validation", transform=transform)
    return model, lambda seed: make_loader(learning, 64, shuffle=True, seed=seed), make_loader(reporting, 64)


def dials(model: nn.Module, opened: Open, options: argparse.Namespace) -> tuple[dict[tuple[int, float], Policy], Any]:
    """The thresholds by (seed, budget), and the number of views and seconds of each run."""
    policies: dict[tuple[int, float], Policy] = {}
    runs = []
    settings = {setting.name: getattr(options, setting.name) for setting in fields(Scores)}
    changed = {name: value for name, value in settings.items() if value is not None}
    config = ltmp.LTMPConfig(scores=replace(SCORES[options.scores], **changed))
    for seed in range(options.seeds):
        ltmp.attach(model, config)
        with progress_bar(f"seed {seed}", None) as bar:
            result = ltmp.learn_dial(
                model, opened(seed), options.low, 0.95, views=options.views, checked=options.checked, seed=seed,
                device=options.device, amp=torch.bfloat16 if options.amp else None, progress=bar.reach,
            )  # fmt: skip
        runs.append({"seed": seed, "views": result.views, "seconds": result.seconds})
        ltmp.save(model, options.out / f"dial-{seed}.safetensors")
        thresholds = thresholds_of(model)
        assert thresholds.dial is not None
        for budget in BUDGETS:
            if thresholds.dial.lowest <= budget <= thresholds.dial.highest:
                thresholds.set_budget(budget)
                policies[seed, budget] = copy.deepcopy(thresholds)
    return policies, runs


def rows_of(results: dict[Any, Any], seeds: int) -> list[dict[str, Any]]:
    """One row per budget: means over the seeds, the spread of accuracy, and fixed-rate merging for comparison."""
    rows = []
    for budget in sorted({budget for _, budget in results}, reverse=True):
        ours = [results[seed, budget] for seed in range(seeds) if (seed, budget) in results]
        top1 = [e.top1 for e in ours]
        row = {
            "budget": budget, "share": mean(e.share for e in ours), "off": max(abs(e.share - budget) for e in ours),
            "top1": mean(top1), "spread": pstdev(top1), "drop": ours[0].dense_top1 - mean(top1),
            "agreement": mean(e.agreement for e in ours),
        }  # fmt: skip
        fixed = results.get(("m", budget))
        row |= {
            "fixed_share": fixed and fixed.share, "fixed_top1": fixed and fixed.top1,
            "fixed_agreement": fixed and fixed.agreement, "gain": fixed and mean(top1) - fixed.top1,
        }  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output folder of `ltmp demo`: use its model and digits")
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--learn", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--low", type=float, default=0.3)
    parser.add_argument("--views", type=int, default=9216)
    parser.add_argument("--checked", type=int, default=DialOptions.checked)
    parser.add_argument("--scores", choices=SCORES, default="paper", help="the options below override its settings")
    parser.add_argument("--similarity")
    parser.add_argument("--matching")
    parser.add_argument("--importance")
    parser.add_argument("--size-power", type=float)
    parser.add_argument("--class-power", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="search and evaluate in bfloat16")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--all-points", action="store_true", help="evaluate every seed at all eight budgets")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, opened, reporting = parts(options)
    policies, runs = dials(model, opened, options)
    if not options.all_points:
        policies = {key: p for key, p in policies.items() if key[0] == 0 or key[1] in REPORTED}
    few = next(iter(reporting))[0][:1].to(options.device)
    ltmp.attach(model, ltmp.LTMPConfig())
    fixed = {("m", budget): rates_for(model, few, "m", budget) for budget in REPORTED}
    everything = {str(key): policy for key, policy in (policies | fixed).items()}
    with progress_bar("reporting", reporting.images) as bar:
        results = evaluate_policies(
            model, reporting, everything, device=options.device, amp=torch.bfloat16 if options.amp else None,
            limit=options.limit, speed=False, progress=bar,
        )  # fmt: skip
    rows = rows_of(dict(zip(policies | fixed, results.values(), strict=True)), options.seeds)
    dense = next(iter(results.values())).dense_top1
    tables.show(rows, f"dense {dense:.2f}; {options.seeds} seeds; accuracies in %")
    tables.write_csv(rows, str(options.out / "budgets.csv"))
    about = {"dense_top1": dense, "runs": runs, "machine": describe_machine(), "rows": rows}
    (options.out / "budgets.json").write_text(json.dumps(about, indent=2))
    figure, axes = new_figure(1, 1, (5, 4))
    axis = axes[0, 0]
    axis.plot([0.3, 1], [0.3, 1], color="0.7", linewidth=1)
    axis.plot([row["budget"] for row in rows], [row["share"] for row in rows], "o")
    axis.set_xlabel("budget requested")
    axis.set_ylabel("share measured")
    save_figure(figure, options.out / "budgets.png")


if __name__ == "__main__":
    main()
