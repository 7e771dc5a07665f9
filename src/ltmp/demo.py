"""The method in a few minutes on a laptop: train a small ViT on digits, learn three budgets, draw the results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from . import attach, learn, pack, save
from .data import Loader, load_digits, make_loader
from .data.embedded import CLASSES, MEAN, STD
from .deploy import Deployment
from .evaluate import Evaluation, describe_machine, tables
from .files import atomic_path
from .files.tensors import write_tensors
from .report import Budget, Report, evaluate_budget, write_report
from .report.gallery import with_left
from .sanitize import printable
from .visualize import paint_groups, plot_tradeoff, see
from .visualize.curves import new_figure, save_figure
from .zoo.build import load_weights

Progress = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]

TARGETS = (0.75, 0.6, 0.5)
# 196 patches and a class token: as many tokens as DeiT has at 224 pixels
SIZE, PATCH = 28, 2
BLANK = -MEAN / STD
"""A black pixel, normalised."""

TRAINED = "vit.safetensors"
"""File of the trained model."""

NAME = "vit_tiny_patch16_224"
"""The timm model that becomes the demo's with the arguments of `Setup.shape`."""

DATA_OPTIONS: dict[str, Any] = {"mean": (MEAN,), "std": (STD,), "crop_pct": 1.0, "interpolation": "bicubic"}
"""Preprocessing of the digits."""

BUNDLE, DIGITS = "bundle", "digits"
"""Folders in the output: what `ltmp.pack` writes, and pictures to try it on."""


