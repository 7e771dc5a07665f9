"""Accuracy, agreement with the dense model and FLOPs share, on the deployed model and real batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn

from ..distributed import exchange, merge, my_batches, rank
from ..errors import LTMPError
from ..flops import flops_share
from ..models import is_attached
from ..models.outputs import logits_of
from ..stack import dense, record
from .throughput import Throughput, measure

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured on `images` images; accuracies and agreement in percent, None where there are no labels.

    Attributes:
        share: mean over images of the FLOPs share; `share_std`, `share_min` and `share_max` are its spread.
        kept: mean tokens after each block, [L].
        tokens: tokens that enter the first block, class token included.
        agreement: how often the reduced model's first choice is the dense model's.
        skipped: images that could not be read.
        throughput: images per second, dense and reduced.
    """

    images: int
    top1: float | None
    top5: float | None
    dense_top1: float | None
    dense_top5: float | None
    agreement: float
    share: float
    share_std: float
    share_min: float
    share_max: float
    tokens: int
    kept: list[float]
    skipped: int = 0
    throughput: Throughput | None = None


@dataclass(frozen=True)
class ImageRows:
    """What became of each image of a batch, a row an image, on the CPU.

    Attributes:
        label: int64 [B], -1 where there is none.
        dense, reduced: int64 [B], the first choice of each model.
        share: [B], FLOPs share.
        kept: [B, L], tokens after each block.
    """

    label: Tensor
    dense: Tensor
    reduced: Tensor
    share: Tensor
    kept: Tensor


@dataclass
class _Choices:
    """Running counts of right answers."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count a batch, logits [B, K] and labels [B] (-1: none); returns the first choices [B]."""
        choices = logits.topk(min(5, logits.shape[-1]), -1).indices
        right = choices == labels[:, None]
        self.images += len(labels)
        self.labelled += int((labels >= 0).sum())
        self.top1 += int(right[:, 0].sum())
        self.top5 += int(right.sum())
        return choices[:, 0]

    def percent(self, right: int) -> float | None:
        return 100 * right / self.labelled if self.labelled else None


@dataclass
class _Part:
    """What one rank finds on its images.

    Attributes:
        skipped: images that could not be read, and why.
        share: float64 [B] of each batch; kept: float64 [L] of each batch, summed over its images.
    """

    skipped: dict[str, str]
    reduced: _Choices = field(default_factory=_Choices)
    plain: _Choices = field(default_factory=_Choices)
    agreed: int = 0
    tokens: int = 0
    share: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    throughput: Throughput | None = None

    def add(self, rows: ImageRows, tokens: int) -> None:
        self.agreed += int((rows.dense == rows.reduced).sum())
        self.tokens = tokens
        self.share.append(rows.share.double())
        self.kept.append(rows.kept.double().sum(0))


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device | str | None = None,
    amp: torch.dtype | None = None,
    limit: int | None = None,
    speed: bool = True,
    progress: Callable[[int], None] | None = None,
    on_images: Callable[[ImageRows], None] | None = None,
) -> Evaluation:
    """Run `model` reduced and dense on the same images.

    Called by every rank of a `torch.distributed` process group, with the same model and loader, this is one evaluation:
    ranks take turns at the batches, each image is looked at once, and all get the result. `on_images` and `progress`
    are then told of this rank's batches, and speed is rank 0's.

    Args:
        model: an attached model; left on `device` and in the mode it had.
        loader: gives (images [B, C, H, W], labels [B]), label -1 where there is none.
        device: where to run; None is where the model lies.
        amp: autocast type, e.g. `torch.bfloat16`.
        limit: stop after this many images.
        speed: measure images per second on the first batch, too.
        progress: called after each batch with its number of images.
        on_images: called after each batch with what became of each of its images, in the loader's order.

    Raises:
        LTMPError: nothing is attached, no images, NaN or infinity, or a label outside the head's classes.
    """
    if not is_attached(model):
        raise LTMPError("nothing to evaluate: attach thresholds first (ltmp.load(model, file) or ltmp.attach(model))")
    device = torch.device(device) if device else next(model.parameters()).device
    part = _Part(getattr(loader, "skipped", {}))
    with deployed(model, device, amp=amp), record() as calls:
        for images, labels in my_batches(loader, limit):
            images, labels = images.to(device), labels.to(device)
            logits = logits_of(model(images))
            # a record of its own, which nobody reads: the dense and the timed calls are not the result
            with record():
                with dense():
                    dense_logits = logits_of(model(images))
                if speed and part.throughput is None and rank() == 0:
                    part.throughput = measure(model, images)
            _check(images, labels, dense_logits)
            choices, dense_choices = part.reduced.add(logits, labels), part.plain.add(dense_logits, labels)
            kept, geometry = calls.kept[-1], calls.geometry[-1]
            found = (labels, dense_choices, choices, flops_share(kept, geometry), kept)
            rows = ImageRows(*(values.cpu() for values in found))
            part.add(rows, geometry.tokens)
            if on_images:
                on_images(rows)
            if progress:
                progress(len(images))
    merge(part.skipped)
    return _summary(exchange(part))


def _summary(parts: list[_Part]) -> Evaluation:
    """All ranks' findings as one."""
    reduced, plain = (_add(getattr(part, name) for part in parts) for name in ("reduced", "plain"))
    if not reduced.images:
        raise LTMPError("nothing to evaluate: the data gave no images")
    share = torch.cat([share for part in parts for share in part.share])
    kept = torch.stack([kept for part in parts for kept in part.kept])
    return Evaluation(
        images=reduced.images,
        top1=reduced.percent(reduced.top1),
        top5=reduced.percent(reduced.top5),
        dense_top1=plain.percent(plain.top1),
        dense_top5=plain.percent(plain.top5),
        agreement=100 * sum(part.agreed for part in parts) / reduced.images,
        share=share.mean().item(),
        share_std=share.std(correction=0).item(),
        share_min=share.min().item(),
        share_max=share.max().item(),
        tokens=max(part.tokens for part in parts),
        kept=(kept.sum(0) / reduced.images).tolist(),
        skipped=len(parts[0].skipped),
        throughput=parts[0].throughput,
    )


def _add(parts: Iterable[_Choices]) -> _Choices:
    return _Choices(*(sum(counts) for counts in zip(*map(astuple, parts), strict=True)))


def _check(images: Tensor, labels: Tensor, logits: Tensor) -> None:
    if not logits.isfinite().all():
        guilty = "the model's weights" if images.isfinite().all() else "the images"
        raise LTMPError(f"the model's output is NaN or infinite, because of {guilty}: repair them first")
    if int(labels.max()) >= logits.shape[-1]:
        raise LTMPError(
            f"a label is {int(labels.max())} but the model's head has {logits.shape[-1]} classes, numbered from 0: "
            "use the model fine-tuned on these classes, or a class map"
        )


@contextmanager
def deployed(model: nn.Module, device: torch.device, *, amp: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode without gradients on `device` inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.to(device).eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
            yield
    finally:
        for module, training in modes:
            module.training = training
