"""Segmentation and correspondence on grids of patches: reduced, dense, lower resolution and fixed-rate merging.

    python benchmarks/dense_tasks.py --weights vit.safetensors --threads 1

Both tasks use the photographs shipped with scikit-image and scikit-learn, and the features before the head.

- Segmentation: in collages of pieces of ten photographs, predict the photograph that each patch comes from. A linear
  classifier is fitted to dense features of some collages and evaluated on others, cut from the other halves of the
  photographs: mean intersection over union, in %.
- Correspondence: two views of a photograph differ in position, size and colour, and half of the views are mirrored. For
  each patch of the first view that lies in the second, find the most similar patch there: % within 1.5 patches of the
  correct place.

The dial is learned without labels, from the backbone's features of the collages that the classifier is fitted to. At
lower resolution, features are interpolated to the original grid. FLOPs shares are measured on the evaluated collages.
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
"""Largest distance in patches between the predicted and the correct place of a match."""

Features = Callable[[Tensor], Tensor]
"""From images [B, 3, S, S] to features [B, C, h, w]."""


def pictures() -> Iterator[Image.Image]:
    for package, names in FILES.items():
        found = find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"{package} is not installed: this benchmark uses its photographs")
        for name in names:
            yield read_image(Path(found.origin).parent / name, "RGB")


def view(picture: Image.Image, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop [3, size, size] in [0, 1] of a picture, and its place: [left, top, scale, mirrored]."""
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
    """[patches^2, 2], the centres of a view's patches in the coordinates of its picture."""
    middle = (torch.arange(patches) + 0.5) * size / patches
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    x = size - x if at[3] else x
    return torch.stack([at[0] + x * at[2], at[1] + y * at[2]], -1).flatten(0, 1)


def right(ours: Tensor, theirs: Tensor, at: tuple[Tensor, Tensor], size: int) -> Tensor:
    """bool, whether each patch of the first view [C, h, h] that lies in the second one is matched correctly."""
    patches = ours.shape[-1]
    one, other = (places(place, size, patches) for place in at)
    step = at[1][2] * size / patches
    low, high = other.amin(0) - step / 2, other.amax(0) + step / 2
    inside = ((one >= low) & (one <= high)).all(-1)
    a, b = (F.normalize(features.flatten(1), dim=0) for features in (ours, theirs))
    similar = a.T[inside] @ b
    # patches of one token have equal features: their mean position is the match
    best = (similar >= similar.amax(-1, keepdim=True) - 1e-6).float()
    matched = best @ other / best.sum(-1, keepdim=True)
    return (matched - one[inside]).norm(dim=-1) <= NEAR * step


