"""Accuracy, agreement with the dense model and FLOPs share, measured on the deployed model with real batches."""

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
    """Measurements on `images` images. Accuracies and agreement are in percent; accuracies are None without labels.

    Attributes:
        share: mean FLOPs share over images; `share_std`, `share_min` and `share_max` are its spread.
        kept: mean number of tokens after each block, [L].
        tokens: number of tokens entering the first block, class token included.
        agreement: how often the reduced model's top-1 class is the dense model's.
        skipped: number of images that could not be read.
        throughput: images per second, dense and reduced; None if it was not measured.
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
    """Per-image results of a batch, one row per image, on the CPU.

    Attributes:
        label: int64 [B], -1 if unknown.
        dense, reduced: int64 [B], the top-1 class of each model.
        share: [B], FLOPs share.
        kept: [B, L], number of tokens after each block.
    """

    label: Tensor
    dense: Tensor
    reduced: Tensor
    share: Tensor
    kept: Tensor


def evaluate(
    model: nn.Module, loader: Batches, *, on_images: Callable[[ImageRows], None] | None = None, **options: Any
) -> Evaluation:
    """Run `model` reduced and dense on the same images.

    Args:
        model: an attached model; it stays on `device`, and its train or eval mode is restored.
        loader: yields (images [B, C, H, W], labels [B]); a label of -1 means unknown.
        on_images: called after each batch with its per-image results, in the loader's order.
        options: passed to `evaluate_policies`.

    Raises:
        LTMPError: nothing is attached, the loader yields no images, the output is NaN or infinite, or a label is
            outside the head's classes.
    """
    if not is_attached(model):
        raise LTMPError("nothing to evaluate: attach thresholds first (ltmp.load(model, file) or ltmp.attach(model))")
    policies = {"reduced": attachment(model).policy}
    callback = (lambda _, rows: on_images(rows)) if on_images else None
    return evaluate_policies(model, loader, policies, on_images=callback, **options)["reduced"]


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
    """Run an attached model under several policies, and dense, on the same images in one pass over the data.

    In a `torch.distributed` process group, call it on every rank with the same model and loader: the batches are
    divided among the ranks, and every rank returns the results over all of them.

    Args:
        policies: by name; each for the model's depth and on `device`.
        device: where to run; None is the model's device.
        amp: autocast dtype, e.g. `torch.bfloat16`.
        limit: stop after this many images.
        speed: also measure images per second, on the first batch.
        progress: called after each batch with its number of images.
        on_images: called after each batch, once per policy and baseline, with the name and the per-image results.
        baselines: dense models to evaluate under their names, on `device`.

    Raises:
        LTMPError: as for `evaluate`.
    """
    device = torch.device(device) if device else next(model.parameters()).device
    runners = {name: partial(_run_policy, policy) for name, policy in policies.items()}
    runners |= {baseline.name: partial(_run_baseline, baseline) for baseline in baselines}
    results = _RankResults(getattr(loader, "skipped", {}), {name: _Tally() for name in runners})
    with deployed(model, device, amp=amp):
        for images, labels in my_batches(loader, limit):
            images, labels = images.to(device), labels.to(device)
            # the discarded record keeps dense and timed calls out of any record that our caller has open
            with record(), dense():
                dense_logits = logits_of(model(images))
            _check(images, labels, dense_logits)
            dense_top1 = results.dense.add(dense_logits, labels)
            for name, runner in runners.items():
                tally = results.tallies[name]
                outputs, throughput = runner(model, images, timed=speed and tally.throughput is None and rank() == 0)
                tally.throughput = throughput or tally.throughput
                rows = tally.add(labels, dense_top1, outputs)
                if on_images:
                    on_images(name, rows)
            if progress:
                progress(len(images))
    merge(results.skipped)
    ranks = exchange(results)
    return {name: _combine(ranks, name) for name in runners}


@dataclass
class _Accuracy:
    """Running counts of correct top-1 and top-5 predictions."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count a batch, logits [B, K] and labels [B] (-1 if unknown); return the top-1 classes [B]."""
        classes = logits.topk(min(5, logits.shape[-1]), -1).indices
        correct = classes == labels[:, None]
        self.images += len(labels)
        self.labelled += int((labels >= 0).sum())
        self.top1 += int(correct[:, 0].sum())
        self.top5 += int(correct.sum())
        return classes[:, 0]

    def percent(self, correct: int) -> float | None:
        """`correct` in percent of the labelled images, None without labels."""
        return 100 * correct / self.labelled if self.labelled else None


