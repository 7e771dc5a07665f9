"""Settings and state of a policy in readable form, for its repr and for `ltmp.summary`."""

from __future__ import annotations

from typing import Any


def policy_facts(policy: Any) -> dict[str, Any]:
    """Settings, target and share from the metadata, and the range, budget and mean tokens per block of the dial."""
    config, recorded = policy.config, policy.recorded_metadata
    metadata = None if recorded is None else recorded.valid_for(policy)
    facts = {
        **({"r": config.r} if config.method.fixed else {"scores": str(config.scores)}),
        "depth": policy.depth,
        "target": metadata and metadata.target,
        "share": metadata and metadata.share,
    }
    dial = getattr(policy, "dial", None)
    if dial is not None and not policy.merge.is_meta:
        tokens = kept_at_budget(policy)
        facts |= {
            "dial": f"{dial.lowest:.3g} to {dial.highest:.3g}",
            "budget": policy.budget,
            "tokens": None if tokens is None else [round(count) for count in tokens],
        }
    return {name: value for name, value in facts.items() if value is not None}


def kept_at_budget(policy: Any) -> list[float] | None:
    """Mean tokens after each block at the dial's budget; None without a dial or budget, and if reduction is off."""
    dial, budget = getattr(policy, "dial", None), getattr(policy, "budget", None)
    return None if dial is None or budget in (None, 1) else dial.kept_at(budget).tolist()


def policy_repr(policy: Any) -> str:
    """The repr of a policy, without the class name."""
    facts = (f"{name}={_short(value)}" for name, value in policy_facts(policy).items())
    return ", ".join([policy.config.variant, *facts])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("'", "")
