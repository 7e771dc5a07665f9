"""Packed deployment on a CPU against the faster of timm's two attentions: one process, in turns, medians.

    python benchmarks/cpu.py --threads 2

A row is printed only after the reduced model agreed with the masked reference: same token counts, logits within 1e-4.
Weights are random; thresholds are calibrated on smooth random images, so that token counts differ between images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

import ltmp
from ltmp.engines import onednn
from ltmp.hosts.attach import stack_of
from ltmp.learning import calibrate


def smooth_images(count: int, size: int) -> Tensor:
    """[count, 3, size, size] of blobs on noise: neighbouring patches resemble each other, as in photographs."""
    blobs = nn.functional.interpolate(torch.randn(count, 3, 28, 28), size=size, mode="bicubic")
    return blobs + 0.1 * torch.randn(count, 3, size, size)


def set_fused(model: nn.Module, fused: bool) -> None:
    for block in stack_of(model).blocks:
        block.attn.fused_attn = fused


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def check(model: nn.Module, images: Tensor) -> float:
    """Mean share of `images`, after packed and masked agreed."""
    with ltmp.record() as calls:
        packed = model(images)
        model.ltmp.train()
        masked = model(images)
        model.ltmp.eval()
    if not torch.equal(*calls.kept) or (packed - masked).abs().max() > 1e-4:
        raise SystemExit("packed and masked disagree: no speed is reported")
    return float(calls.share().mean())


def row(model: nn.Module, images: Tensor, rounds: int) -> dict[str, float]:
    share = check(model, images)
    times: dict[str, list[float]] = {"fused": [], "plain": [], "reduced": [], "own layers": []}
    contexts = {"fused": ltmp.dense, "plain": ltmp.dense, "reduced": nullcontext, "own layers": without_onednn}
    for turn in range(rounds + 1):
        for name in times:
            set_fused(model, name == "fused")
            with contexts[name]():
                elapsed = seconds(lambda: model(images))
            if turn:
                times[name].append(elapsed)
    dense = min(("fused", "plain"), key=lambda name: median(times[name]))
    ratio, own = (
        median(a / b for a, b in zip(times[dense], times[name], strict=True)) for name in ("reduced", "own layers")
    )
    speeds = {
        f"{name} images/s": len(images) / median(times[key]) for name, key in (("dense", dense), ("reduced",) * 2)
    }
    return {
        "batch": len(images),
        "share": share,
        "ideal": 1 / share,
        "ratio": ratio,
        "ratio, own layers": own,
        **speeds,
    }


def without_onednn() -> AbstractContextManager[object]:
    """The reduced model with the host's own linear layers, as the dense one has them: what reduction alone brings."""
    return patch.object(onednn, "_applies", return_value=False)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--target", type=float, default=0.56, help="share of the dense FLOPs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25.0, help="about how long to time each row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    images = smooth_images(max(options.batch_sizes), model.patch_embed.img_size[0])
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    calibrate(model, images, options.target)
    rows = []
    for batch in options.batch_sizes:
        once = seconds(lambda batch=batch: model(images[:batch]))
        rows.append(row(model, images[:batch], max(3, int(options.seconds / (4 * once)))))
        if not options.json:
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
