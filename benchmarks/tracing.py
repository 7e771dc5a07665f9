"""Overhead of following patches: `trace()` and `unmerge()` against the same reduced model, interleaved.

    python benchmarks/tracing.py --threads 1 --batch 1 8 32

Weights are random; thresholds are calibrated on smooth random images, so that token counts differ between images.
Ratios are medians of paired rounds, of processor time and, in brackets, of wall-clock time; `least` is the ratio of the
least processor times. `ops` is the number of operator calls of torch, including nested ones. A grid is checked first:
each patch must have the features of the token that `trace()` assigns it to. `--memory` prints the peak of a batch above
the memory that the process had before, by Linux's high-water mark.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from cpu import elapsed, operators, processor, smooth_images
from torch import Tensor, nn

import ltmp
from ltmp.engines import compiled
from ltmp.learning import calibrate


def traced(model: nn.Module, every_block: bool) -> Callable[[Tensor], ltmp.Trace]:
    """`model.forward_features` inside `trace()`."""

    def call(images: Tensor) -> ltmp.Trace:
        with ltmp.trace(every_block=every_block) as calls:
            model.forward_features(images)
        return calls

    return call


def unmerged(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model.forward_features` inside `unmerge()`, as a grid."""

    def call(images: Tensor) -> Tensor:
        with ltmp.unmerge():
            return model.forward_features(images)

    return call


def check(model: nn.Module, images: Tensor) -> float:
    """Mean FLOPs share of `images`, after checking that the grid holds the features of the reduced tokens."""
    with ltmp.record() as calls, ltmp.trace() as followed:
        rows = model.forward_features(images)
    grid, source = unmerged(model)(images), followed.sources[0].long()
    for image in range(len(images)):
        live = source[image] >= 0
        if (grid[image, live] - rows[image, source[image, live]]).abs().max() > 1e-4:
            raise SystemExit("a grid is not what the reduced model computes: no speed is reported")
    return float(calls.share().mean())


def peak(call: Callable[[Tensor], object], images: Tensor) -> float:
    """Peak memory of a call above that of the process, in MiB, the median of five calls."""

    def resident(line: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(entry.split()[1]) for entry in lines if entry.startswith(line)) / 1024

    needed = []
    for _ in range(5):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call(images)
        needed.append(resident("VmHWM") - before)
    return median(needed)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--target", type=float, default=0.56, help="share of the dense FLOPs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="print peak memory instead of times")
    parser.add_argument("--plain", action="store_true", help="decide in plain torch, as without numba")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # average pooling reads the patches after the last block, so that no way may drop all of them there
    model = timm.create_model(args.model, global_pool="avg").eval()
    images = smooth_images(max(args.batch), model.patch_embed.img_size[0])
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    calibrate(model, images, args.target)
    if args.plain:
        compiled.applies = lambda policy, x: False
    ways = {
        "reduced": model.forward_features, "again": model.forward_features, "traced": traced(model, False),
        "every block": traced(model, True), "grid": unmerged(model),
    }  # fmt: skip
    plans = "in torch" if args.plain else "compiled"
    print(f"{args.model}, plans {plans}, {args.threads} threads of {processor()}, medians of {args.repeats} rounds")
    for size in args.batch:
        batch = images[:size]
        if args.memory:
            with ltmp.dense():
                cells = [f"dense {peak(model.forward_features, batch):.0f}"]
            cells += [f"{name} {peak(call, batch):.0f}" for name, call in ways.items() if name != "again"]
            print(f"batch {size}: MiB: " + ", ".join(cells), flush=True)
            continue
        for call in ways.values():
            for _ in range(2):
                call(batch)  # warm-up
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, call in ways.items():
                times[name].append(elapsed(call, batch))
        walls, used = ({name: [t[i] for t in times[name]] for name in ways} for i in (0, 1))
        cells = [f"batch {size}: share {check(model, batch):.3f}, {1e3 * median(walls['reduced']):.1f} ms"]
        for name in list(ways)[1:]:
            wall, cpu = (median(b / a for a, b in zip(t["reduced"], t[name], strict=True)) for t in (walls, used))
            least = min(used[name]) / min(used["reduced"])
            cells.append(f"{name} {cpu:.3f} ({wall:.3f}, least {least:.3f})")
        ops = (f"{name} {operators(call, batch)}" for name, call in ways.items() if name != "again")
        print("; ".join(cells), "; ops " + ", ".join(ops), flush=True)


if __name__ == "__main__":
    main()
