"""A vision tower of Qwen3-VL's size on a CPU, reduced to a grid: time against dense, and the part taken by decisions.

    python benchmarks/tower.py --patches 1024 4096 --depth 4 --threads 2

Weights are random and the depth is cut. Thresholds are calibrated to the share on one smooth random image; times are
medians of paired, interleaved rounds on other images. A row is printed only if another engine gives the same token
counts and the same grid within 1e-4 of its largest value: the masked reference up to 1,024 patches, plans in plain
torch beyond (masks would take gigabytes). `plans` is the part of the reduced processor time that is spent on scores,
matching, decisions and folding, without attention and the quantities that attention computes for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import thread_time
from unittest.mock import patch

import torch
from cpu import elapsed, processor, random_probe, smooth_images
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import ltmp
from ltmp.config import SCORES
from ltmp.engines import compiled
from ltmp.learning import calibrate

PATCH, FRAMES, UNIT = 16, 2, 2
MASKED = 1024
"""Largest number of patches for which the masked reference is run."""


class Tower(nn.Module):
    """The tower, from images [B, 3, H, W] to the grid after its blocks."""

    def __init__(self, depth: int, hidden: int, heads: int) -> None:
        super().__init__()
        config = Qwen3VLVisionConfig(
            depth=depth, hidden_size=hidden, num_heads=heads, deepstack_visual_indexes=[depth // 2],
            intermediate_size=int(hidden * 4304 / 1152), attn_implementation="sdpa",
        )  # fmt: skip
        self.tower = Qwen3VLVisionModel(config)

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        high, wide = height // PATCH, width // PATCH
        # ordered by squares of patches, as from the model's processor
        grid = images.reshape(count, 3, high // UNIT, UNIT, PATCH, wide // UNIT, UNIT, PATCH)
        patches = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count * high * wide, 3, 1, PATCH, PATCH)
        pixels = patches.expand(-1, -1, FRAMES, -1, -1).flatten(1)
        sizes = torch.tensor([[1, high, wide]] * count)
        grid_features: Tensor = self.tower(pixels, grid_thw=sizes).last_hidden_state
        return grid_features


class Timed:
    """Wraps a function and adds up its processor time."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object) -> object:
        begin = thread_time()
        result = self.function(*args)
        self.seconds += thread_time() - begin
        return result


def check(model: Tower, images: Tensor, masked: bool) -> float:
    """Mean FLOPs share of `images`, after checking that two engines agree."""
    with ltmp.record() as calls:
        grid = model(images)
        model.tower.ltmp.train(masked).requires_grad_(masked)
        with nullcontext() if masked else patch.object(compiled, "applies", return_value=False):
            expected = model(images)
        model.tower.ltmp.eval().requires_grad_(False)
    if not torch.equal(*calls.kept) or (grid - expected).abs().max() > 1e-4 * expected.abs().max():
        raise SystemExit("two engines disagree: no speed is reported")
    return float(calls.share().mean())


def row(model: Tower, patches: int, target: float, rounds: int) -> dict[str, object]:
    """Calibrate, check and time at this many patches."""
    side = PATCH * round(patches**0.5)
    images = smooth_images(4, side)
    calibrate(model, images[:1], target)
    share = check(model, images[1:2], masked=patches <= MASKED)
    wall, used, part = [], [], []
    for turn in range(rounds + 1):
        image = images[1 + turn % 3 : 2 + turn % 3]
        with ltmp.dense():
            dense = elapsed(model, image)
        with patch.object(compiled, "reduce_rows", Timed(compiled.reduce_rows)) as plans:
            reduced = elapsed(model, image)
        wall.append((dense[0], reduced[0]))
        used.append((dense[1], reduced[1]))
        part.append(plans.seconds / reduced[1])

    def ratio(times: list[tuple[float, float]]) -> float:
        return median(a / b for a, b in times[1:])

    return {
        "patches": patches, "share": share, "ideal": 1 / share, "ratio": ratio(wall),
        "ratio of processor time": ratio(used), "plans": median(part[1:]),
        "dense s": median(a for a, _ in wall[1:]), "reduced s": median(b for _, b in wall[1:]),
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[1024, 4096], help="patches of a square image")
    parser.add_argument("--depth", type=int, default=4, help="blocks; the model has 27")
    parser.add_argument("--hidden", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--scores", choices=SCORES, default="paper")
    parser.add_argument("--target", type=float, default=0.5, help="share of the dense FLOPs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args, rows = parse_args(), []
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Tower(args.depth, args.hidden, args.heads).eval()
    ltmp.attach(model.tower, ltmp.LTMPConfig(engine="packed", scores=args.scores))
    if model.tower.ltmp.config.needs_probe:
        model.tower.ltmp.set_probe(random_probe(args.depth, args.hidden))
    if not args.json:
        print(f"{args.depth} blocks, {args.scores} scores, {args.threads} threads of {processor()}")
    for patches in args.patches:
        rows.append(row(model, patches, args.target, args.rounds))
        if not args.json:
            print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    if args.json:
        print(json.dumps({"processor": processor(), "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
