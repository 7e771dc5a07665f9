"""Scores of a block's tokens: similarity of pairs, merge penalty and importance of each token.

In the paper, similarity is the cosine of mean keys (section 3.2) and importance the mean attention received (section
3.3), without merge penalties; `config.Scores` lists the alternatives (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..config import Scores
from ..ops import KERNEL_IMPORTANCES, KERNEL_SIMILARITIES
from ..ops.match.reference import similarity_metric, unit
from ..ops.probe.reference import LIFT, WIDTH
from ..ops.weigh import reference as weigh
from .policy import Policy
from .rates import noise
from .tokens import Tokens


class BlockScores(NamedTuple):
    """Scores of the tokens of a block; None if no step needs them.

    Attributes:
        metric: float32 [B, N, E], unit vectors whose dot product is the similarity of two tokens.
        importance: float32 [B, N]; tokens above the prune threshold are kept.
        merge_penalty: float32 [B, N], positive: a pair's score is 1 - (1 - similarity) times both penalties.
    """

    metric: Tensor | None = None
    importance: Tensor | None = None
    merge_penalty: Tensor | None = None


@dataclass(frozen=True)
class Signals:
    """Inputs of importance and merge penalty; None if the scores do not need them.

    Attributes:
        tokens: state at the block, [B, N].
        protected: number of prefix tokens, for which a probe predicts nothing.
        received: float32 [B, N], mean attention received (paper, section 3.3).
        attended: float32 [B, N], attention from the class token, see `attended_for`.
        probed: float32 [B, N, WIDTH + 2], see `Policy.probed`.
    """

    tokens: Tokens
    protected: int = 0
    received: Tensor | None = None
    attended: Tensor | None = None
    probed: Tensor | None = None

    def saliency(self, policy: Policy, block: int, column: int) -> Tensor:
        """float32 [B, N], each token's share of its image's saliency, from a column of the probe."""
        assert self.probed is not None
        patch = self.tokens.live & (self.tokens.origin >= self.protected)
        return weigh.saliency(self.probed[..., column], policy.weight(block, self.tokens.size), patch)


def has_kernels(scores: Scores) -> bool:
    """Whether kernels compute these scores; if not, engines run in plain torch."""
    return scores.similarity in KERNEL_SIMILARITIES and scores.importance in KERNEL_IMPORTANCES


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
) -> BlockScores:
    """Score the tokens of a block for `steps`, after its attention.

    Args:
        steps, protected: as in `make_plan`.
        tokens: state at this block, [B, N].
        x: [..., C], features after the attention's residual; k: [..., H, D], keys.
        received, attended: float32 [B, N], see `Signals`.
        pad: converts the layout of `x` and `k` to [B, N, ...].
    """
    probed = policy.probed(block, x)
    signals = Signals(tokens, protected, received, attended, None if probed is None else pad(probed))
    merges, prunes = "merge" in steps, steps != ("merge",)
    return BlockScores(
        pad(metric(policy.config.scores, k, probed)) if merges else None,
        importance(policy, block, signals) if prunes else None,
        merge_penalty(policy, block, signals) if merges else None,
    )


def attended_for(policy: Policy, block: int, q: Tensor, k: Tensor, tokens: Tokens) -> Tensor | None:
    """float32 [B, N], attention from the class token, or None if the scores do not need it.

    Args:
        q, k: [B, N, H, D]; the class token comes first, and only its query is read.
    """
    if not policy.config.needs_class_attention:
        return None
    return weigh.class_attention(q, k, policy.weight(block, tokens.size), tokens.keep)


def metric(scores: Scores, k: Tensor, probed: Tensor | None) -> Tensor:
    """float32 [..., E], unit vectors whose dot product is the similarity (paper, section 3.2).

    Args:
        k: [..., H, D], keys.
        probed: float32 [..., WIDTH + 2], see `Policy.probed`.
    """
    if scores.probes_similarity:
        assert probed is not None
        return unit(probed[..., :WIDTH])
    return similarity_metric(k, scores.similarity)


def importance(policy: Policy, block: int, signals: Signals) -> Tensor | None:
    """float32 [B, N], the importance that a block prunes by; see `config.Scores`.

    Raises:
        ValueError: the importance of the scores is unknown.
    """
    kind, received = policy.config.scores.importance, signals.received
    if kind == "random":
        return noise(signals.tokens.origin, block, policy.config.seed)
    if kind == "class":
        return signals.attended
    if kind == "probe":
        assert received is not None
        return weigh.blend(received, signals.saliency(policy, block, WIDTH + 1), weigh.PRUNE_POWER)
    if kind != "received":
        raise ValueError(f"unknown importance {kind!r}")
    if received is None or signals.attended is None:
        return received
    return weigh.blend(received, signals.attended, policy.class_power(block))


def merge_penalty(policy: Policy, block: int, signals: Signals) -> Tensor | None:
    """float32 [B, N], positive, see `BlockScores`; None if the scores have no penalty."""
    power, penalty = policy.class_power(block), None
    patches = signals.tokens.size * signals.tokens.live
    if power and signals.attended is not None:
        penalty = weigh.merge_penalty(signals.attended, patches, power)
    if policy.config.scores.probes_similarity:
        probed = weigh.merge_penalty(signals.saliency(policy, block, WIDTH), patches, weigh.MERGE_POWER)
        # `LIFT` moves all cosines close to 1: scale the 1 - cosine of a pair up again, by 1 + LIFT
        probed = probed * (1 + LIFT) ** 0.5
        penalty = probed if penalty is None else penalty * probed
    return penalty
