"""A probe of each block: from the dense model's gradients, what of a token matters to the answer, and how much.

Merging two tokens moves both by a part of their difference, and to first order the answer moves by the gradient's
product with that. So tokens are far apart where they differ along directions that gradients have (the square root of
their second moment, as in a natural gradient: Amari, Neural Computation 1998), and a token matters by how large its
gradient is. That is known only after a backward pass; but of most it can be foretold by a linear map of the token's
own features, which costs a deployed block 66 columns of a matrix product (docs/accuracy.md).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import LTMPConfig
from ..distributed import exchange
from ..errors import LTMPError
from ..hosts.attach import stack_of, thresholds_of
from ..hosts.outputs import logits_of
from ..method.thresholds import Thresholds
from ..ops.probe.reference import EPS, LIFT, WIDTH
from .progress import Progress

PROBED = 512
"""Images that a probe is learned from."""

_BATCH = 16
_RIDGE = 1e-2
_TINY = 1e-6


class _Watching(Thresholds):
    """Removes nothing, and keeps what a backward pass is to look at: each block's features, and whether tokens stay."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth, LTMPConfig("ltp"))
        self.features: dict[int, Tensor] = {}
        self.stays: dict[int, Tensor] = {}
        self.train()

    # a host that checkpoints its gradients runs blocks twice, and must find the same again

    def probed(self, block: int, x: Tensor) -> None:
        self.features.setdefault(block, x)

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        return self.stays.setdefault(block, torch.ones_like(score).requires_grad_())


def learn_probe(
    model: nn.Module,
    images: Tensor,
    *,
    amp: torch.dtype | None = None,
    progress: Progress | None = None,
) -> int:
    """Learn what an attached model's tokens are read through, and set it: `model.ltmp.probe`.

    Needs no labels: what is asked is what would change the dense model's own answer. One forward and backward pass over
    the images; nothing of the model trains.

    Args:
        images: [B, 3, H, W] on the model's device; the first `PROBED` are used.
        amp: autocast type of the passes.
        progress: called with (done, of how many, what).

    Returns:
        How many images were looked at.

    Raises:
        LTMPError: the model is no classifier, its answers or gradients are not finite, or no patch has any.
    """
    thresholds, stack = thresholds_of(model), stack_of(model)
    moments: list[_Moments] = []
    count = min(len(images), PROBED)
    with torch.inference_mode(False), torch.enable_grad():
        for part in images[:count].split(_BATCH):
            watching = _Watching(thresholds.depth).to(images.device)
            cast = torch.autocast(images.device.type, amp) if amp is not None else nullcontext()
            with stack.using(watching):
                with cast:
                    # gradients of the images, so that they reach the first block of a frozen model
                    logits = logits_of(model(part.clone().requires_grad_()))
                sure = _sureness(logits.float())
                if not sure.isfinite().all():
                    raise LTMPError("an answer is not finite: look for NaN or infinity in the images and the weights")
                looks = _gradients(sure.sum(), watching)
            moments = moments or [_Moments(x.shape[-1], x.device) for x, _, _ in looks]
            for own, (x, grad, staying) in zip(moments, looks, strict=True):
                own.add(x[:, stack.protected :], grad[:, stack.protected :], staying[:, stack.protected :])
            if progress is not None:
                progress(min(count, own.images), count, "reading what matters")
    if not moments[0].tokens:
        raise LTMPError("the model's answers do not depend on any patch: no gradient reaches the first block")
    found: list[Tensor] = []
    for own in moments:
        # behind the last attention of a head that reads the class token nothing else matters
        found.append(own.probe() if own.tokens else found[-1])
    probe = torch.stack(found)
    if not probe.isfinite().all():
        raise LTMPError("a gradient is not finite: look for infinity in the model's weights, or learn without amp")
    # ranks on unlike hardware may round unlike; and a file holds it in half precision
    thresholds.set_probe(exchange(probe.half().float().cpu())[0])
    return count


