"""Speed of training steps of a model with fixed thresholds, interleaved with those of the dense model.

    python benchmarks/backward.py --threads 2
    python benchmarks/backward.py --threads 2 --model deit_small_patch16_224 --batch 16

A step is forward, cross-entropy, backward and SGD on all weights, in train mode. Weights are random, the same for both
models at first; thresholds are calibrated on smooth random images. Each round uses another batch.
"""

from __future__ import annotations

import argparse
import copy
from itertools import cycle
from statistics import median

import timm
import torch
from cpu import elapsed, processor, smooth_images
from torch import Tensor, nn
from torch.nn import functional as F

import ltmp
from ltmp.learning import calibrate


class Step:
    """A training step of one model, with its optimiser."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-5)

    def __call__(self, images: Tensor) -> None:
        labels = torch.zeros(len(images), dtype=torch.long)
        self.optimiser.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.56])
    parser.add_argument("--every", type=int, default=1, help="one of this many blocks removes tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = timm.create_model(args.model)
    images = smooth_images(4 * args.batch, plain.patch_embed.img_size[0])
    print(f"{args.model}, batch {args.batch}, {args.threads} threads of {processor()}, torch {torch.__version__}")
    for target in args.targets:
        reduced = ltmp.attach(copy.deepcopy(plain).eval())
        calibrate(reduced, images[: min(64, len(images))], target, args.every)
        with ltmp.record() as calls, torch.no_grad():
            reduced(images)
        share = float(calls.share().mean())
        steps = {"dense": Step(copy.deepcopy(plain)), "reduced": Step(reduced)}
        batches = cycle(images.split(args.batch))
        wall, cpu = [], []
        for _ in range(args.rounds + 1):
            batch = next(batches)
            dense, fast = (elapsed(step, batch) for step in steps.values())
            wall.append(dense[0] / fast[0])
            cpu.append(dense[1] / fast[1])
        ratios = f"ratio {median(wall[1:]):.2f}, of processor time {median(cpu[1:]):.2f}"
        print(f"share {share:.3f}, ideal {1 / share:.2f}: a training step's {ratios}", flush=True)


if __name__ == "__main__":
    main()
