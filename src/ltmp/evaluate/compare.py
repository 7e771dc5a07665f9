"""Token-reduction methods on equal terms: one model, one data set, the same engine and the same counting of FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import record
from ..config import LEARNED, VARIANTS, LTMPConfig
from ..engines.body import running
from ..errors import UsageError
from ..hosts.attach import attachment
from ..method.policy import Policy
from ..method.rates import Rates
from .accuracy import Batches, Evaluation, evaluate_policies
from .baselines import Baseline

RESIZE = "resize"
"""The method of lower resolution, no variant of ours."""


@dataclass(frozen=True)
class Wanted:
    """A method that takes part.

    Attributes:
        variant: see `ltmp.config.VARIANTS`, or `resize`, the dense model at lower resolution.
        r: its fixed rate, or its pixels a side; None for a rate that meets each budget.
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
    def parse(cls, text: str) -> Wanted:
        """`"ltmp"`, `"m"`, `"m:16"`, `"m:0.12"` or `"resize:168"`.

        Raises:
            UsageError: no such method, or no such rate.
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
    """A policy that takes part, and how it came about.

    Attributes:
        name: unique; method: its variant; target: the budget it was made for, None where a rate was given.
    """

    name: str
    method: str
    target: float | None
    policy: Policy


def rates_for(model: nn.Module, images: Tensor, variant: str, target: float) -> Rates:
    """Fixed rates whose FLOPs share is closest to `target`: so many tokens a block on average, spread evenly.

    Args:
        model: attached; images: [B, 3, H, W] on its device, one is enough.

    Raises:
        UsageError: `variant` cannot remove that much.
    """
    depth = attachment(model).body.depth
    tokens = _run(model, images, _rates(model, variant, (0,) * depth)).geometry[0].tokens

    def rates(average: int) -> tuple[int, ...]:
        # in units of 1 / depth tokens: 16.5 a block is 16, 17, 16, 17, ...
        return tuple((i + 1) * average // depth - i * average // depth for i in range(depth))

    def share(average: int) -> float:
        return _run(model, images, _rates(model, variant, rates(average))).share().mean().item()

    low, high = 0, tokens * depth
    if share(high) > target:
        raise UsageError(
            f"method {variant} cannot go below a share of {share(high):.2f} here: drop the budget {target}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) > target else (low, middle)
    best = min((low, high), key=lambda average: abs(share(average) - target))
    return _rates(model, variant, rates(best))


def _rates(model: nn.Module, variant: str, r: Any) -> Rates:
    mine = attachment(model).policy
    config = LTMPConfig(variant=variant, r=r, engine=mine.config.engine)
    return Rates(mine.depth, config).to(next(model.parameters()).device).eval()


def fixed_entry(model: nn.Module, wanted: Wanted, images: Tensor, target: float | None) -> Entry:
    """A fixed-rate method at its own rate, or at the one that meets `target`.

    Raises:
        UsageError: not for this model, or not down to `target`.
    """
    made = attachment(model)
    if LTMPConfig(wanted.variant).needs_class_attention and not made.recipe.class_first(made.host):
        raise UsageError(f"method {wanted.variant} needs a class token's attention, and this model has no class token")
    if wanted.r is not None:
        return Entry(f"{wanted.variant}:{wanted.r}", wanted.variant, None, _rates(model, wanted.variant, wanted.r))
    assert target is not None
    return Entry(
        f"{wanted.variant} {target:g}", wanted.variant, target, rates_for(model, images, wanted.variant, target)
    )


def _run(model: nn.Module, images: Tensor, policy: Policy) -> Any:
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
    **how: Any,
) -> dict[str, Evaluation]:
    """Evaluate all entries in one pass over the data; see `evaluate_policies` for `how`."""
    policies = {entry.name: entry.policy for entry in entries if isinstance(entry, Entry)}
    baselines = [entry for entry in entries if isinstance(entry, Baseline)]
    return evaluate_policies(model, loader, policies, progress=progress, baselines=baselines, **how)


def rows(entries: Iterable[Entry | Baseline], results: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """The dense model and each entry, a row each: for tables, CSV and plots; accuracies in percent."""
    first = next(iter(results.values()))
    speed = first.throughput
    found: list[dict[str, Any]] = [
        {
            "method": "dense", "name": "dense", "target": None, "share": 1.0, "ideal": 1.0, "top1": first.dense_top1,
            "top5": first.dense_top5, "agreement": 100.0, "images_per_second": speed.dense if speed else None,
            "speedup": 1.0 if speed else None,
        }
    ]  # fmt: skip
    for entry in entries:
        result = results[entry.name]
        speed = result.throughput
        found.append({
            "method": entry.method, "name": entry.name, "target": entry.target, "share": result.share,
            "ideal": 1 / result.share, "top1": result.top1, "top5": result.top5, "agreement": result.agreement,
            "images_per_second": speed.reduced if speed else None, "speedup": speed.speedup if speed else None,
        })  # fmt: skip
    return found


def as_json(entries: Iterable[Entry | Baseline], results: dict[str, Evaluation], **about: Any) -> dict[str, Any]:
    """Everything that was measured as plain values."""
    entries = list(entries)
    configs = {entry.name: entry.policy.config.to_dict() for entry in entries if isinstance(entry, Entry)}
    details = {entry.name: {"config": configs.get(entry.name), **asdict(results[entry.name])} for entry in entries}
    return {**about, "rows": rows(entries, results), "evaluations": details}
