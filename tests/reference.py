"""The method written down a second time, for one image, as plainly as possible; it shares no code with the package.

Tokens are a Python list in their current order, numbers are float64. It also says how close a decision was, so that a
test can leave out the cases that rounding may decide either way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltmp.config import LTMPConfig

PAPER = LTMPConfig()

STEPS = {"ltmp": ("merge", "prune"), "ltpm": ("prune", "merge"), "ltm": ("merge",), "ltp": ("prune",)}


@dataclass
class Token:
    place: int
    x: Tensor
    size: float = 1.0
    importance: float = 0.0
    attended: float = 1.0
    metric: Tensor | None = None


class OneImage:
    """One image on its way through the blocks of a timm VisionTransformer."""

    def __init__(
        self, model: Any, x: Tensor, protected: int, config: LTMPConfig = PAPER, probe: Tensor | None = None
    ) -> None:
        """`x`: [N, C] embedded tokens, of which the first `protected` are prefix tokens; `probe`: [L, C + 1, 66]."""
        self.config = config
        self.probe = probe
        self.model = copy.deepcopy(model).double().eval()
        self.tokens = [Token(place, row) for place, row in enumerate(x.double())]
        self.protected = protected
        self.margin = float("inf")

    def free(self, token: Token) -> bool:
        return token.place >= self.protected

    def attend(self, i: int) -> None:
        block = self.model.blocks[i]
        attn = block.attn
        x = torch.stack([t.x for t in self.tokens])
        q, k, v = attn.qkv(block.norm1(x)).reshape(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        size = torch.tensor([t.size for t in self.tokens], dtype=x.dtype)
        power = torch.linspace(self.config.scores.size_power, 1, len(self.model.blocks), dtype=x.dtype)[i]
        p = (q @ k.transpose(1, 2) * attn.head_dim**-0.5 + power * size.log()).softmax(-1)
        y = (p @ v).transpose(0, 1).flatten(1)
        x = x + block.ls1(attn.proj(attn.norm(y)))
        importance, metric = p.mean((0, 1)), k.mean(0) / k.mean(0).norm(dim=-1, keepdim=True)
        if self.config.scores.similarity == "heads":
            # so that a product of two is the mean of the heads' cosines
            metric = torch.cat(tuple(k / k.norm(dim=-1, keepdim=True)), -1) / attn.num_heads**0.5
        # the power rises from block to block, to all of it in the last
        power = self.config.scores.class_power * (i + 1) / len(self.model.blocks)
        importance = importance ** (1 - power) * p[:, 0].mean(0) ** power
        attended = (p[:, 0].mean(0) * size.sum()) ** (power / 2)
        if self.probe is not None:
            received = p.mean((0, 1))
            metric, importance, attended = self.read(i, x, size, received, metric, importance, attended)
        for j, token in enumerate(self.tokens):
            token.x, token.importance, token.metric = x[j], float(importance[j]), metric[j]
            token.attended = float(attended[j])

    def read(
        self, i: int, x: Tensor, size: Tensor, received: Tensor, metric: Tensor, importance: Tensor, attended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a probe puts in the place of metric, importance and what the class token attended to."""
        assert self.probe is not None
        matrix, added = self.probe[i, :-1].double(), self.probe[i, -1].double()
        centred = x - x.mean(1, keepdim=True)
        seen = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() @ matrix + added
        power = torch.linspace(self.config.scores.size_power, 1, len(self.model.blocks), dtype=x.dtype)[i]
        free = torch.tensor([self.free(t) for t in self.tokens])
        # saliency of each patch, as a share of the image
        shares = []
        for column in (64, 65):
            saliency = torch.where(free, seen[:, column].exp() * size**power, 0.0)
            shares.append(saliency / saliency.sum() if free.any() else saliency)
        if self.config.scores.similarity == "probe":
            metric = seen[:, :64] / seen[:, :64].norm(dim=1, keepdim=True)
            attended = attended * 65**0.5 * (shares[0] * size.sum()) ** 0.25
        if self.config.scores.importance == "probe":
            importance = received**0.3 * shares[1] ** 0.7
        return metric, importance, attended

    def mlp(self, i: int) -> None:
        block = self.model.blocks[i]
        x = torch.stack([t.x for t in self.tokens])
        x = x + block.ls2(block.mlp(block.norm2(x)))
        for token, row in zip(self.tokens, x, strict=True):
            token.x = row

    def nearest(self, token: Token, others: Sequence[Token]) -> tuple[float, Token | None]:
        """The highest cosine to one of the others that are free, and that one."""
        others = [t for t in others if self.free(t) and t is not token]
        if not others or not self.free(token):
            return float("-inf"), None
        ranked = sorted(((float(token.metric @ other.metric), j) for j, other in enumerate(others)), reverse=True)
        if len(ranked) > 1:
            self.margin = min(self.margin, ranked[0][0] - ranked[1][0])
        return ranked[0][0], others[ranked[0][1]]

    def score(self, cosine: float, token: Token, partner: Token) -> float:
        """What a pair's cosine counts as: less, where the class token attends to them."""
        return 1 - (1 - cosine) * token.attended * partner.attended

    def best(self) -> list[tuple[Token, float, Token | None]]:
        """The tokens that may merge, each with its score with the one that it would merge into, and that one."""
        found = self.pairs()
        return [(t, self.score(cosine, t, other) if other else cosine, other) for t, cosine, other in found]

    def pairs(self) -> list[tuple[Token, float, Token | None]]:
        """The same with plain cosines."""
        if self.config.scores.matching == "bipartite":
            return [(token, *self.nearest(token, self.tokens[1::2])) for token in self.tokens[::2]]
        pairs: list[tuple[Token, float, Token | None]] = []
        left = list(self.tokens)
        for _ in range(3):
            found = {token.place: self.nearest(token, left) for token in left}
            mutual = [
                (token, *found[token.place])
                for j, token in enumerate(left)
                if any(found[token.place][1] is t and found[t.place][1] is token for t in left[:j])
            ]
            pairs += mutual
            paired = {t.place for token, _, other in mutual for t in (token, other)}
            left = [token for token in left if token.place not in paired]
        return pairs

    def scores(self, step: str) -> list[float]:
        """What is compared with the threshold in this step."""
        if step == "merge":
            return [score for _, score, partner in self.best() if partner is not None]
        return [t.importance for t in self.tokens if self.free(t)]

    def reduce(self, step: str, threshold: float) -> None:
        if (step == "merge" and threshold >= 1) or (step == "prune" and threshold <= 0):
            return  # a step that can select nothing is left out: the order stays too
        self.margin = min([self.margin, *(abs(score - threshold) for score in self.scores(step))])
        if step == "merge":
            self._merge(threshold)
        else:
            self._prune(threshold)

    def _merge(self, threshold: float) -> None:
        groups = {t.place: [t] for t in self.tokens}
        for token, score, partner in self.best():
            if partner is not None and score > threshold:
                groups[partner.place] += groups.pop(token.place)
        if self.config.scores.matching == "bipartite":
            order = self.tokens[::2] + self.tokens[1::2]
            groups = {t.place: groups[t.place] for t in order if t.place in groups}
        self.tokens = [_combine(group) for group in groups.values()]

    def _prune(self, threshold: float) -> None:
        spared = self.protected
        top = max(self.tokens, key=lambda t: t.importance)
        self.tokens = [
            t for t in self.tokens if t.importance > threshold or not self.free(t) or (spared == 0 and t is top)
        ]

    def prefix_first(self) -> list[Token]:
        """Prefix tokens in their own order, then the others in deployed order."""
        prefix = sorted((t for t in self.tokens if not self.free(t)), key=lambda t: t.place)
        return prefix + [t for t in self.tokens if self.free(t)]

    def logits(self) -> Tensor:
        """[classes] by the host's own head, each token repeated as often as it has patches: that is what size means."""
        tokens = self.prefix_first()
        rows = torch.stack([t.x for t in tokens]).repeat_interleave(torch.tensor([round(t.size) for t in tokens]), 0)
        if len(tokens) == self.protected and self.model.global_pool != "token":
            rows = rows.repeat(2, 1)  # no patch is left: the head pools what there is
        return self.model.forward_head(self.model.norm(rows[None]))[0]


