"""The state of an attached model in one value: what it was learned for, what it is set to, and what each block does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .calls import record
from .checkpoint.describe import facts_of, metadata_of
from .deploy import deployed
from .hosts.attach import attachment
from .method.facts import kept_at_budget
from .method.thresholds import Thresholds


@dataclass(frozen=True)
class ModelSummary:
    """The result of `ltmp.summary`; None where unknown. Its text is a short table.

    Attributes:
        model, library: of what is attached.
        variant, scores, engine: how it is attached; scores are None of fixed rates.
        target: the FLOPs share it was learned for; share: the one measured.
        budget: what the dial is set to; dial: its ends.
        certified: what its certificate guarantees, in a sentence.
        merge, prune: the thresholds of each block.
        tokens: mean tokens after each block.
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
        rows = [(name, getattr(self, name)) for name in self.__dataclass_fields__ if name not in _BLOCKS]
        lines = [f"{name:<10}{_shown(value)}" for name, value in rows if value is not None]
        columns = {name: getattr(self, name) for name in _BLOCKS if getattr(self, name) is not None}
        if columns:
            lines.append("".join(f"{name:>10}" for name in ("block", *columns)))
            for block, values in enumerate(zip(*columns.values(), strict=True), 1):
                cells = (
                    f"{value:.1f}" if name == "tokens" else f"{value:.4g}"
                    for name, value in zip(columns, values, strict=True)
                )
                lines.append(f"{block:>10}" + "".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)


_BLOCKS = ("merge", "prune", "tokens")


def summary(model: nn.Module, images: Tensor | None = None) -> ModelSummary:
    """The state of an attached model.

    >>> print(ltmp.summary(model))

    Args:
        model: attached.
        images: [B, C, H, W] on the model's device, to measure share and tokens on; without any they are what was noted
            when the thresholds were learned, as far as it still holds, and what the dial knows.

    Raises:
        LTMPError: nothing is attached.
    """
    made = attachment(model)
    policy, config = made.policy, made.policy.config
    about, facts = metadata_of(model), facts_of(model)
    learned = isinstance(policy, Thresholds)
    kept = kept_at_budget(policy)
    share = about.share
    if images is not None:
        with deployed(model, images.device), record() as calls:
            model(images)
        kept, share = calls.kept[0].float().mean(0).tolist(), float(calls.share().mean())
    values: dict[str, Any] = {name: getattr(policy, name) if learned else None for name in ("merge", "prune", "dial")}
    dial, certificate = values.pop("dial"), getattr(policy, "certificate", None)
    return ModelSummary(
        model=facts.get("model_name") or facts.get("architecture"),
        library=facts.get("library"),
        variant=config.variant,
        scores=str(config.scores) if learned else None,
        engine=config.engine,
        target=about.target,
        share=share,
        budget=getattr(policy, "budget", None),
        dial=None if dial is None else (dial.lowest, dial.highest),
        certified=None if certificate is None else certificate.sentence(),
        tokens=None if kept is None else tuple(kept),
        **{name: None if value is None else tuple(value.detach().cpu().tolist()) for name, value in values.items()},
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
