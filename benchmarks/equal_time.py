"""Accuracy at equal measured speed: thresholds, the same model at lower resolution, and fixed-rate merging.

    python benchmarks/equal_time.py --model vit_small_patch14_dinov2 --img-size 224 --num-classes 200 \
        --weights vit.safetensors --thresholds dial.safetensors --val val.tar --limit 1000 --threads 2

Accuracy and speed are measured separately: top-1 and agreement of all points in one pass over the images, and the speed
of each point interleaved with the dense model's, each round on another batch. `--batch-sizes` without a number measures
accuracy only. For each of `--speeds`, values are interpolated between the two neighbouring points of a method, with the
dense model as its first point; a cell is empty if a method does not reach that speed. Thresholds are those of a dial at
each of `--budgets` or, with `--learn` instead of `--thresholds`, calibrated for each of them. Shrinking images is not
timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu import elapsed, processor
from torch import Tensor, nn

import ltmp
from export import photographs
from ltmp.data import Loader, eval_transform, make_loader, open_dataset
from ltmp.engines.body import running
from ltmp.evaluate import tables
from ltmp.evaluate.baselines import Baseline, at_resolution
from ltmp.evaluate.compare import Entry, RequestedMethod, compare, fixed_entry
from ltmp.hosts.attach import attachment
from ltmp.learning import calibrate
from ltmp.zoo.build import build_model

Point = Entry | Baseline


def threshold_points(model: nn.Module, args: argparse.Namespace) -> Iterator[Entry]:
    """The thresholds at each budget."""
    images = None if args.thresholds else photographs(model, args.learn, args.calibration)
    for budget in args.budgets:
        if images is None:
            model.ltmp.set_budget(budget)
        else:
            calibrate(model, images, budget)
        policy = attachment(model).policy
        frozen = type(policy)(policy.depth, policy.config).eval()
        frozen.set_probe(policy.probe)
        frozen.set(policy.merge.detach(), policy.prune.detach())
        yield Entry(f"ours {budget:g}", "ours", budget, frozen)


def all_points(model: nn.Module, images: Tensor, args: argparse.Namespace) -> list[Point]:
    """Everything that is compared."""
    points: list[Point] = [*threshold_points(model, args)]
    points += [at_resolution(model, size, images) for size in args.sizes]
    for rate in args.rates:
        entry = fixed_entry(model, RequestedMethod("m", rate), images, None)
        points.append(replace(entry, method="fixed-rate merging"))
    return points


def speedup(model: nn.Module, point: Point, images: Tensor, batch: int, rounds: int) -> float:
    """Median over rounds of dense time / the point's time, each round on another batch."""
    batches = cycle(images.split(batch))

    def dense(part: Tensor) -> Any:
        with ltmp.dense():
            return model(part)

    def reduced(part: Tensor) -> Any:
        if isinstance(point, Baseline):
            return point.run(part)
        with running(body=replace(attachment(model).body, policy=point.policy)):
            return model(part)

    prepare: Callable[[Tensor], Tensor] = point.prepared if isinstance(point, Baseline) else lambda part: part
    ratios = []
    for _ in range(rounds + 2):
        part = next(batches)
        small = prepare(part)
        ratios.append(elapsed(dense, part)[0] / elapsed(reduced, small)[0])
    return median(ratios[2:])


def at_speed(rows: list[dict[str, Any]], speed: float, key: str) -> float | None:
    """`key` at `speed`, interpolated between a method's two neighbouring points; None if it is never that fast."""
    ordered = sorted(rows, key=lambda row: row["speedup"])
    for slow, fast in pairwise(ordered):
        if slow["speedup"] <= speed <= fast["speedup"]:
            part = (speed - slow["speedup"]) / max(fast["speedup"] - slow["speedup"], 1e-9)
            return slow[key] + part * (fast[key] - slow[key])
    return None


def measure_accuracy(
    model: nn.Module, loader: Loader, points: list[Point], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Share, top-1, agreement and dense top-1 of each point by its name; with --accuracy, kept in that file."""
    if args.accuracy is not None and args.accuracy.exists():
        kept: dict[str, dict[str, Any]] = json.loads(args.accuracy.read_text())
        return kept
    evaluations = compare(model, loader, points, limit=args.limit, speed=False)
    names = ("share", "top1", "agreement", "dense_top1")
    accuracy = {point: {name: getattr(result, name) for name in names} for point, result in evaluations.items()}
    if args.accuracy is not None:
        args.accuracy.write_text(json.dumps(accuracy, indent=1))
    return accuracy


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=200)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--thresholds", type=Path, help="a file with a dial")
    parser.add_argument("--learn", type=Path, help="images to calibrate thresholds on, instead of a file")
    parser.add_argument("--calibration", type=int, default=256, help="how many images to calibrate on")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="images to measure accuracy on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.6, 0.5, 0.42])
    parser.add_argument("--sizes", type=int, nargs="+", default=[210, 196, 182, 168, 154])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 16, 20], help="tokens merged per block")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.2, 1.4, 1.6, 1.8, 2.0])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15, help="rounds per point and batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", type=Path, help="keep accuracy in this file, and read it if it exists")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.thresholds is None) == (args.learn is None):
        parser.error("give --thresholds or --learn")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build_model(args.model, weights=args.weights, num_classes=args.num_classes, image_size=args.img_size).eval()
    if args.thresholds:
        ltmp.load(model, args.thresholds, engine="packed")
    else:
        ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    images = photographs(model, args.val, max([16, *args.batch_sizes]))
    points = all_points(model, images[:1], args)
    transform = eval_transform(model, crop_pct=1.0, crop_mode="squash")
    data = open_dataset(str(args.val), split="validation", transform=transform)
    loader = make_loader(data, 32, shuffle=True)
    accuracy = measure_accuracy(model, loader, points, args)
    if not args.batch_sizes:
        return
    print(f"{args.model}, {args.limit} images, {args.threads} threads of {processor()}, torch {torch.__version__}")
    dense_top1 = next(iter(accuracy.values()))["dense_top1"]
    print(f"dense top-1 {dense_top1}")
    batches = []
    for batch in args.batch_sizes:
        rows = []
        with torch.inference_mode():
            for point in points:
                known = {key: accuracy[point.name][key] for key in ("share", "top1", "agreement")}
                rows.append({"batch": batch, "method": point.method, "name": point.name, **known,
                             "speedup": speedup(model, point, images, batch, args.rounds)})  # fmt: skip
        print(tables.markdown(rows), flush=True)
        dense = {"speedup": 1.0, "top1": dense_top1, "agreement": 100.0}
        methods = {
            m: [dense, *(row for row in rows if row["method"] == m)] for m in dict.fromkeys(p.method for p in points)
        }
        equal = []
        for speed in args.speeds:
            row = {"batch": batch, "speed": speed}
            for key in ("top1", "agreement"):
                row |= {f"{m}, {key}": at_speed(of_method, speed, key) for m, of_method in methods.items()}
            equal.append(row)
        print(tables.markdown(equal), flush=True)
        batches.append({"points": rows, "equal": equal})
    if args.json:
        args.json.write_text(json.dumps({"processor": processor(), "dense_top1": dense_top1, "batches": batches}))


if __name__ == "__main__":
    main()
