"""Accuracy at equal measured speed: thresholds, the same model at lower resolution, and fixed-rate merging.

    python benchmarks/equal_time.py --model vit_small_patch14_dinov2 --img-size 224 --num-classes 200 \
        --weights vit.safetensors --thresholds dial.safetensors --val val.tar --limit 1000 --threads 2

Accuracy and speed are measured apart: top-1 and agreement of each point in one pass over the images, its speed against
the dense model in turns, each turn on another batch. `--batch-sizes` without a number measures accuracy alone. At each
speed of `--speeds`, values are interpolated between the two points around it, the dense model being the first; a cell
is empty where a method does not get there. Thresholds are those of a dial at `--budgets`, or, with `--learn` instead of
`--thresholds`, calibrated for each of them. Shrinking images is not timed.
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
from ltmp.evaluate.compare import Entry, Wanted, compare, fixed_entry
from ltmp.hosts.attach import attachment
from ltmp.learning import calibrate
from ltmp.zoo.build import build_model

Point = Entry | Baseline


def own_points(model: nn.Module, given: argparse.Namespace) -> Iterator[Entry]:
    """Thresholds at each budget."""
    images = None if given.thresholds else photographs(model, given.learn, given.calibration)
    for budget in given.budgets:
        if images is None:
            model.ltmp.set_budget(budget)
        else:
            calibrate(model, images, budget)
        policy = attachment(model).policy
        own = type(policy)(policy.depth, policy.config).eval()
        own.set_probe(policy.probe)
        own.set(policy.merge.detach(), policy.prune.detach())
        yield Entry(f"ours {budget:g}", "ours", budget, own)


def points(model: nn.Module, images: Tensor, given: argparse.Namespace) -> list[Point]:
    """What is compared."""
    found: list[Point] = [*own_points(model, given)]
    found += [at_resolution(model, size, images) for size in given.sizes]
    for rate in given.rates:
        entry = fixed_entry(model, Wanted("m", rate), images, None)
        found.append(replace(entry, method="fixed-rate merging"))
    return found


def speedup(model: nn.Module, point: Point, images: Tensor, batch: int, rounds: int) -> float:
    """Median over rounds of dense time over the point's, each round on another batch."""
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
    """`key` at `speed`, between the two of a method's points around it; None where it is not that fast."""
    ordered = sorted(rows, key=lambda row: row["speedup"])
    for slow, fast in pairwise(ordered):
        if slow["speedup"] <= speed <= fast["speedup"]:
            way = (speed - slow["speedup"]) / max(fast["speedup"] - slow["speedup"], 1e-9)
            return slow[key] + way * (fast[key] - slow[key])
    return None


def measured(
    model: nn.Module, loader: Loader, compared: list[Point], given: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Share, top-1, agreement and the dense top-1 of each point by its name; kept in a file where one is given."""
    if given.accuracy is not None and given.accuracy.exists():
        kept: dict[str, dict[str, Any]] = json.loads(given.accuracy.read_text())
        return kept
    results = compare(model, loader, compared, limit=given.limit, speed=False)
    names = ("share", "top1", "agreement", "dense_top1")
    found = {point: {name: getattr(done, name) for name in names} for point, done in results.items()}
    if given.accuracy is not None:
        given.accuracy.write_text(json.dumps(found, indent=1))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=200)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--thresholds", type=Path, help="a file with a dial")
    parser.add_argument("--learn", type=Path, help="images to calibrate thresholds on, where there is no file")
    parser.add_argument("--calibration", type=int, default=256, help="how many of them")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="images to measure accuracy on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.6, 0.5, 0.42])
    parser.add_argument("--sizes", type=int, nargs="+", default=[210, 196, 182, 168, 154])
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 12, 16, 20], help="tokens merged a block")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.2, 1.4, 1.6, 1.8, 2.0])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each point and batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", type=Path, help="keep accuracy in this file, or read it from there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if (given.thresholds is None) == (given.learn is None):
        parser.error("give --thresholds or --learn")
    return given


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = build_model(
        given.model, weights=given.weights, num_classes=given.num_classes, image_size=given.img_size
    ).eval()
    if given.thresholds:
        ltmp.load(model, given.thresholds, engine="packed")
    else:
        ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    images = photographs(model, given.val, max([16, *given.batch_sizes]))
    compared = points(model, images[:1], given)
    transform = eval_transform(model, crop_pct=1.0, crop_mode="squash")
    data = open_dataset(str(given.val), split="validation", transform=transform)
    loader = make_loader(data, 32, shuffle=True)
    accuracy = measured(model, loader, compared, given)
    if not given.batch_sizes:
        return
    print(f"{given.model}, {given.limit} images, {given.threads} threads of {processor()}, torch {torch.__version__}")
    dense_top1 = next(iter(accuracy.values()))["dense_top1"]
    print(f"dense top-1 {dense_top1}")
    found = []
    for batch in given.batch_sizes:
        rows = []
        with torch.inference_mode():
            for point in compared:
                done = {key: accuracy[point.name][key] for key in ("share", "top1", "agreement")}
                rows.append({"batch": batch, "method": point.method, "name": point.name, **done,
                             "speedup": speedup(model, point, images, batch, given.rounds)})  # fmt: skip
        print(tables.markdown(rows), flush=True)
        start = {"speedup": 1.0, "top1": dense_top1, "agreement": 100.0}
        methods = {
            m: [start, *(row for row in rows if row["method"] == m)] for m in dict.fromkeys(p.method for p in compared)
        }
        equal = [
            {"batch": batch, "speed": speed}
            | {f"{m}, {key}": at_speed(own, speed, key) for key in ("top1", "agreement") for m, own in methods.items()}
            for speed in given.speeds
        ]
        print(tables.markdown(equal), flush=True)
        found.append({"points": rows, "equal": equal})
    if given.json:
        given.json.write_text(json.dumps({"processor": processor(), "dense_top1": dense_top1, "batches": found}))


if __name__ == "__main__":
    main()
