"""Summary of an attached model: what its thresholds were learned for, current settings, and what each block does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from .calls import record
from .checkpoint.describe import collect_metadata, metadata_of
from .deploy import deployed
from .hosts.attach import attachment
from .method.facts import kept_at_budget
from .method.thresholds import Thresholds


@dataclass(frozen=True)
class ModelSummary:
    """The result of `ltmp.summary`; unknown fields are None. `str()` gives a short table.

    Attributes:
        model, library: name or architecture of the model, and the library it comes from.
        variant, scores, engine: settings of its reduction; scores is None for fixed rates.
        target: FLOPs share that the thresholds were learned for.
        share: measured FLOPs share.
        budget: FLOPs share that the dial is set to.
        dial: lowest and highest share of the dial.
        certified: what the certificate guarantees, in a sentence.
        merge, prune: thresholds of each block.
        tokens: mean number of tokens after each block.
    """

    model: str | None
    library: str | None
    variant: str
    scores: str | None
    engine: str
    target: float | None
    share: float | None
    budget: float | None
    dial: tuple[float, float] | None
    certified: str | None
    merge: tuple[float, ...] | None
    prune: tuple[float, ...] | None
    tokens: tuple[float, ...] | None

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        lines = [f"{name:<10}{_format(value)}" for name, value in known.items() if name not in _PER_BLOCK]
        columns = {name: known[name] for name in _PER_BLOCK if name in known}
        if columns:
            lines.append("".join(f"{name:>10}" for name in ("block", *columns)))
            for block, row in enumerate(zip(*columns.values(), strict=True), 1):
                cells = (
                    f"{value:.1f}" if name == "tokens" else f"{value:.4g}"
                    for name, value in zip(columns, row, strict=True)
                )
                lines.append(f"{block:>10}" + "".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)


_PER_BLOCK = ("merge", "prune", "tokens")


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(model: nn.Module, images: Tensor | None = None) -> ModelSummary:
    """Summarise the state of an attached model.

    >>> print(ltmp.summary(model))

    Args:
        model: attached.
        images: [B, C, H, W] on the model's device, to measure share and tokens on. Without images, the share is the
            one recorded when the thresholds were learned, if they have not changed since, and the tokens are the
            dial's estimate for its budget.

    Raises:
        LTMPError: nothing is attached.
    """
    policy = attachment(model).policy
    thresholds = policy if isinstance(policy, Thresholds) else None
    metadata, facts = metadata_of(model), collect_metadata(model)
    kept, share = kept_at_budget(policy), metadata.share
    if images is not None:
        with deployed(model, images.device), record() as calls:
            model(images)
        kept, share = calls.kept[0].float().mean(0).tolist(), float(calls.share().mean())
    dial = thresholds.dial if thresholds else None
    certificate = thresholds.certificate if thresholds else None
    return ModelSummary(
        model=facts.get("model_name") or facts.get("architecture"),
        library=facts.get("library"),
        variant=policy.config.variant,
        scores=str(policy.config.scores) if thresholds else None,
        engine=policy.config.engine,
        target=metadata.target,
        share=share,
        budget=thresholds.budget if thresholds else None,
        dial=None if dial is None else (dial.lowest, dial.highest),
        certified=None if certificate is None else certificate.sentence(),
        merge=tuple(thresholds.merge.tolist()) if thresholds else None,
        prune=tuple(thresholds.prune.tolist()) if thresholds else None,
        tokens=None if kept is None else tuple(kept),
    )
