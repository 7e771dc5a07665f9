"""Exported models, reduced against dense, in each runtime: one process, interleaved, medians.

    python benchmarks/export.py --threads 2
    python benchmarks/export.py --threads 2 --model vit_small_patch14_dinov2 --img-size 224 --num-classes 200 \
        --weights vit.safetensors --learn learn.tar --val val.tar --cache /tmp/exports

A row is printed only if the export reproduced the model's token counts and logits on 16 images. Without data, weights
are random and thresholds are calibrated on smooth random images. With --cache, exports are kept for later runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import ltmp
from ltmp.data import eval_transform, make_loader, open_dataset
from ltmp.evaluate import tables
from ltmp.export import Plan, Verification, export
from ltmp.export.runtimes import OPENERS, Session, open_package
from ltmp.export.verify import smooth_images
from ltmp.learning import calibrate
from ltmp.zoo.build import build_model

WAYS = (
    # form, batch, quantised
    ("single", 1, False),
    ("static", 1, False),
    ("batch", 8, False),
    ("single", 1, True),
    ("batch", 8, True),
)


def photographs(model: nn.Module, source: Path, count: int) -> Tensor:
    """[count, 3, H, W] from a folder or tar of class folders, resized to the model's size without cropping."""
    transform = eval_transform(model, crop_pct=1.0, crop_mode="squash")
    data = open_dataset(str(source), split="validation", transform=transform, labelled=False)
    images, _ = next(iter(make_loader(data, count, shuffle=True)))
    return images


def reduced_model(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model with thresholds for `options.target`, and 16 images to verify and time on."""
    torch.manual_seed(0)
    model = build_model(
        options.model, weights=options.weights, num_classes=options.num_classes, image_size=options.img_size
    )
    ltmp.attach(model)
    kept = options.cache / f"{options.target}.safetensors"
    learn = photographs(model, options.learn, 128) if options.learn else smooth_images(model, 64, seed=1)
    if kept.exists():
        ltmp.load(model, kept)
    else:
        calibrate(model, learn, options.target, options.every)
        ltmp.save(model, kept)
    return model, photographs(model, options.val, 16) if options.val else smooth_images(model, 16)


def exported(model: nn.Module, images: Tensor, plan: Plan, cache: Path) -> tuple[Path, Verification]:
    """A verified export, from the cache if it is there."""
    name = f"{plan.form}{'_int8' if plan.int8 else ''}{'_dense' if plan.dense else ''}_{plan.format}"
    path = cache / f"{name}.{'onnx' if plan.format == 'onnx' else 'pt2'}"
    notes = path.with_suffix(".json")
    if not notes.exists():
        notes.write_text(json.dumps(asdict(export(model, path, plan, images=images))))
    return path, Verification(**json.loads(notes.read_text()))


def opened(runtime: str, path: Path, plan: Plan, batch: int, images: Tensor, threads: int) -> Session:
    """A session that runs images in batches of `batch`."""
    if runtime == "aoti":
        session = open_package(path, batch, tuple(images.shape[1:]))
    else:
        session = OPENERS[runtime](path, threads)
    return replace(session, batch=batch)


def timed(dense: Session, reduced: Session, images: Tensor, seconds: float) -> dict[str, float]:
    """Images per second, interleaved for about `seconds`, with at least three rounds after a warm-up."""
    times: dict[str, list[float]] = {"dense": [], "reduced": []}
    start = perf_counter()
    while len(times["dense"]) < 4 or perf_counter() - start < seconds:
        for name, session in (("dense", dense), ("reduced", reduced)):
            before = perf_counter()
            session(images)
            times[name].append(perf_counter() - before)
    slow, fast = times["dense"][1:], times["reduced"][1:]
    return {
        "dense img/s": len(images) / median(slow),
        "reduced img/s": len(images) / median(fast),
        "ratio": median(a / b for a, b in zip(slow, fast, strict=True)),
    }


def rows(model: nn.Module, images: Tensor, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per runtime, form and batch size."""
    used = images[:8]
    with ltmp.record() as calls, torch.inference_mode():
        model(used)
    share = calls.share().mean().item()
    for runtime in options.runtimes:
        for form, batch, int8 in WAYS:
            if (int8 and runtime != "onnx") or (runtime == "aoti" and form == "single"):
                continue
            plan = Plan("aoti" if runtime == "aoti" else "onnx", form, int8=int8)
            path, verification = exported(model, images, plan, options.cache)
            dense_path, _ = exported(model, images, replace(plan, dense=True), options.cache)
            sessions = (opened(runtime, p, plan, batch, images, options.threads) for p in (dense_path, path))
            yield {
                "runtime": runtime,
                "form": form,
                "batch": batch,
                "int8": "yes" if int8 else "no",
                "logits": f"{verification.difference:.1e}",
                "same counts": f"{verification.images - verification.undecided}/{verification.images}",
                **timed(*sessions, used, options.seconds),
                "share": share,
                "ideal": 1 / share,
            }


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--learn", type=Path, help="folder or tar of class folders to calibrate on")
    parser.add_argument("--val", type=Path, help="folder or tar of class folders to verify and time on")
    parser.add_argument("--target", type=float, default=0.55, help="share of the dense FLOPs")
    parser.add_argument("--every", type=int, default=1, help="one of this many blocks removes tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long to time each row")
    parser.add_argument("--runtimes", nargs="+", default=["onnx", "openvino"], choices=["onnx", "openvino", "aoti"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or Path(folder)
        options.cache.mkdir(parents=True, exist_ok=True)
        model, images = reduced_model(options)
        table = []
        for row in rows(model, images, options):
            table.append(row)
            if not options.json:
                print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        print(tables.markdown(table))


if __name__ == "__main__":
    main()