@dataclass(frozen=True)
class Setup:
    """How the demo's ViT is trained and its thresholds are learned; the defaults take minutes on two cores.

    Most of the training runs at half the resolution, with a quarter of the tokens.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    batch: int = 64
    small_epochs: float = 10
    small_lr: float = 1e-2
    full_epochs: float = 0.75
    full_lr: float = 3e-3
    views: int = 800
    calibration: int = 256
    val_images: int = 1000

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments that turn timm's `NAME` into the demo's model."""
        return {
            "patch_size": PATCH, "in_chans": 1, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads,
        }  # fmt: skip


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    progress: Progress,
    setup: Setup | None = None,
    targets: tuple[float, ...] = TARGETS,
) -> dict[float, Evaluation]:
    """Run the demo and write a table, a plot, pictures, the model and its thresholds to `out`.

    Args:
        out: folder; a model that was trained there before is reused.
        seed: of the training and the order of the images.
        progress: makes a progress bar from a text and a total; see `ltmp.cli.progress`.
        setup: what to train, and for how long.
        targets: FLOPs shares to learn.

    Returns:
        The evaluation at each target.

    Raises:
        MissingExtraError: mlxtend or matplotlib is not installed.
        LTMPError: the folder cannot be written.
    """
    setup = setup or Setup()
    new_figure(1, 1)  # fails now, and not after minutes of training, if matplotlib is missing
    model = trained_model(out / TRAINED, setup, seed, progress)
    val = torch.utils.data.Subset(load_digits("val"), range(setup.val_images))
    budgets, pictures = {}, [_sample_pictures(val)]
    for target in targets:
        attach(model)
        learn_target(model, target, setup, seed, progress)
        with progress(f"evaluating at {target:g}", len(val)) as advance:
            budgets[target] = evaluate_budget(model, make_loader(val, 100), f"target {target:g}", progress=advance)
        budgets[target] = with_left(Deployment(model, options=DATA_OPTIONS), budgets[target], partial(_picture, val))
        evaluation = budgets[target].evaluation
        about = {"target": target, "share": evaluation.share, "top1": evaluation.top1}
        save(model, out / f"thresholds-{target:g}.safetensors", **about)
        if target == sorted(targets)[len(targets) // 2]:
            _write_bundle(model, out, setup, val, about)
        pictures.append(survivors(model, val))
    evaluations = {target: budget.evaluation for target, budget in budgets.items()}
    _write_results(out, evaluations)
    _write_page(out / "report.html", list(budgets.values()), val)
    draw_survivors(pictures, ["image", *(f"share {t:g}" for t in targets)], out / "patches.png")
    return evaluations


def trained_model(path: Path, setup: Setup, seed: int, progress: Progress) -> VisionTransformer:
    """Return the demo's ViT in evaluation mode: loaded from `path`, or trained and saved there."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIZE,
        num_classes=10,
        # timm's default suits widths of hundreds; a model this narrow would hardly train with it
        weight_init="jax",
        **setup.shape,
    )
    if path.exists():
        load_weights(model, path)
        return model.eval()
    loader = make_loader(load_digits("train"), setup.batch, shuffle=True, seed=seed)
    for size, epochs, lr in (
        (SIZE // 2, setup.small_epochs, setup.small_lr),
        (SIZE, setup.full_epochs, setup.full_lr),
    ):
        train(model, loader, size, epochs, lr, progress, distort)
    write_tensors(model.state_dict(), path, {"format": "pt"})
    return model.eval()


def train(
    model: VisionTransformer,
    loader: Loader,
    size: int,
    epochs: float,
    lr: float,
    progress: Progress,
    augment: Callable[[Tensor], Tensor],
) -> None:
    """Train a small ViT on images that are augmented and then shrunk to `size` x `size` pixels, its new input size.

    Args:
        loader: shuffled images with labels.
        epochs: may be fractional.
        lr: peak learning rate of Muon, reached after a fifth of the steps.
    """
    model.set_input_size((size, size))
    steps = max(2, round(epochs * loader.images / loader.batch_size))
    optimizer = create_optimizer_v2(model, opt="muon", lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.2 * steps), (1 - step / steps) / 0.8)
    )
    model.train()
    with progress(f"training at {size}x{size} pixels", steps) as advance:
        for images, labels in loader.stream(0, steps * loader.batch_size):
            images = F.interpolate(augment(images), size, mode="area")
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, f"training at {size}x{size} pixels, loss {loss.item():.2f}")


def distort(images: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each digit of [B, 1, H, W] slightly, at random."""
    count = len(images)
    turn, scale, slant, across, down = (torch.rand(5, count) - 0.5) * torch.tensor([0.35, 0.2, 0.28, 0.18, 0.18])[
        :, None
    ]
    cos, sin, scale = turn.cos(), turn.sin(), 1 + scale
    matrix = torch.stack([cos * scale, slant - sin, across, sin, cos * scale, down], 1).reshape(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - BLANK, grid, align_corners=False) + BLANK


def learn_target(model: VisionTransformer, target: float, setup: Setup, seed: int, progress: Progress) -> None:
    """Learn thresholds of the attached model on digits that it is neither trained nor evaluated on."""
    loader = make_loader(load_digits("learn"), 50, shuffle=True, seed=seed)
    steps = max(1, round(setup.views / loader.batch_size))
    with progress(f"learning share {target:g}", steps) as advance:
        learn(
            model,
            loader,
            target,
            views=setup.views,
            calibration=setup.calibration,
            seed=seed,
            progress=False,
            on_step=lambda step: advance(1, f"learning share {target:g}, now {step.share:.3f}"),
        )


def survivors(model: VisionTransformer, digits: Any) -> list[Tensor]:
    """Return one digit of each class, painted by the tokens that enter the last block.

    After the last block's attention only the class token is used, so the tokens left there mean nothing.
    """
    return [
        paint_groups(image, view.groups[-2], (8 * SIZE, 8 * SIZE))
        for image, view in zip(_sample_pictures(digits), see(model, _sample_images(digits)), strict=True)
    ]


def _write_bundle(
    model: VisionTransformer, out: Path, setup: Setup, digits: Any, about: dict[str, float | None]
) -> None:
    """Write the model with its thresholds in one folder, and a digit of each class to try it on."""
    metadata = {"model_name": NAME, "model_kwargs": setup.shape, "class_names": CLASSES, "preprocessing": DATA_OPTIONS}
    pack(model, out / BUNDLE, **metadata, **about)
    for name, image in zip(CLASSES, _sample_pictures(digits), strict=True):
        with atomic_path(out / DIGITS / f"{name}.png") as temporary:
            to_pil_image(image).save(temporary, "PNG")


def draw_survivors(columns: list[list[Tensor]], titles: list[str], path: Path) -> None:
    """Draw a picture with a row for each digit and a column for each budget."""
    figure, axes = new_figure(len(columns[0]), len(columns))
    for j, (column, title) in enumerate(zip(columns, titles, strict=True)):
        axes[0, j].set_title(title, fontsize=9)
        for i, image in enumerate(column):
            axes[i, j].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axes[i, j].axis("off")
    figure.suptitle("one flat colour: merged; hatched: pruned", fontsize=9)
    save_figure(figure, path)


def _sample_images(digits: Any) -> Tensor:
    """The first image of each class, [10, 1, H, W]."""
    first: dict[int, Tensor] = {}
    for image, label in digits:
        first.setdefault(int(label), image)
    return torch.stack([first[label] for label in sorted(first)])


def _sample_pictures(digits: Any) -> list[Tensor]:
    """The first image of each class for display, [3, H, W] in [0, 1] each."""
    return list((_sample_images(digits) * STD + MEAN).clamp(0, 1).expand(-1, 3, -1, -1))


def _picture(digits: Any, index: int) -> Image.Image:
    """A digit as a PIL image."""
    return to_pil_image((digits[index][0] * STD + MEAN).clamp(0, 1))


def _write_page(path: Path, budgets: list[Budget], digits: Any) -> None:
    data = f"{len(digits)} MNIST digits that were used neither for training nor for learning the thresholds"
    page = Report(
        "The demo: a small ViT on digits",
        budgets,
        classes=CLASSES,
        picture=partial(_picture, digits),
        image_name="digit {}".format,
        settings={"data": data, **describe_machine()},
    )
    write_report(page, path)


def _write_results(out: Path, evaluations: dict[float, Evaluation]) -> None:
    rows: list[tables.Row] = []
    for target, evaluation in evaluations.items():
        dense, reduced = tables.comparison(evaluation, name=f"target {target:g}")
        rows += [reduced] if rows else [dense, reduced]
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(tables.markdown(rows), encoding="utf-8")
    results = {f"{target:g}": tables.as_json(evaluation) for target, evaluation in evaluations.items()}
    tables.write_json(results, out / "table.json")
    dense_top1 = next(iter(evaluations.values())).dense_top1 or 0.0
    plot_tradeoff(
        [1.0, *(evaluation.share for evaluation in evaluations.values())],
        [dense_top1, *(evaluation.top1 or 0.0 for evaluation in evaluations.values())],
        out / "accuracy.png",
        title="Digits: accuracy against compute",
    )
    tables.show(rows, "dense against reduced (top-1, top-5, agree in %)")
    slower = [
        f"{target:g}"
        for target, evaluation in evaluations.items()
        if evaluation.throughput and evaluation.throughput.speedup < 1
    ]
    if slower:
        print(
            f"Slower than dense at {', '.join(slower)}: in a ViT this small, selecting tokens costs much of what it "
            "saves. Larger models gain more: `ltmp bench`."
        )
    for name, description in {
        "report.html": "all results on one page",
        "table.md": "this table (and table.json)",
        "accuracy.png": "accuracy against compute",
        "patches.png": "which patches survived",
        TRAINED: "the trained model, reused next time",
        BUNDLE: f"model and thresholds for all commands; {DIGITS}: pictures to try them on",
    }.items():
        print(printable(f"{out / name}: {description}"))
