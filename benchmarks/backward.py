"""Training steps of a model whose thresholds are fixed: what is left of their cost, in turns with the dense model.

    python benchmarks/backward.py --threads 2
    python benchmarks/backward.py --threads 2 --model deit_small_patch16_224 --batch 16

A step is forward, cross-entropy, backward and SGD on all weights, in train mode. Weights are random; thresholds are
calibrated on smooth random images, and every step gets other images. Both models start each round from equal weights.
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
    """A training step of one model."""

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
    parser.add_argument("--every", type=int, default=1, help="of how many blocks one removes tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    plain = timm.create_model(given.model)
    images = smooth_images(4 * given.batch, plain.patch_embed.img_size[0])
    print(f"{given.model}, batch {given.batch}, {given.threads} threads of {processor()}, torch {torch.__version__}")
    for target in given.targets:
        reduced = ltmp.attach(copy.deepcopy(plain).eval())
        calibrate(reduced, images[: min(64, len(images))], target, given.every)
        with ltmp.record() as calls, torch.no_grad():
            reduced(images)
        share = float(calls.share().mean())
        steps = {"dense": Step(copy.deepcopy(plain)), "reduced": Step(reduced)}
        batches = cycle(images.split(given.batch))
        wall, used = [], []
        for _ in range(given.rounds + 1):
            part = next(batches)
            slow, fast = (elapsed(step, part) for step in steps.values())
            wall.append(slow[0] / fast[0])
            used.append(slow[1] / fast[1])
        ratios = f"ratio {median(wall[1:]):.2f}, of processor time {median(used[1:]):.2f}"
        print(f"share {share:.3f}, ideal {1 / share:.2f}: a training step's {ratios}", flush=True)


if __name__ == "__main__":
    main()
