"""What tokens are scored by: how alike two are, how little each wants to merge, and how important each is.

The paper's are the cosine of mean keys and the mean attention received; the others are beyond it (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..ops.match.reference import similarity_metric
from ..ops.probe.reference import LIFT, WIDTH
from ..ops.weigh.reference import MERGES, PRUNES, class_attention, importance_by, matter, reluctance_by
from .policy import Policy
from .rates import noise
from .tokens import Tokens


class Scores(NamedTuple):
    """What a block's plan goes by; None where nothing does.

    Attributes:
        metric: float32 [B, N, E], vectors of length one.
        importance, reluctance: float32 [B, N].
    """

    metric: Tensor | None = None
    importance: Tensor | None = None
    reluctance: Tensor | None = None


def score(
    policy: Policy,
    block: int,
    steps: tuple[str, ...],
    tokens: Tokens,
    protected: int,
    x: Tensor,
    k: Tensor,
    received: Tensor | None,
    attended: Tensor | None,
    pad: Callable[[Tensor], Tensor] = lambda values: values,
) -> Scores:
    """Score the tokens of a block for what `steps` decide, after its attention.

    Args:
        steps: as in `make_plan`; `protected`, too.
        tokens: state at this block, [B, N].
        x: [..., C], the features that attention left; k: [..., H, D], keys.
        received: float32 [B, N], mean attention received; needed to prune where the variant goes by it.
        attended: float32 [B, N], see `attended_for`.
        pad: to [B, N, ...] from how `x` and `k` are laid out.
    """
    merges, prunes = "merge" in steps, steps != ("merge",)
    probed = policy.probed(block, x)
    metric = pad(metric_for(policy, k, probed)) if merges else None
    probed = None if probed is None else pad(probed)
    importance = importance_for(policy, block, received, attended, tokens, probed, protected) if prunes else None
    reluctance = reluctance_for(policy, block, attended, tokens, probed, protected) if merges else None
    return Scores(metric, importance, reluctance)


def attended_for(policy: Policy, block: int, q: Tensor, k: Tensor, tokens: Tokens) -> Tensor | None:
    """float32 [B, N], the class token's attention, or None where nothing goes by it.

    Args:
        q, k: [B, N, H, D]; the class token is first, and of q only its row is read.
    """
    if not policy.config.asks_class:
        return None
    return class_attention(q, k, policy.weight(block, tokens.size), tokens.keep)


def metric_for(policy: Policy, k: Tensor, probed: Tensor | None) -> Tensor:
    """float32 [..., E], vectors of length one that similarity is measured on (paper, section 3.2).

    Args:
        k: [..., H, D], keys.
        probed: float32 [..., WIDTH + 2], see `Policy.probed`.
    """
    if policy.config.similarity == "probe" and probed is not None:
        return F.normalize(probed[..., :WIDTH], dim=-1)
    return similarity_metric(k, policy.config.similarity)


def importance_for(
    policy: Policy,
    block: int,
    received: Tensor | None,
    attended: Tensor | None,
    tokens: Tokens,
    probed: Tensor | None = None,
    protected: int = 0,
) -> Tensor | None:
    """float32 [B, N], what pruning goes by in `policy`'s variant; see `LTMPConfig.class_power`, too.

    Args:
        received, attended: float32 [B, N]; with `protected`, see `score`.
        probed: float32 [B, N, WIDTH + 2], see `Policy.probed`.
    """
    kind = policy.config.goes_by
    if kind == "random":
        return noise(tokens.origin, block, policy.config.seed)
    if kind == "class":
        return attended
    if kind == "probe" and received is not None and probed is not None:
        return importance_by(received, _matter(probed[..., WIDTH + 1], policy, block, tokens, protected), PRUNES)
    if received is None or attended is None:
        return received
    return importance_by(received, attended, policy.class_power(block))


def reluctance_for(
    policy: Policy,
    block: int,
    attended: Tensor | None,
    tokens: Tokens,
    probed: Tensor | None = None,
    protected: int = 0,
) -> Tensor | None:
    """float32 [B, N], how little tokens want to merge, or None where only cosines count; see `LTMPConfig.class_power`.

    Args:
        attended: float32 [B, N]; with `protected`, see `score`.
        probed: float32 [B, N, WIDTH + 2], see `Policy.probed`.
    """
    power, found, patches = policy.class_power(block), None, tokens.size * tokens.live
    if power and attended is not None:
        found = reluctance_by(attended, patches, power)
    if policy.config.similarity == "probe" and probed is not None:
        own = reluctance_by(_matter(probed[..., WIDTH], policy, block, tokens, protected), patches, MERGES)
        own = own * (1 + LIFT) ** 0.5
        found = own if found is None else found * own
    return found


def _matter(logarithm: Tensor, policy: Policy, block: int, tokens: Tokens, protected: int) -> Tensor:
    """float32 [B, N], see `ops.probe.reference.matter`."""
    return matter(logarithm, policy.weight(block, tokens.size), tokens.live & (tokens.origin >= protected))
