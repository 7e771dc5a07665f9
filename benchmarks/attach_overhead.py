"""Overhead of attaching: an attached model with all thresholds off against the same model without thresholds.

    python benchmarks/attach_overhead.py --model deit_small_patch16_224 --batch 1 8

Both are timed interleaved; prints the medians and the median ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch

import ltmp


def interleaved(calls: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each call in each round, interleaved so that a drift of the machine affects all calls alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(-2, repeats):
        for call, times in zip(calls, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ >= 0:
                times.append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = timm.create_model(args.model).eval().to(args.device)
    attached = ltmp.attach(copy.deepcopy(plain))
    print(f"{args.model}, {args.device}, {args.threads} threads, medians of {args.repeats} rounds")
    for batch in args.batch:
        images = torch.randn(batch, *plain.pretrained_cfg["input_size"], device=args.device)
        with torch.inference_mode():
            times = interleaved([lambda: plain(images), lambda: attached(images)], args.repeats, args.device)  # noqa: B023
        dense, off = (statistics.median(seconds) for seconds in times)
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        print(f"batch {batch}: dense {1e3 * dense:.2f} ms, attached {1e3 * off:.2f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
