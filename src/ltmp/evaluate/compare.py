"""Compare token reduction methods on equal terms: same model, data set, engine and FLOPs counting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Record, record
from ..config import LEARNED, VARIANTS, LTMPConfig
from ..engines.body import running
from ..errors import UsageError
from ..hosts.attach import attachment
from ..method.policy import Policy
from ..method.rates import Rates
from .accuracy import Batches, Evaluation, evaluate_policies
from .baselines import Baseline

RESIZE = "resize"
"""The dense model at lower resolution: a method of the comparison, but not one of `VARIANTS`."""


@dataclass(frozen=True)
class RequestedMethod:
    """A requested method.

    Attributes:
        variant: one of `ltmp.config.VARIANTS`, or `resize`, the dense model at lower resolution.
        r: its fixed rate, or pixels per side for `resize`; None to meet each budget.
    """

    variant: str
    r: int | float | None = None

    @property
    def resized(self) -> bool:
        return self.variant == RESIZE

    @property
    def learned(self) -> bool:
        return self.variant in LEARNED

    @classmethod
    def parse(cls, text: str) -> RequestedMethod:
        """Parse `"ltmp"`, `"m"`, `"m:16"`, `"m:0.12"` or `"resize:168"`.

        Raises:
            UsageError: the method is unknown, or the rate is invalid for it.
        """
        variant, colon, rate = text.partition(":")
        if variant == RESIZE:
            if not rate.isdecimal():
                raise UsageError(f"method {text!r}: expected pixels a side, e.g. resize:168")
            return cls(variant, int(rate))
        if variant not in VARIANTS:
            raise UsageError(
                f"no method {variant!r}: expected one of {', '.join(VARIANTS)}, e.g. ltmp, m, m:16 or resize:168"
            )
        if not colon:
            return cls(variant)
        try:
            r = float(rate) if "." in rate else int(rate)
            LTMPConfig(variant=variant, r=r)
        except ValueError as error:
            raise UsageError(f"method {text!r}: {error}") from error
        return cls(variant, r)


@dataclass(frozen=True)
class Entry:
    """A policy in the comparison.

    Attributes:
        name: unique name.
        method: its variant.
        target: the budget it was made for, None if its rate was given.
    """

    name: str
    method: str
    target: float | None
    policy: Policy


def rates_for(model: nn.Module, images: Tensor, variant: str, target: float) -> Rates:
    """Fixed rates whose FLOPs share is closest to `target`, spread evenly over the blocks.

    Args:
        model: attached.
        images: [B, 3, H, W] on the model's device; one is enough.

    Raises:
        UsageError: `variant` cannot remove that much.
    """
    depth = attachment(model).body.depth
    tokens = _run(model, images, _rates(model, variant, (0,) * depth)).geometry[0].tokens

    def rates(total: int) -> tuple[int, ...]:
        # spread over the blocks: an average of 16.5 tokens per block is 16, 17, 16, 17, ...
        return tuple((i + 1) * total // depth - i * total // depth for i in range(depth))

    def share(total: int) -> float:
        return _run(model, images, _rates(model, variant, rates(total))).share().mean().item()

    low, high = 0, tokens * depth
    if share(high) > target:
        raise UsageError(
            f"method {variant} cannot go below a share of {share(high):.2f} here: drop the budget {target}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) > target else (low, middle)
    best = min((low, high), key=lambda total: abs(share(total) - target))
    return _rates(model, variant, rates(best))


def fixed_entry(model: nn.Module, wanted: RequestedMethod, images: Tensor, target: float | None) -> Entry:
    """A fixed-rate method at its own rate or, if it has none, at the rates that meet `target`.

    Raises:
        UsageError: the method does not work for this model, or cannot reach `target`.
    """
    attached = attachment(model)
    if LTMPConfig(wanted.variant).needs_class_attention and not attached.recipe.class_first(attached.host):
        raise UsageError(f"method {wanted.variant} needs a class token's attention, and this model has no class token")
    if wanted.r is not None:
        return Entry(f"{wanted.variant}:{wanted.r}", wanted.variant, None, _rates(model, wanted.variant, wanted.r))
    assert target is not None
    rates = rates_for(model, images, wanted.variant, target)
    return Entry(f"{wanted.variant} {target:g}", wanted.variant, target, rates)


def _rates(model: nn.Module, variant: str, r: Any) -> Rates:
    """Fixed rates for `model`, on its device and its engine."""
    policy = attachment(model).policy
    config = LTMPConfig(variant=variant, r=r, engine=policy.config.engine)
    return Rates(policy.depth, config).to(next(model.parameters()).device).eval()


def _run(model: nn.Module, images: Tensor, policy: Policy) -> Record:
    body = replace(attachment(model).body, policy=policy)
    with torch.inference_mode(), record() as calls, running(body=body):
        model(images)
    return calls


def compare(
    model: nn.Module,
    loader: Batches,
    entries: Sequence[Entry | Baseline],
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, Evaluation]:
    """Evaluate all entries in one pass over the data; `options` are those of `evaluate_policies`."""
    policies = {entry.name: entry.policy for entry in entries if isinstance(entry, Entry)}
    baselines = [entry for entry in entries if isinstance(entry, Baseline)]
    return evaluate_policies(model, loader, policies, progress=progress, baselines=baselines, **options)


def rows(entries: Iterable[Entry | Baseline], results: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """One row for the dense model and one per entry, for tables, CSV and plots; accuracies in percent."""
    first = next(iter(results.values()))
    speed = first.throughput
    table: list[dict[str, Any]] = [
        {
            "method": "dense", "name": "dense", "target": None, "share": 1.0, "ideal": 1.0, "top1": first.dense_top1,
            "top5": first.dense_top5, "agreement": 100.0, "images_per_second": speed.dense if speed else None,
            "speedup": 1.0 if speed else None,
        }
    ]  # fmt: skip
    for entry in entries:
        result = results[entry.name]
        speed = result.throughput
        table.append({
            "method": entry.method, "name": entry.name, "target": entry.target, "share": result.share,
            "ideal": 1 / result.share, "top1": result.top1, "top5": result.top5, "agreement": result.agreement,
            "images_per_second": speed.reduced if speed else None, "speedup": speed.speedup if speed else None,
        })  # fmt: skip
    return table


def as_json(entries: Iterable[Entry | Baseline], results: dict[str, Evaluation], **about: Any) -> dict[str, Any]:
    """All measurements as plain values, after the values in `about`."""
    entries = list(entries)
    configs = {entry.name: entry.policy.config.to_dict() for entry in entries if isinstance(entry, Entry)}
    details = {entry.name: {"config": configs.get(entry.name), **asdict(results[entry.name])} for entry in entries}
    return {**about, "rows": rows(entries, results), "evaluations": details}
