"""Accuracy, agreement with the dense model and FLOPs share, on the deployed model and real batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import dense, record
from ..deploy import deployed
from ..distributed import exchange, merge, my_batches, rank
from ..engines.body import running
from ..errors import LTMPError
from ..hosts.attach import attachment, is_attached
from ..hosts.outputs import logits_of
from ..method.flops import flops_share
from ..method.policy import Policy
from .baselines import Baseline
from .timing import Throughput, measure

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Measurements on `images` images; accuracies and agreement in percent, None where there are no labels.

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
    """Per-image results of a batch, one row an image, on the CPU.

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


@dataclass(frozen=True)
class _Answer:
    """Of a batch: logits [B, K], FLOPs share [B], tokens after each block [B, L], and those that enter the first."""

    logits: Tensor
    share: Tensor
    kept: Tensor
    tokens: int


@dataclass
class _Tally:
    """Sums over one policy's answers to one rank's images.

    Attributes:
        share: float64 [B] of each batch; kept: float64 [L] of each batch, summed over its images.
    """

    choices: _Choices = field(default_factory=_Choices)
    agreed: int = 0
    tokens: int = 0
    share: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    throughput: Throughput | None = None

    def add(self, labels: Tensor, dense_choices: Tensor, answer: _Answer) -> ImageRows:
        """Count a batch."""
        choices = self.choices.add(answer.logits, labels)
        found = (labels, dense_choices, choices, answer.share, answer.kept)
        rows = ImageRows(*(values.cpu() for values in found))
        self.agreed += int((rows.dense == rows.reduced).sum())
        self.tokens = answer.tokens
        self.share.append(rows.share.double())
        self.kept.append(rows.kept.double().sum(0))
        return rows


@dataclass
class _Part:
    """One rank's results: the dense model's answers, those of each policy, and images that could not be read."""

    skipped: dict[str, str]
    tallies: dict[str, _Tally]
    plain: _Choices = field(default_factory=_Choices)


def evaluate(
    model: nn.Module, loader: Batches, *, on_images: Callable[[ImageRows], None] | None = None, **how: Any
) -> Evaluation:
    """Run `model` reduced and dense on the same images.

    Args:
        model: an attached model; left on `device` and in the mode it had.
        loader: gives (images [B, C, H, W], labels [B]), label -1 where there is none.
        on_images: called after each batch with what became of each of its images, in the loader's order.
        how: as in `evaluate_policies`.

    Raises:
        LTMPError: nothing is attached, no images, NaN or infinity, or a label outside the head's classes.
    """
    if not is_attached(model):
        raise LTMPError("nothing to evaluate: attach thresholds first (ltmp.load(model, file) or ltmp.attach(model))")
    seen = (lambda _, rows: on_images(rows)) if on_images else None
    mine = {"reduced": attachment(model).policy}
    return evaluate_policies(model, loader, mine, on_images=seen, **how)["reduced"]


def evaluate_policies(
    model: nn.Module,
    loader: Batches,
    policies: Mapping[str, Policy],
    *,
    device: torch.device | str | None = None,
    amp: torch.dtype | None = None,
    limit: int | None = None,
    speed: bool = True,
    progress: Callable[[int], None] | None = None,
    on_images: Callable[[str, ImageRows], None] | None = None,
    baselines: Iterable[Baseline] = (),
) -> dict[str, Evaluation]:
    """Run an attached model by several policies, and dense, on the same images in one pass over the data.

    Called by every rank of a `torch.distributed` process group, with the same model and loader, this is one evaluation:
    the ranks take turns at the batches, and all of them return what all of them found.

    Args:
        policies: by name; for the model's depth, on `device`.
        device: where to run; None is where the model lies.
        amp: autocast type, e.g. `torch.bfloat16`.
        limit: stop after this many images.
        speed: measure images per second on the first batch, too.
        progress: called after each batch with its number of images.
        on_images: called after each batch for each policy and baseline.
        baselines: dense models that take part under their names, on `device`.

    Raises:
        LTMPError: like `evaluate`.
    """
    device = torch.device(device) if device else next(model.parameters()).device
    ways = {name: partial(_by_policy, policy) for name, policy in policies.items()}
    ways |= {baseline.name: partial(_by_baseline, baseline) for baseline in baselines}
    part = _Part(getattr(loader, "skipped", {}), {name: _Tally() for name in ways})
    with deployed(model, device, amp=amp):
        for images, labels in my_batches(loader, limit):
            images, labels = images.to(device), labels.to(device)
            # records that nobody reads: dense and timed calls are no result, neither here nor of our caller's
            with record(), dense():
                dense_logits = logits_of(model(images))
            _check(images, labels, dense_logits)
            dense_choices = part.plain.add(dense_logits, labels)
            for name, way in ways.items():
                tally = part.tallies[name]
                answer, throughput = way(model, images, timed=speed and tally.throughput is None and rank() == 0)
                tally.throughput = throughput or tally.throughput
                rows = tally.add(labels, dense_choices, answer)
                if on_images:
                    on_images(name, rows)
            if progress:
                progress(len(images))
    merge(part.skipped)
    parts = exchange(part)
    return {name: _summary(parts, name) for name in ways}


def _by_policy(policy: Policy, model: nn.Module, images: Tensor, timed: bool) -> tuple[_Answer, Throughput | None]:
    """The answer of the attached model by a policy, and its speed."""
    with running(body=replace(attachment(model).body, policy=policy.eval())):
        with record() as calls:
            logits = logits_of(model(images))
        with record():
            throughput = measure(model, images) if timed else None
    kept, geometry = calls.kept[-1], calls.geometry[-1]
    return _Answer(logits, flops_share(kept, geometry), kept, geometry.tokens), throughput


def _by_baseline(
    baseline: Baseline, model: nn.Module, images: Tensor, timed: bool
) -> tuple[_Answer, Throughput | None]:
    """The answer of a baseline, and its speed in turns with the dense model's."""
    logits = logits_of(baseline.model(images))
    with record():
        throughput = measure(model, images, baseline) if timed else None
    share = torch.full((len(images),), baseline.share)
    return _Answer(
        logits, share, torch.tensor(baseline.kept).expand(len(images), -1), int(baseline.kept[0])
    ), throughput


def _summary(parts: list[_Part], name: str) -> Evaluation:
    """All ranks' findings on one policy as one."""
    tallies = [part.tallies[name] for part in parts]
    reduced, plain = _add(tally.choices for tally in tallies), _add(part.plain for part in parts)
    if not reduced.images:
        raise LTMPError("nothing to evaluate: the data gave no images")
    share = torch.cat([share for tally in tallies for share in tally.share])
    kept = torch.stack([kept for tally in tallies for kept in tally.kept])
    return Evaluation(
        images=reduced.images,
        top1=reduced.percent(reduced.top1),
        top5=reduced.percent(reduced.top5),
        dense_top1=plain.percent(plain.top1),
        dense_top5=plain.percent(plain.top5),
        agreement=100 * sum(tally.agreed for tally in tallies) / reduced.images,
        share=share.mean().item(),
        share_std=share.std(correction=0).item(),
        share_min=share.min().item(),
        share_max=share.max().item(),
        tokens=max(tally.tokens for tally in tallies),
        kept=(kept.sum(0) / reduced.images).tolist(),
        skipped=len(parts[0].skipped),
        throughput=tallies[0].throughput,
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
