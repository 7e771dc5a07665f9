"""What tokens are scored by: how alike two are, how little each wants to merge, and how important each is.

The paper's are the cosine of mean keys and the mean attention received; the others are beyond it (docs/method.md).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .ops.attend.reference import class_attention, importance_by
from .ops.match.reference import reluctance_by, similarity_metric
from .ops.probe.reference import LIFT, MERGES, PRUNES, WIDTH, matter
from .policy import Policy
from .rates import noise
from .tokens import Tokens


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
        received: float32 [B, N], mean attention received; needed where the variant goes by it.
        attended: float32 [B, N], see `attended_for`.
        probed: float32 [B, N, WIDTH + 2], see `Policy.probed`.
        protected: as in `make_plan`; read where there is a probe.
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
        attended: float32 [B, N], see `attended_for`.
        probed: float32 [B, N, WIDTH + 2], see `Policy.probed`.
        protected: as in `make_plan`; read where there is a probe.
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