def _sureness(logits: Tensor) -> Tensor:
    """[B], the log-odds of each image's answer against all others: its gradient is large for sure images, too."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    answer = logits.argmax(1, keepdim=True)
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, answer, True), float("-inf"))
    return logits.gather(1, answer)[:, 0] - others.logsumexp(1)


def _gradients(of: Tensor, watching: _Watching) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each block its features [B, N, C], their gradient, and [B, N]: what it does that a token stays.

    A token that stays is read by all later blocks. What they make of it may cancel, so that their parts, which are the
    differences between blocks, are added up by size.
    """
    features = list(watching.features.values())
    asked = [*features, *watching.stays.values()]
    grads = torch.autograd.grad(of, asked, allow_unused=True)
    grads = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(asked, grads, strict=True))
    depth = len(features)
    stays = torch.stack(grads[depth:])
    parts = (stays - F.pad(stays[1:], (0, 0, 0, 0, 0, 1))).abs()
    staying = parts.flip(0).cumsum(0).flip(0)
    return list(zip((x.detach() for x in features), grads[:depth], staying, strict=True))


class _Moments:
    """Sums over the tokens of a block that its probe is solved from.

    Attributes:
        images, tokens: how many.
        inside: second moments within images, of normed features, then of two logarithms: of the gradient's length and
            of what it does that a token stays.
        whole: second moments of the features alone; mean: their sum.
        pull: second moments of the gradients, each image's of one mean length.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.images = self.tokens = 0
        self.inside, self.whole = zeros(width + 2, width + 2), zeros(width, width)
        self.pull, self.mean = zeros(width, width), zeros(width)

    def add(self, x: Tensor, grad: Tensor, staying: Tensor) -> None:
        """Features and their gradients [B, N, C], and [B, N]; in float32, also where the caller casts."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(x.float(), grad, staying)

    def _add(self, x: Tensor, grad: Tensor, staying: Tensor) -> None:
        spread = (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        normed, grad = F.layer_norm(x, x.shape[-1:], eps=EPS), grad.float() * spread
        length = grad.norm(dim=-1)
        self.images += len(x)
        for u, g, n, s in zip(normed, grad, length, staying.float(), strict=True):
            there = n > 0
            if not there.any():
                continue
            u, g, n, s = u[there], g[there], n[there], s[there]
            self.tokens += len(u)
            columns = torch.cat([u, self._log(n)[:, None], self._log(s)[:, None]], 1)
            columns = columns - columns.mean(0)
            self.inside += (columns.T @ columns).double()
            self.whole += (u.T @ u).double()
            self.mean += u.sum(0).double()
            g = g / n.square().mean().sqrt()
            self.pull += (g.T @ g).double()

    @staticmethod
    def _log(values: Tensor) -> Tensor:
        """Of values that are not negative, against their mean."""
        return (values / values.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_TINY).log()

    def probe(self) -> Tensor:
        """float32 [C + 1, WIDTH + 2], see `ops.probe.reference.probe`."""
        width = len(self.mean)
        moment = self.inside[:width, :width]
        ridge = _RIDGE * moment.diagonal().mean().clamp_min(_TINY) * torch.eye(width, device=moment.device)
        matters = torch.linalg.solve(moment + ridge, self.inside[:width, width:])
        values, directions = torch.linalg.eigh(self.pull)
        kept = min(width, WIDTH - 1)
        apart = directions[:, -kept:] * values[-kept:].clamp_min(0).sqrt()
        square = (apart * (self.whole @ apart)).sum() / self.tokens
        apart = F.pad(apart / (LIFT * square).clamp_min(_TINY**2).sqrt(), (0, WIDTH - kept))
        added = torch.zeros(WIDTH + 2, dtype=torch.float64, device=moment.device)
        added[WIDTH - 1] = 1.0
        # a mean of nothing: what a token matters is against others
        added[WIDTH:] = -(self.mean / self.tokens) @ matters
        return torch.cat([torch.cat([apart, matters], 1), added[None]]).float()
