"""Reduced models on a CPU against the fastest dense model in torch: one process, interleaved, paired ratios.

    python benchmarks/cpu.py --threads 2
    python benchmarks/cpu.py --threads 2 --scores best
    python benchmarks/cpu.py --threads 2 --model vit_small_patch14_dinov2 --img-size 518 --target 0.5 --batch-sizes 1

Dense is eager with fused attention, eager without, and compiled by torch.compile; the ratio is against the one with the
best median. A row is printed only if the reduced model agrees with the masked reference: same token counts, logits
within 1e-4. Weights are random; thresholds are calibrated on smooth random images, so that token counts differ between
images. Each round runs another batch, as in deployment, so that no way profits from what a library has prepared for the
same number of rows in the round before. `ops` is the number of operator calls of a reduced forward, including nested
ones.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ltmp
from ltmp.config import SCORES
from ltmp.engines import compiled, onednn
from ltmp.hosts.attach import attachment
from ltmp.learning import calibrate
from ltmp.ops.probe.reference import WIDTH

Call = Callable[[Tensor], object]


def smooth_images(count: int, size: int) -> Tensor:
    """[count, 3, size, size], blobs with noise: neighbouring patches are similar, as in photographs."""
    blobs = nn.functional.interpolate(torch.randn(count, 3, 28, 28), size=size, mode="bicubic")
    return blobs + 0.1 * torch.randn(count, 3, size, size)


def random_probe(depth: int, width: int) -> Tensor:
    """[L, C + 1, WIDTH + 2], a random probe of the size and scale of a learned one."""
    probe = 0.02 * torch.randn(depth, width + 1, WIDTH + 2)
    probe[:, -1, 0] += 1
    return probe


@contextmanager
def fused(model: nn.Module, on: bool) -> Iterator[None]:
    """Run dense inside, with or without torch's fused attention."""
    attentions = [block.attn for block in attachment(model).body.blocks]
    before = [attention.fused_attn for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = on
        with ltmp.dense():
            yield
    finally:
        for attention, value in zip(attentions, before, strict=True):
            attention.fused_attn = value


def ways(model: nn.Module, dense: nn.Module | None) -> dict[str, Call]:
    """Every way to run a batch, by name. `dense` is the same model without thresholds, to be compiled, or None."""

    def eager(on: bool) -> Call:
        def call(images: Tensor) -> object:
            with fused(model, on):
                return model(images)

        return call

    def plain_torch(images: Tensor) -> object:
        with patch.object(compiled, "applies", return_value=False):
            return model(images)

    def modules(images: Tensor) -> object:
        with patch.object(onednn, "_applies", return_value=False):
            return model(images)

    found = {"dense fused": eager(True), "dense plain": eager(False)}
    if dense is not None:
        found["dense compiled"] = torch.compile(dense)
    reduced = {"reduced": model, "host's modules": modules, "plans in torch": plain_torch}
    return found | reduced  # type: ignore[return-value]


def elapsed(call: Call, images: Tensor) -> tuple[float, float]:
    """Wall-clock and processor seconds of a call."""
    start, used = perf_counter(), process_time()
    call(images)
    return perf_counter() - start, process_time() - used


def check(model: nn.Module, images: Tensor) -> float:
    """Mean FLOPs share of `images`, after checking that the packed and the masked engine agree."""
    with ltmp.record() as calls:
        packed = model(images)
        model.ltmp.train().requires_grad_(True)
        masked = model(images)
        model.ltmp.eval()
    if not torch.equal(*calls.kept) or (packed - masked).abs().max() > 1e-4:
        raise SystemExit("packed and masked disagree: no speed is reported")
    return float(calls.share().mean())


def operators(call: Call, images: Tensor) -> int:
    """Number of operator calls of torch in one forward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(images)
    return sum(event.name.startswith(("aten::", "mkldnn::")) for event in profiler.events())


def row(model: nn.Module, calls: dict[str, Call], images: Tensor, batch: int, seconds: float) -> dict[str, object]:
    """Time every way on batches of `images`, interleaved, for about `seconds` each."""
    batches = cycle(images.split(batch))
    share = sum(check(model, part) for part in images.split(batch)) / (len(images) // batch)
    once = {name: elapsed(call, next(batches))[0] for name, call in calls.items()}
    rounds = max(5, int(seconds / max(once["reduced"], 1e-3)))
    wall: dict[str, list[float]] = {name: [] for name in calls}
    used: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        part = next(batches)
        for name, call in calls.items():
            took = elapsed(call, part)
            wall[name].append(took[0])
            used[name].append(took[1])
    dense = min((name for name in calls if name.startswith("dense")), key=lambda name: median(wall[name][1:]))

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return median(a / b for a, b in zip(times[dense][1:], times[name][1:], strict=True))

    ours = [name for name in calls if not name.startswith("dense")]
    return {
        "batch": batch,
        "share": share,
        "ideal": 1 / share,
        "best dense": dense,
        **{f"ratio, {name}": ratio(wall, name) for name in ours},
        "ratio of processor time": ratio(used, "reduced"),
        "dense ms": 1e3 * median(wall[dense][1:]),
        "reduced ms": 1e3 * median(wall["reduced"][1:]),
        "fastest": min(wall[dense][1:]) / min(wall["reduced"][1:]),
        "ops": operators(calls["reduced"], images[:batch]),
        "ops, dense": operators(calls["dense fused"], images[:batch]),
    }


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--img-size", type=int, help="default: the model's default")
    parser.add_argument("--scores", choices=SCORES, default="paper")
    parser.add_argument("--target", type=float, default=0.56, help="share of the dense FLOPs")
    parser.add_argument("--every", type=int, default=1, help="one of this many blocks removes tokens")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=32, help="number of different images; at least one batch is used")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long to time each way")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = {} if args.img_size is None else {"img_size": args.img_size}
    model = timm.create_model(args.model, **size).eval()
    dense = None
    if not args.no_compile:
        dense = timm.create_model(args.model, **size).eval()
        dense.load_state_dict(model.state_dict())
    images = smooth_images(max(args.images, *args.batch_sizes), model.patch_embed.img_size[0])
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed", scores=args.scores))
    if model.ltmp.config.needs_probe:
        model.ltmp.set_probe(random_probe(len(attachment(model).body.blocks), model.embed_dim))
    calibrate(model, images, args.target, args.every)
    calls, rows = ways(model, dense), []
    if not args.json:
        print(f"{args.model}, {args.scores} scores, {args.threads} threads of {processor()}, torch {torch.__version__}")
    for batch in args.batch_sizes:
        rows.append(row(model, calls, images[: len(images) // batch * batch], batch, args.seconds))
        if not args.json:
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
            print("  ".join(cells), flush=True)
    if args.json:
        print(json.dumps({"processor": processor(), "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