@dataclass(frozen=True)
class _Outputs:
    """Results for a batch: logits [B, K], FLOPs share [B], tokens after each block [B, L] and before the first."""

    logits: Tensor
    share: Tensor
    kept: Tensor
    tokens: int


@dataclass
class _Tally:
    """Running sums over one rank's images under one policy.

    Attributes:
        share: float64 [B] of each batch.
        kept: float64 [L] of each batch, summed over its images.
    """

    accuracy: _Accuracy = field(default_factory=_Accuracy)
    agreed: int = 0
    tokens: int = 0
    share: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    throughput: Throughput | None = None

    def add(self, labels: Tensor, dense_top1: Tensor, outputs: _Outputs) -> ImageRows:
        """Count a batch and return its per-image results."""
        top1 = self.accuracy.add(outputs.logits, labels)
        columns = (labels, dense_top1, top1, outputs.share, outputs.kept)
        rows = ImageRows(*(column.cpu() for column in columns))
        self.agreed += int((rows.dense == rows.reduced).sum())
        self.tokens = outputs.tokens
        self.share.append(rows.share.double())
        self.kept.append(rows.kept.double().sum(0))
        return rows


@dataclass
class _RankResults:
    """Results of one rank: unreadable images, a tally per policy, and the dense model's accuracy."""

    skipped: dict[str, str]
    tallies: dict[str, _Tally]
    dense: _Accuracy = field(default_factory=_Accuracy)


def _check(images: Tensor, labels: Tensor, logits: Tensor) -> None:
    if not logits.isfinite().all():
        guilty = "the model's weights" if images.isfinite().all() else "the images"
        raise LTMPError(f"the model's output is NaN or infinite, because of {guilty}: repair them first")
    if int(labels.max()) >= logits.shape[-1]:
        raise LTMPError(
            f"a label is {int(labels.max())} but the model's head has {logits.shape[-1]} classes, numbered from 0: "
            "use the model fine-tuned on these classes, or a class map"
        )


def _run_policy(policy: Policy, model: nn.Module, images: Tensor, timed: bool) -> tuple[_Outputs, Throughput | None]:
    """Run the attached model under `policy`, and time it if `timed`."""
    with running(body=replace(attachment(model).body, policy=policy.eval())):
        with record() as calls:
            logits = logits_of(model(images))
        with record():
            throughput = measure(model, images) if timed else None
    kept, geometry = calls.kept[-1], calls.geometry[-1]
    return _Outputs(logits, flops_share(kept, geometry), kept, geometry.tokens), throughput


def _run_baseline(
    baseline: Baseline, model: nn.Module, images: Tensor, timed: bool
) -> tuple[_Outputs, Throughput | None]:
    """Run a baseline, and time it against the dense model if `timed`."""
    logits = logits_of(baseline.model(images))
    with record():
        throughput = measure(model, images, baseline) if timed else None
    share = torch.full((len(images),), baseline.share)
    kept = torch.tensor(baseline.kept).expand(len(images), -1)
    return _Outputs(logits, share, kept, int(baseline.kept[0])), throughput


def _combine(ranks: list[_RankResults], name: str) -> Evaluation:
    """Combine the results of all ranks for one policy."""
    tallies = [results.tallies[name] for results in ranks]
    reduced, dense = _total(tally.accuracy for tally in tallies), _total(results.dense for results in ranks)
    if not reduced.images:
        raise LTMPError("nothing to evaluate: the data gave no images")
    share = torch.cat([share for tally in tallies for share in tally.share])
    kept = torch.stack([kept for tally in tallies for kept in tally.kept])
    return Evaluation(
        images=reduced.images,
        top1=reduced.percent(reduced.top1),
        top5=reduced.percent(reduced.top5),
        dense_top1=dense.percent(dense.top1),
        dense_top5=dense.percent(dense.top5),
        agreement=100 * sum(tally.agreed for tally in tallies) / reduced.images,
        share=share.mean().item(),
        share_std=share.std(correction=0).item(),
        share_min=share.min().item(),
        share_max=share.max().item(),
        tokens=max(tally.tokens for tally in tallies),
        kept=(kept.sum(0) / reduced.images).tolist(),
        skipped=len(ranks[0].skipped),
        throughput=tallies[0].throughput,
    )


def _total(counts: Iterable[_Accuracy]) -> _Accuracy:
    return _Accuracy(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))
