"""Speed of every way to run a model on a GPU, for models and batch sizes used in deployment.

    python benchmarks/gpu.py                          all cases, bfloat16, random weights with calibrated thresholds
    python benchmarks/gpu.py --case deit_s --profile  one case, and the time of its kernels
    python benchmarks/gpu.py --dry                    tiny models on a CPU, to check that the script runs

Each case runs in its own process. Cases build, compile and check in parallel, and are then timed one after the other;
within a case, the timed calls are interleaved. Rows are appended to a CSV with device, versions and date.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

if "--dry" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timm
import torch
from torch import Tensor, nn

import ltmp
from ltmp.config import SCORES
from ltmp.evaluate.bench import Bench, Row, table
from ltmp.evaluate.synthetic import randomize_weights, smooth
from ltmp.learning.calibrate import calibrate

NEVER_SLOWER = 0.97
"""Least speed of `auto` relative to the fastest dense way, at any batch size."""


@dataclass(frozen=True)
class Case:
    """A model on a batch; `target` is the least speed-up of the graph engine over the fastest dense way."""

    name: str
    model: str
    batch: int
    size: int
    share: float
    target: float | None = None


CASES = [
    Case("deit_s", "deit_small_patch16_224", 256, 224, 0.572, 1.5),
    Case("deit_b", "deit_base_patch16_224", 256, 224, 0.58, 1.6),
    Case("vit_l", "vit_large_patch16_224", 128, 224, 0.58, 1.63),
    Case("vit_b_384", "vit_base_patch16_384", 64, 384, 0.64, 1.38),
    Case("vit_s_518", "vit_small_patch14_dinov2", 32, 518, 0.6),
    Case("deit_s_64", "deit_small_patch16_224", 64, 224, 0.572),
    Case("deit_s_16", "deit_small_patch16_224", 16, 224, 0.572),
    Case("deit_s_1", "deit_small_patch16_224", 1, 224, 0.572),
]

DRY = [replace(case, batch=2, size=32) for case in CASES[:2]]


def build(case: Case, device: torch.device, dtype: torch.dtype, dry: bool, scores: str) -> tuple[nn.Module, Tensor]:
    """The attached, calibrated model and its batch."""
    kwargs = {"img_size": case.size, "num_classes": 1000}
    if dry:
        kwargs |= {"embed_dim": 32, "depth": 4, "num_heads": 2}
    with device:
        model = randomize_weights(timm.create_model(case.model, **kwargs)).eval().to(dtype).requires_grad_(False)
    images = smooth(case.batch, case.size).to(device, dtype)
    ltmp.attach(model, ltmp.LTMPConfig(scores=scores))
    calibration = smooth(min(64, max(16, case.batch)), case.size, seed=1).to(device, dtype)
    calibrate(model, calibration, case.share)
    return model, images


def measure(case: Case, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    model, images = build(case, device, dtype, options.dry, options.scores)
    bench = Bench(model, images, compiled=not options.no_compile and device.type == "cuda", baseline=options.baseline)
    bench.check()
    if options.turn:
        print("ready", flush=True)
        sys.stdin.readline()
    rows = bench.time(options.seconds)
    print(f"\n{case.name}: {case.model}, batch {case.batch}, {case.size} px, {str(dtype)[6:]}")
    print(table(rows), flush=True)
    if options.profile and device.type == "cuda":
        profile(bench.ways["graph"])
    if not options.dry:
        named = case if options.scores == "paper" else replace(case, name=f"{case.name}_{options.scores}")
        save(options.csv, named, rows, dtype, device)
    return rows


def profile(call: object) -> None:
    """Print the time of each kernel of one forward, the most expensive first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with torch.inference_mode():
        for _ in range(3):
            call()
        with profiler(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events[:22]:
        print(f"  {event.self_device_time_total / 3:9.0f} us {event.count // 3:4d} x {event.key[:90]}")


class Turn:
    """A process that builds, compiles and checks one case, prints "ready", and times the case on a line of input."""

    def __init__(self, case: Case, arguments: list[str]) -> None:
        command = [sys.executable, "-u", __file__, *arguments, "--turn", "--case", case.name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.waiting = threading.Thread(target=self._wait, daemon=True)
        self.waiting.start()

    def _wait(self) -> None:
        while self.process.poll() is None and self.process.stdout.readline() != "ready\n":
            pass

    @property
    def late(self) -> bool:
        return self.waiting.is_alive()

    def go(self) -> int:
        """Let the process time its case, print its output, and return its exit code."""
        self.waiting.join()
        print(self.process.communicate("go\n")[0], end="", flush=True)
        return self.process.returncode


def in_turns(cases: list[Case], arguments: list[str], patience: float) -> int:
    """Run all cases, and return how many miss their target or fail.

    After `patience` seconds, the cases that are ready no longer wait for the others.
    """
    turns = [Turn(case, arguments) for case in cases]
    deadline = time.time() + patience
    for turn in turns:
        turn.waiting.join(max(0.0, deadline - time.time()))
    return sum(turn.go() != 0 for turn in sorted(turns, key=lambda turn: turn.late))


def save(path: Path, case: Case, rows: list[Row], dtype: torch.dtype, device: torch.device) -> None:
    import triton

    known = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__,
        "case": case.name, "model": case.model, "batch": case.batch, "size": case.size, "dtype": str(dtype)[6:],
    }  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        lines = [{**known, **row.to_dict()} for row in rows]
        writer = csv.DictWriter(file, lines[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="may be repeated")
    parser.add_argument("--scores", choices=SCORES, default="paper", help="scores of the tokens")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to time each way")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="do not time the fixed-rate merge")
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel of the graph engine")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, nothing saved")
    parser.add_argument("--patience", type=float, default=120, help="seconds that ready cases wait for the others")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    # without it, cuDNN's choice for the patch embedding (a convolution) can take as long as four blocks
    torch.backends.cudnn.benchmark = True
    dtype = torch.float32 if options.dry else torch.bfloat16
    wanted = options.case[-1:] if options.turn else options.case
    cases = [case for case in (DRY if options.dry else CASES) if not wanted or case.name in wanted]
    begin = time.time()
    if len(cases) > 1 and not options.dry:
        missed = in_turns(cases, sys.argv[1:], options.patience)
        print(f"\n{time.time() - begin:.0f} s; {missed} of {len(cases)} missed their target or failed")
        return missed
    missed = 0
    for case in cases:
        ratios = {row.way: row.ratio for row in measure(case, options, device, dtype)}
        for way, least in (("graph", case.target), ("auto", NEVER_SLOWER)):
            ratio = ratios.get(way)
            if least is not None and not options.dry and (ratio is None or ratio < least):
                print(f"missed: {way} {ratio} instead of {least}")
                missed = 1
    return missed


if __name__ == "__main__":
    sys.exit(main())
