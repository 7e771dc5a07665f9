"""A dense task on grids: which patch of a picture is which of another view of it? No training, no labels.

    python benchmarks/correspondence.py --weights vit.safetensors --learn learn.tar --threads 1

Photographs that scikit-image and scikit-learn ship are cut twice each time, at other places, in other sizes and
colours, and mirrored half of the time. Every patch of the first view that lies in the second looks for the most similar
patch there (cosine of the last features, head left out); it is right within 1.5 patches. Compared are the dense
backbone, thresholds of a dial that learned from its features alone (on --learn), the same model at lower resolution,
whose features are interpolated onto the grid, and fixed-rate merging. Shares of FLOPs are measured on the same views.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import ltmp
from export import photographs
from ltmp.data import read_image
from ltmp.engines.body import running
from ltmp.evaluate import tables
from ltmp.evaluate.baselines import at_resolution
from ltmp.evaluate.compare import rates_for
from ltmp.hosts.attach import attachment
from ltmp.zoo.build import build_model

FILES = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg",
                "data/motorcycle_left.png", "data/ihc.png", "data/retina.jpg", "data/hubble_deep_field.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}  # fmt: skip
NEAR = 1.5
"""Patches between the place that was found and the right one, at most."""

Features = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] to features [B, C, h, w]."""


def pictures() -> Iterator[Image.Image]:
    for package, names in FILES.items():
        found = find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"{package} is not installed: its photographs are looked at")
        for name in names:
            yield read_image(Path(found.origin).parent / name, "RGB")


def view(picture: Image.Image, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A part of a picture [3, size, size] in [0, 1], and where its pixels are: [left, top, scale, mirrored]."""
    side = min(picture.size) * draw.uniform(0.5, 0.9)
    left, top = (draw.uniform(0, whole - side) for whole in picture.size)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    mirrored = draw.random() < 0.5
    pixels = torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1).float() / 255
    pixels = (pixels - 0.5) * draw.uniform(0.7, 1.3) + 0.5 + draw.uniform(-0.1, 0.1)
    pixels = pixels * torch.from_numpy(draw.uniform(0.9, 1.1, (3, 1, 1))).float()
    place = torch.tensor([left, top, side / size, float(mirrored)])
    return (pixels.flip(-1) if mirrored else pixels).clamp(0, 1), place


def places(at: Tensor, size: int, patches: int) -> Tensor:
    """[patches^2, 2], where the middles of a view's patches are in its picture."""
    middle = (torch.arange(patches) + 0.5) * size / patches
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    x = size - x if at[3] else x
    return torch.stack([at[0] + x * at[2], at[1] + y * at[2]], -1).flatten(0, 1)


def right(ours: Tensor, theirs: Tensor, at: tuple[Tensor, Tensor], size: int) -> Tensor:
    """bool, whether each patch of the first view [C, h, h] that lies in the second one is found there."""
    patches = ours.shape[-1]
    one, other = (places(place, size, patches) for place in at)
    step = at[1][2] * size / patches
    low, high = other.amin(0) - step / 2, other.amax(0) + step / 2
    inside = ((one >= low) & (one <= high)).all(-1)
    a, b = (F.normalize(features.flatten(1), dim=0) for features in (ours, theirs))
    found = other[(a.T[inside] @ b).argmax(-1)]
    return (found - one[inside]).norm(dim=-1) <= NEAR * step


def grid_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, C, h, w] of tokens [B, N, C]."""
    patches = tokens[:, model.num_prefix_tokens :]
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def ways(model: nn.Module, images: Tensor, given: argparse.Namespace) -> Iterator[tuple[str, Features]]:
    """Every method at every setting, as what to call."""
    made = attachment(model)

    def plain(x: Tensor) -> Tensor:
        return grid_of(model, model.forward_features(x))

    def dense(x: Tensor) -> Tensor:
        with ltmp.dense():
            return plain(x)

    yield "dense", dense
    for share in given.shares:

        def ours(x: Tensor, share: float = share) -> Tensor:
            model.ltmp.set_budget(share)
            return plain(x)

        yield f"ltmp {share:g}", ours
    for share in given.shares:
        rates = rates_for(model, images[:1], "m", share)

        def fixed(x: Tensor, rates: Any = rates) -> Tensor:
            with running(body=replace(made.body, policy=rates)):
                return plain(x)

        yield f"fixed-rate merging {share:g}", fixed
    for size in given.sizes:
        smaller = at_resolution(model, size, images[:1])

        def shrunk(x: Tensor, smaller: Any = smaller) -> Tensor:
            small = grid_of(model, smaller.model.forward_features(x))
            return F.interpolate(small, model.patch_embed.grid_size, mode="bilinear")

        yield f"{size} pixels, share {smaller.share:.3f}", shrunk


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=200, help="of the checkpoint; its head is left out")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--learn", type=Path, required=True, help="images to learn the dial from")
    parser.add_argument("--calibration", type=int, default=256, help="how many of them")
    parser.add_argument("--scores", default="best")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[196, 182, 168, 154, 140])
    parser.add_argument("--views", type=int, default=20, help="pairs of views of each photograph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    model = build_model(
        given.model, weights=given.weights, num_classes=given.num_classes, image_size=given.img_size
    ).eval()
    model.reset_classifier(0)
    ltmp.attach(model, ltmp.LTMPConfig(scores=given.scores, tokens="grid"))
    learning = photographs(model, given.learn, given.calibration)
    ltmp.learn_dial(model, learning.split(32), min(given.shares) - 0.05, 0.9, views=0, knots=8)
    draw = np.random.default_rng(0)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    pairs = [
        [view(picture, given.img_size, draw) for _ in range(2)] for picture in pictures() for _ in range(given.views)
    ]
    first, second = (torch.stack([(pair[i][0] - mean) / std for pair in pairs]) for i in range(2))
    rows = []
    for name, features in ways(model, first, given):
        with torch.inference_mode(), ltmp.record() as calls:
            ours, theirs = (torch.cat([features(part) for part in views.split(32)]) for views in (first, second))
        found = [
            right(a, b, (one[1], other[1]), given.img_size)
            for a, b, (one, other) in zip(ours, theirs, pairs, strict=True)
        ]
        share = float(calls.share().mean()) if calls.kept else None
        each = torch.stack([found_there.float().mean() for found_there in found if len(found_there)])
        rows.append({"way": name, "share": share, "right": 100 * float(each.mean()),
                     "error": 100 * float(each.std() / len(each) ** 0.5)})  # fmt: skip
        print(
            f"{name:40} {'' if share is None else f'{share:.3f}':6} {rows[-1]['right']:.1f} +- {rows[-1]['error']:.1f}"
        )
    if given.json:
        tables.write_json({"pairs": len(pairs), "rows": rows}, given.json)


if __name__ == "__main__":
    main()