def _combine(group: Sequence[Token]) -> Token:
    size = sum(t.size for t in group)
    x = sum((t.x * (t.size / size) for t in group), start=torch.zeros_like(group[0].x))
    return Token(group[0].place, x, size, max(t.importance for t in group), group[0].metric)


@torch.no_grad()
def run(
    image: OneImage, merge: Iterable[float], prune: Iterable[float], variant: str = "ltmp"
) -> tuple[OneImage, list[int]]:
    """All blocks; returns the image and its tokens after each block."""
    counts = []
    for i, (theta_merge, theta_prune) in enumerate(zip(merge, prune, strict=True)):
        image.attend(i)
        for step in STEPS[variant]:
            image.reduce(step, float(theta_merge if step == "merge" else theta_prune))
        image.mlp(i)
        counts.append(len(image.tokens))
    return image, counts


@torch.no_grad()
def calibrate(images: Sequence[OneImage], variant: str, at: float = 0.75) -> tuple[list[float], list[float]]:
    """Thresholds that remove about `1 - at` of the candidates in each step, in the widest gap between scores nearby."""
    found: dict[str, list[float]] = {"merge": [], "prune": []}
    for i in range(len(images[0].model.blocks)):
        for image in images:
            image.attend(i)
        values = {"merge": 1.0, "prune": 0.0}
        for step in STEPS[variant]:
            scores = [score for image in images for score in image.scores(step)]
            values[step] = float(torch.tensor(_gap(scores, at if step == "merge" else 1 - at), dtype=torch.float32))
            for image in images:
                image.reduce(step, values[step])
        for image in images:
            image.mlp(i)
        for name, value in values.items():
            found[name].append(value)
    return found["merge"], found["prune"]


def _gap(scores: list[float], quantile: float) -> float:
    ordered = sorted(scores)
    if len(ordered) < 2:
        return 1.0
    at = min(max(round(quantile * len(ordered)), 1), len(ordered) - 1)
    nearby = range(max(1, at - 4), min(len(ordered), at + 5))
    i = max(nearby, key=lambda j: ordered[j] - ordered[j - 1])
    return (ordered[i] + ordered[i - 1]) / 2
