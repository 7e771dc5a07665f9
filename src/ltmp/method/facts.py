"""The settings and the state of a policy in words, for its repr and for `ltmp.summary`."""

from __future__ import annotations

from typing import Any


def policy_facts(policy: Any) -> dict[str, Any]:
    """Settings, what was noted of target and share, and a dial's range, budget and mean tokens after each block."""
    config, noted = policy.config, None if policy.noted is None else policy.noted.held(policy)
    known = {
        **({"r": config.r} if config.method.fixed else {"scores": str(config.scores)}),
        "depth": policy.depth,
        "target": noted and noted.target,
        "share": noted and noted.share,
    }
    dial = getattr(policy, "dial", None)
    if dial is not None and not policy.merge.is_meta:
        tokens = kept_at_budget(policy)
        known |= {
            "dial": f"{dial.lowest:.3g} to {dial.highest:.3g}",
            "budget": policy.budget,
            "tokens": None if tokens is None else [round(count) for count in tokens],
        }
    return {name: value for name, value in known.items() if value is not None}


def kept_at_budget(policy: Any) -> list[float] | None:
    """Mean tokens after each block at the dial's budget; None without a budget, and where all is off."""
    dial, budget = getattr(policy, "dial", None), getattr(policy, "budget", None)
    return None if dial is None or budget in (None, 1) else dial.kept_at(budget).tolist()


def policy_repr(policy: Any) -> str:
    """The repr of a policy, without its name."""
    variant = policy.config.variant
    return ", ".join([variant, *(f"{name}={_short(value)}" for name, value in policy_facts(policy).items())])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("'", "")
