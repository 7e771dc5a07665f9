"""Dense tasks on grids of patches: reduced against dense, lower resolution and fixed-rate merging.

    python benchmarks/dense_tasks.py --weights vit.safetensors --threads 1

Both are made of the photographs that scikit-image and scikit-learn ship, and of the last features, head left out.

- Segmentation: collages of pieces of ten photographs; which photograph is each patch of? A linear classifier is fitted
  to dense features of some collages and judges those of others, cut from the other halves of the photographs: mean
  intersection over union, in %.
- Correspondence: two views of a photograph, cut at other places, in other sizes and colours, half of them mirrored.
  Every patch of the first that lies in the second looks for the most similar one there: % found within 1.5 patches.

Thresholds are those of a dial that learned from the backbone's features of the collages that the classifier is fitted
to, without labels. At lower resolution features are interpolated onto the grid. Shares of FLOPs are those of the
collages that are judged.
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
    similar = a.T[inside] @ b
    # patches that are one token are alike: the middle of them is meant
    best = (similar >= similar.amax(-1, keepdim=True) - 1e-6).float()
    found = best @ other / best.sum(-1, keepdim=True)
    return (found - one[inside]).norm(dim=-1) <= NEAR * step


class Collages:
    """Pieces of photographs [N, 3, size, size] in [0, 1], and the photograph that each patch is of: int64 [N, h, h].

    Args:
        half: of each photograph that pieces come from, 0 or 1.
    """

    def __init__(self, count: int, size: int, patches: int, half: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        whole = [*pictures()]
        sides = [(0, half * p.height // 2, p.width, (half + 1) * p.height // 2) for p in whole]
        parts = [p.crop(side) for p, side in zip(whole, sides, strict=True)]
        made = [self._made(parts, size, draw) for _ in range(count)]
        self.images = torch.stack([image for image, _ in made])
        owners = torch.stack([owner for _, owner in made])
        # the photograph of most of a patch
        votes = F.one_hot(owners, len(parts)).permute(0, 3, 1, 2).float()
        self.labels = F.adaptive_avg_pool2d(votes, patches).argmax(1)

    @staticmethod
    def _made(parts: list[Image.Image], size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = draw.choice(len(parts), 5, replace=False)
        # every pixel belongs to the nearest of five points
        points = torch.from_numpy(draw.uniform(0, size, (5, 2))).float()
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        nearest = (torch.stack([y, x], -1).float()[:, :, None] - points).norm(dim=-1).argmin(-1)
        layers = torch.stack([view(parts[i], size, draw)[0] for i in chosen])
        image = layers.gather(0, nearest[None, None].expand(1, 3, -1, -1))[0]
        return image, torch.from_numpy(chosen)[nearest]


def classifier(features: Tensor, labels: Tensor) -> Tensor:
    """[C + 1, K], ridge regression from features [N, C, h, h] to one-hot labels."""
    x, y = flat(features).double(), F.one_hot(labels.flatten()).double()
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()


def flat(features: Tensor) -> Tensor:
    """[N * h * h, C + 1], normed, and a column of ones."""
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    return F.pad(F.normalize(x, dim=1) * x.shape[1] ** 0.5, (0, 1), value=1.0)


def overlap(found: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes, in %."""
    classes = range(int(labels.max()) + 1)
    each = [float(((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum()) for k in classes]
    return 100 * sum(each) / len(each)


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

        yield f"{given.variant} {share:g}", ours
    for share in given.shares:
        rates = rates_for(model, images[:1], "m", share)

        def fixed(x: Tensor, rates: Any = rates) -> Tensor:
            with running(body=replace(made.body, policy=rates)), ltmp.unmerge():
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
    parser.add_argument("--scores", default="best")
    parser.add_argument("--variant", default="ltmp", help="ltm merges only")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[196, 182, 168, 154, 140])
    parser.add_argument("--views", type=int, default=20, help="pairs of views of each photograph")
    parser.add_argument("--collages", type=int, default=128, help="to fit the classifier to, and again to judge it on")
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
    ltmp.attach(model, ltmp.LTMPConfig(given.variant, scores=given.scores, tokens="grid", engine="packed"))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    size, patches, draw = given.img_size, model.patch_embed.grid_size[0], np.random.default_rng(0)
    pairs = [[view(picture, size, draw) for _ in range(2)] for picture in pictures() for _ in range(given.views)]
    at = [(one[1], other[1]) for one, other in pairs]
    first, second = (torch.stack([(pair[i][0] - mean) / std for pair in pairs]) for i in range(2))
    fitted, judged = (Collages(given.collages, size, patches, half, half) for half in range(2))
    learning = ((fitted.images - mean) / std).split(32)
    ltmp.learn_dial(model, learning, min(given.shares) - 0.05, 0.9, views=0, knots=8, calibration=given.collages)
    rows, linear = [], None
    for name, features in ways(model, first, given):

        def read(images: Tensor, features: Features = features) -> Tensor:
            with torch.inference_mode():
                return torch.cat([features(part) for part in images.split(32)])

        # the dense model comes first
        linear = classifier(read((fitted.images - mean) / std), fitted.labels) if linear is None else linear
        with ltmp.record() as calls:
            found = flat(read((judged.images - mean) / std))
        segmented = overlap((found @ linear).argmax(1), judged.labels.flatten())
        each = [right(*both, places, size) for *both, places in zip(read(first), read(second), at, strict=True)]
        matched = 100 * float(torch.stack([there.float().mean() for there in each if len(there)]).mean())
        share = float(calls.share().mean()) if calls.kept else None
        rows.append({"way": name, "share": share, "mIoU": segmented, "matched": matched})
        print(f"{name:32} {'' if share is None else f'{share:.3f}':6} {segmented:.1f} {matched:.1f}", flush=True)
    if given.json:
        tables.write_json({"collages": given.collages, "pairs": len(pairs), "rows": rows}, given.json)


if __name__ == "__main__":
    main()
