"""Fixed-rate methods on one image of a timm VisionTransformer, in float64 and written without the package's code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Score = Callable[[int, list[int]], Tensor]


@torch.no_grad()
def run(
    model: Any, x: Tensor, variant: str, merges: list[float], prunes: list[float], noise: Score | None = None
) -> tuple[Tensor, list[int]]:
    """Logits and token counts of one image [N, C]; rates below 1 are parts of the free tokens."""
    model, x = copy.deepcopy(model).double(), x.double()
    protected = model.num_prefix_tokens
    size, where, counts = torch.ones(len(x)).double(), list(range(len(x))), []
    steps = {"m": "m", "p": "p", "mp": "mp", "pm": "pm", "topk": "p", "evit": "f", "random": "p"}[variant]
    for i, block in enumerate(model.blocks):
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).reshape(len(x), 3, a.num_heads, -1).permute(1, 2, 0, 3)
        p = (a.q_norm(q) @ a.k_norm(k).transpose(1, 2) * q.shape[-1] ** -0.5 + size.log()).softmax(-1)
        x = x + block.ls1(a.proj((p @ v).transpose(0, 1).flatten(1)))
        metric = torch.nn.functional.normalize(a.k_norm(k).mean(0), dim=-1)
        score = p[:, 0].mean(0) if variant in ("topk", "evit") else p.mean((0, 1))
        if noise is not None:
            score = noise(i, where).double()
        for step in steps:
            free = [t for t, origin in enumerate(where) if origin >= protected]
            if step == "m":
                evens, odds = [t for t in free if t % 2 == 0], [t for t in free if t % 2]
                rate = merges[i] if isinstance(merges[i], int) else int(merges[i] * 2 * len(evens))
                cosine = metric[evens] @ metric[odds].T if odds else torch.zeros(len(evens), 0)
                best, partner = cosine.max(1) if odds else (torch.zeros(0), torch.zeros(0).long())
                groups: dict[int, list[int]] = {}
                for e in best.argsort(descending=True)[: int(rate)].tolist():
                    groups.setdefault(odds[int(partner[e])], []).append(evens[e])
                for receiver, members in groups.items():
                    group = [receiver, *members]
                    x[receiver] = (x[group] * size[group, None]).sum(0) / size[group].sum()
                    size[receiver] = size[group].sum()
                    score[receiver] = score[group].max()
                gone = {t for members in groups.values() for t in members}
                # a block without merging keeps its order
                order = [*range(0, len(x), 2), *range(1, len(x), 2)] if merges[i] else range(len(x))
                kept = [t for t in order if t not in gone]
            else:
                if protected == 0:
                    free.remove(int(score.argmax()))
                rate = prunes[i] if isinstance(prunes[i], int) else int(prunes[i] * len(free))
                gone = set(sorted(free, key=lambda t: float(score[t]))[: int(rate)])
                if step == "f" and gone:
                    receiver, group = max(gone, key=lambda t: float(score[t])), sorted(gone)
                    x[receiver] = (x[group] * score[group, None]).sum(0) / score[group].sum()
                    size[receiver] = size[group].sum()
                    gone.remove(receiver)
                kept = [t for t in range(len(x)) if t not in gone]
            x, size, metric, score = x[kept], size[kept], metric[kept], score[kept]
            where = [where[t] for t in kept]
        x = x + block.ls2(block.mlp(block.norm2(x)))
        counts.append(len(x))
    x = model.norm(x)
    if model.global_pool == "avg":
        patches = [t for t, origin in enumerate(where) if origin >= protected]
        pooled = (x[patches] * size[patches, None]).sum(0) / size[patches].sum()
    else:
        pooled = x[where.index(0)]
    return model.head(model.fc_norm(pooled)), counts
