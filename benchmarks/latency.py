"""What a budget in milliseconds promises and what it keeps: predicted against measured time at several budgets.

    python benchmarks/latency.py --weights vit.safetensors --data learn.tar --thresholds dial.safetensors
    python benchmarks/latency.py --weights vit.safetensors --data learn.tar --images 64     # a dial made here, roughly

Costs are measured once, on one batch; each budget is then set and timed on other batches of the same size, one after
the other: predictions are for the dial's average image. The second table asks for times and says what they came to.
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
    """Calibrated, not learned: for times it does not matter how good a budget's answers are."""
    own = ltmp.attach(model).ltmp
    held, found = HeldOut(model, images, 32), []
    for share in shares:
        calibrate(model, images, share)
        held.meet_budget(share, tries=5)
        found.append((own.merge.detach().cpu().clone(), own.prune.detach().cpu().clone()))
    merge, prune = keep_on(*(torch.stack(column) for column in zip(*found, strict=True)))
    kept, deployed = [], []
    for values in zip(merge, prune, strict=True):
        own.set(*values)
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
    parser.add_argument("--thresholds", type=Path, help="a file with a dial; default: one made here")
    parser.add_argument("--images", type=int, default=64, help="to make a dial on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="to time each budget on")
    parser.add_argument("--seconds", type=float, default=0.3, help="to time each call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="keep the dial that was made")
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
    first, *other = images[: (1 + args.batches) * args.batch].split(args.batch)
    begin = perf_counter()
    costs = ltmp.measure_costs(model, first, seconds=args.seconds)
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.dtype}; costs took {perf_counter() - begin:.1f} s")
    tables.show(_promised(model, costs, other, args.seconds), "predicted against measured")
    tables.show(_asked(model, costs, other, args.seconds), "asked against measured")


def _milliseconds(model: nn.Module, batches: list[Tensor], seconds: float) -> float:
    """Of a batch."""

    def call() -> None:
        for images in batches:
            model(images)

    for _ in range(3):
        call()
    return 1e3 / timed({"model": call}, len(batches), seconds)["model"]


@torch.inference_mode()
def _promised(model: Any, costs: Any, batches: list[Tensor], seconds: float) -> list[dict[str, Any]]:
    """A row a budget."""
    rows, dial = [], model.ltmp.dial
    for share in torch.linspace(dial.lowest, dial.highest, 5).tolist():
        model.ltmp.set_budget(share)
        predicted, measured = 1e3 * costs.predict_seconds(dial.kept_at(share)), _milliseconds(model, batches, seconds)
        rows.append(_row(budget=share, predicted=float(predicted), measured=measured))
    return [*rows, _row(budget=1.0, predicted=1e3 * costs.dense, measured=_dense(model, batches, seconds))]


def _dense(model: Any, batches: list[Tensor], seconds: float) -> float:
    model.ltmp.set_budget(1.0)
    return _milliseconds(model, batches, seconds)


@torch.inference_mode()
def _asked(model: Any, costs: Any, batches: list[Tensor], seconds: float) -> list[dict[str, Any]]:
    """A row a target between the fastest and the slowest."""
    dial = model.ltmp.dial
    ends = [1e3 * float(costs.predict_seconds(dial.kept_at(share))) for share in (dial.lowest, dial.highest)]
    rows = []
    for target in torch.linspace(*ends, 5).tolist()[1:4]:
        share = ltmp.set_latency(model, costs, milliseconds=target)
        rows.append(_row(budget=share, asked=target, measured=_milliseconds(model, batches, seconds)))
    return rows


def _row(budget: float, measured: float, **said: float) -> dict[str, Any]:
    (name, value), *_ = said.items()
    return {
        "budget": round(budget, 3),
        f"{name} ms": round(value, 2),
        "measured ms": round(measured, 2),
        "off by": f"{100 * (value / measured - 1):+.1f} %",
    }


if __name__ == "__main__":
    main()
