"""Time and memory of a learning step, against a dense forward and backward to the embedded tokens on the same batch.

    python benchmarks/learning_step.py --batch 8
    python benchmarks/learning_step.py --batch 128 --device cuda --amp

Both run with frozen weights. The learning step is that of `ltmp.learn`: masked forward, task and budget loss, backward
to the thresholds. Memory is the peak of the step minus the memory in use before it; on a CPU it is measured in a
separate process, whose allocator returns large blocks at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from attach_overhead import interleaved
from torch import Tensor
from torch.nn import functional as F

import ltmp
from ltmp.learning import calibrate
from ltmp.learning.budget import budget_loss

TARGET = 0.6
STEPS = ("dense", "learning")


def make_step(which: str, args: argparse.Namespace) -> Callable[[], None]:
    """A step of either kind; both have the same weights, images and labels."""
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().requires_grad_(False).to(args.device)
    images = torch.randn(args.batch, *model.pretrained_cfg["input_size"], device=args.device)
    labels = torch.randint(model.num_classes, (args.batch,), device=args.device)
    model.set_grad_checkpointing(args.checkpointing)
    return _dense(model, images, labels, args) if which == "dense" else _learning(model, images, labels, args)


def _cast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(args.device, torch.bfloat16) if args.amp else nullcontext()


def _dense(model: Any, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    # backward goes down to the input of the first block
    model.norm_pre.register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_())

    def step() -> None:
        with _cast(args):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    return step


def _learning(model: Any, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    ltmp.attach(model)
    calibrate(model, images, TARGET)
    model.ltmp.requires_grad_(True).train()

    def step() -> None:
        with _cast(args), ltmp.record() as calls:
            logits = model(images)
        (F.cross_entropy(logits.float(), labels) + budget_loss(calls.share(), TARGET, 10.0)).backward()
        model.ltmp.zero_grad()

    return step


def peak_memory(step: Callable[[], None], device: str) -> int:
    """Bytes that the second call adds at its peak; the first one warms up."""
    step()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def memory_of(which: str, args: argparse.Namespace) -> int:
    """`peak_memory` in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", which]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward")
    parser.add_argument("--measure", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(peak_memory(make_step(args.measure, args), args.device))
        return
    memory = [memory_of(which, args) for which in STEPS]
    times = interleaved([make_step(which, args) for which in STEPS], args.repeats, args.device)
    seconds = [statistics.median(rounds) for rounds in times]
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.threads} threads, medians of {args.repeats} rounds")
    for which, s, m in zip(STEPS, seconds, memory, strict=True):
        print(f"{which:>9}: {1e3 * s:9.1f} ms  {m / 2**20:8.1f} MiB")
    ratio = statistics.median(learning / dense for dense, learning in zip(*times, strict=True))
    print(f"    ratio: {ratio:9.2f} (median over the rounds) {memory[1] / memory[0]:8.2f}")


if __name__ == "__main__":
    main()
