"""Accuracy of budgets in milliseconds: predicted against measured time at several budgets.

    python benchmarks/latency.py --weights vit.safetensors --data learn.tar --thresholds dial.safetensors
    python benchmarks/latency.py --weights vit.safetensors --data learn.tar --images 64     # with a rough dial

Costs are measured once, on one batch. Each budget is then set and timed on other batches of the same size, several in a
row, because predictions are for the dial's average image. The second table sets the model to target times and compares
them with the measured times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import ltmp
from ltmp.data import eval_transform, make_loader, open_dataset
from ltmp.evaluate import tables
from ltmp.evaluate.timing import timed
from ltmp.learning.calibrate import calibrate
from ltmp.learning.heldout import HeldOut
from ltmp.method.dial import Dial, keep_on
from ltmp.zoo.build import build_model


@torch.no_grad()
def rough_dial(model: nn.Module, images: Tensor, shares: list[float]) -> Dial:
    """A dial that is calibrated and not learned, because accuracy does not matter for timing."""
    thresholds = ltmp.attach(model).ltmp
    held, knots = HeldOut(model, images, 32), []
    for share in shares:
        calibrate(model, images, share)
        held.meet_budget(share, tries=5)
        knots.append((thresholds.merge.detach().cpu().clone(), thresholds.prune.detach().cpu().clone()))
    merge, prune = keep_on(*(torch.stack(column) for column in zip(*knots, strict=True)))
    kept, deployed = [], []
    for values in zip(merge, prune, strict=True):
        thresholds.set(*values)
        with ltmp.record() as calls:
            for part in images.split(32):
                model(part)
        kept.append(torch.cat(calls.kept).mean(0).cpu())
        deployed.append(calls.share().mean().cpu())
    return Dial(torch.stack(deployed), merge, prune, torch.stack(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=200)
    parser.add_argument("--data", required=True)
    parser.add_argument("--thresholds", type=Path, help="file with a dial; default: make a rough one")
    parser.add_argument("--images", type=int, default=64, help="images to make a dial on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="batches to time each budget on")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to time each call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="save the rough dial here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(
        args.model, weights=args.weights, num_classes=args.num_classes, image_size=args.img_size
    )  # fmt: skip
    model.requires_grad_(False).to(args.device)
    data = open_dataset(args.data, split="train", transform=eval_transform(model, crop_pct=1.0, crop_mode="squash"))
    count = max(args.images, (1 + args.batches) * args.batch)
    images = next(iter(make_loader(data, count, shuffle=True)))[0].to(args.device)
    if args.thresholds:
        ltmp.load(model, args.thresholds, engine=args.engine)
    else:
        dial = rough_dial(model, images, torch.linspace(0.3, 0.95, 6).tolist())
        ltmp.attach(model, ltmp.LTMPConfig(engine=args.engine)).ltmp.set_dial(dial)
        if args.save:
            ltmp.save(model, args.save, model_name=args.model)
    model.to(getattr(torch, args.dtype))
    images = images.to(getattr(torch, args.dtype))
    first, *others = images[: (1 + args.batches) * args.batch].split(args.batch)
    begin = perf_counter()
    costs = ltmp.measure_costs(model, first, seconds=args.seconds)
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.dtype}; costs took {perf_counter() - begin:.1f} s")
    tables.show(_predicted(model, costs, others, args.seconds), "predicted against measured")
    tables.show(_requested(model, costs, others, args.seconds), "requested against measured")


def _milliseconds(model: nn.Module, batches: list[Tensor], seconds: float) -> float:
    """Measured milliseconds per batch."""

    def call() -> None:
        for images in batches:
            model(images)

    for _ in range(3):
        call()
    return 1e3 / timed({"model": call}, len(batches), seconds)["model"]


@torch.inference_mode()
def _predicted(model: Any, costs: Any, batches: list[Tensor], seconds: float) -> list[dict[str, Any]]:
    """One row per budget, dense last."""
    rows, dial = [], model.ltmp.dial
    for share in torch.linspace(dial.lowest, dial.highest, 5).tolist():
        model.ltmp.set_budget(share)
        predicted, measured = 1e3 * costs.predict_seconds(dial.kept_at(share)), _milliseconds(model, batches, seconds)
        rows.append(_row(budget=share, predicted=float(predicted), measured=measured))
    model.ltmp.set_budget(1.0)
    return [*rows, _row(budget=1.0, predicted=1e3 * costs.dense, measured=_milliseconds(model, batches, seconds))]


@torch.inference_mode()
def _requested(model: Any, costs: Any, batches: list[Tensor], seconds: float) -> list[dict[str, Any]]:
    """One row per target time between the dial's fastest and slowest."""
    dial = model.ltmp.dial
    ends = [1e3 * float(costs.predict_seconds(dial.kept_at(share))) for share in (dial.lowest, dial.highest)]
    rows = []
    for target in torch.linspace(*ends, 5).tolist()[1:4]:
        share = ltmp.set_latency(model, costs, milliseconds=target)
        rows.append(_row(budget=share, requested=target, measured=_milliseconds(model, batches, seconds)))
    return rows


def _row(budget: float, measured: float, **expected: float) -> dict[str, Any]:
    """A row that compares measured milliseconds with one named expectation."""
    (name, value), *_ = expected.items()
    return {
        "budget": round(budget, 3),
        f"{name} ms": round(value, 2),
        "measured ms": round(measured, 2),
        "off by": f"{100 * (value / measured - 1):+.1f} %",
    }


if __name__ == "__main__":
    main()