class Collages:
    """Collages `images` [N, 3, size, size] in [0, 1], and `labels` int64 [N, h, h], the photograph of each patch.

    Args:
        half: the half of each photograph that pieces are cut from, 0 (top) or 1 (bottom).
    """

    def __init__(self, count: int, size: int, patches: int, half: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        parts = [p.crop((0, half * p.height // 2, p.width, (half + 1) * p.height // 2)) for p in pictures()]
        collages = [self._collage(parts, size, draw) for _ in range(count)]
        self.images = torch.stack([image for image, _ in collages])
        owners = torch.stack([owner for _, owner in collages])
        # the photograph that covers most of a patch
        votes = F.one_hot(owners, len(parts)).permute(0, 3, 1, 2).float()
        self.labels = F.adaptive_avg_pool2d(votes, patches).argmax(1)

    @staticmethod
    def _collage(parts: list[Image.Image], size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = draw.choice(len(parts), 5, replace=False)
        # five photographs, and each pixel is of the one whose random point is nearest
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
    """[N * h * h, C + 1], normalised features and a column of ones."""
    x = features.permute(0, 2, 3, 1).flatten(0, 2)
    return F.pad(F.normalize(x, dim=1) * x.shape[1] ** 0.5, (0, 1), value=1.0)


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean intersection over union of the classes, in %."""
    ious = []
    for k in range(int(labels.max()) + 1):
        a, b = predicted == k, labels == k
        ious.append(float((a & b).sum() / (a | b).sum()))
    return 100 * sum(ious) / len(ious)


def grid_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The patch tokens of [B, N, C] as [B, C, h, w]."""
    patches = tokens[:, model.num_prefix_tokens :]
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def ways(model: nn.Module, images: Tensor, args: argparse.Namespace) -> Iterator[tuple[str, Features]]:
    """Name and feature function of every method at every setting."""
    attached = attachment(model)

    def plain(x: Tensor) -> Tensor:
        return grid_of(model, model.forward_features(x))

    def dense(x: Tensor) -> Tensor:
        with ltmp.dense():
            return plain(x)

    yield "dense", dense
    for share in args.shares:

        def ours(x: Tensor, share: float = share) -> Tensor:
            model.ltmp.set_budget(share)
            return plain(x)

        yield f"{args.variant} {share:g}", ours
    for share in args.shares:
        rates = rates_for(model, images[:1], "m", share)

        def fixed(x: Tensor, rates: Any = rates) -> Tensor:
            with running(body=replace(attached.body, policy=rates)), ltmp.unmerge():
                return plain(x)

        yield f"fixed-rate merging {share:g}", fixed
    for size in args.sizes:
        smaller = at_resolution(model, size, images[:1])

        def shrunk(x: Tensor, smaller: Any = smaller) -> Tensor:
            small = grid_of(model, smaller.model.forward_features(x))
            return F.interpolate(small, model.patch_embed.grid_size, mode="bilinear")

        yield f"{size} pixels, share {smaller.share:.3f}", shrunk


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=200, help="of the checkpoint, whose head is not used")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--scores", default="best")
    parser.add_argument("--variant", default="ltmp", help="ltmp, or e.g. ltm to merge only")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[196, 182, 168, 154, 140])
    parser.add_argument("--views", type=int, default=20, help="pairs of views of each photograph")
    parser.add_argument("--collages", type=int, default=128, help="number of collages to fit, and to evaluate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.model, weights=args.weights, num_classes=args.num_classes, image_size=args.img_size).eval()
    model.reset_classifier(0)
    ltmp.attach(model, ltmp.LTMPConfig(args.variant, scores=args.scores, tokens="grid", engine="packed"))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    size, patches, draw = args.img_size, model.patch_embed.grid_size[0], np.random.default_rng(0)
    pairs = [[view(picture, size, draw) for _ in range(2)] for picture in pictures() for _ in range(args.views)]
    at = [(one[1], other[1]) for one, other in pairs]
    first, second = (torch.stack([(pair[i][0] - mean) / std for pair in pairs]) for i in range(2))
    fitted, tested = (Collages(args.collages, size, patches, half, half) for half in range(2))
    learning = ((fitted.images - mean) / std).split(32)
    ltmp.learn_dial(model, learning, min(args.shares) - 0.05, 0.9, views=0, knots=8, calibration=args.collages)
    rows, linear = [], None
    for name, features in ways(model, first, args):

        def compute(images: Tensor, features: Features = features) -> Tensor:
            with torch.inference_mode():
                return torch.cat([features(part) for part in images.split(32)])

        # the dense model comes first
        linear = classifier(compute((fitted.images - mean) / std), fitted.labels) if linear is None else linear
        with ltmp.record() as calls:
            x = flat(compute((tested.images - mean) / std))
        segmented = mean_iou((x @ linear).argmax(1), tested.labels.flatten())
        correct = [
            right(one, other, place, size)
            for one, other, place in zip(compute(first), compute(second), at, strict=True)
        ]
        matched = 100 * float(torch.stack([pair.float().mean() for pair in correct if len(pair)]).mean())
        share = float(calls.share().mean()) if calls.kept else None
        rows.append({"way": name, "share": share, "mIoU": segmented, "matched": matched})
        print(f"{name:32} {'' if share is None else f'{share:.3f}':6} {segmented:.1f} {matched:.1f}", flush=True)
    if args.json:
        tables.write_json({"collages": args.collages, "pairs": len(pairs), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
