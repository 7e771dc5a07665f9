"""Learn a linear probe per block from the dense model's gradients: which differences between tokens change its answer.

Merging moves two tokens by a part of their difference, and to first order the answer changes by the product of the
gradient with that. So the probe maps tokens to a metric in which distance is taken along the directions of gradients
(the square root of their second moment, as in a natural gradient: Amari, Neural Computation 1998), and predicts how
large a token's gradient is, its saliency. A deployed model has no gradients, but a linear map of a token's features
predicts most of that, for 66 columns of a matrix product per block (docs/accuracy.md).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import LTMPConfig
from ..distributed import exchange
from ..engines.body import running
from ..errors import LTMPError
from ..hosts.attach import attachment
from ..method.thresholds import Thresholds
from ..ops.probe.reference import EPS, LIFT, WIDTH
from .answers import NO_GRADIENTS, Distribution, Judge
from .inputs import Images, with_gradients
from .progress import Progress
from .randomness import preserved_random_state

PROBED = 512
"""Images that a probe is learned from."""

_BATCH = 16
_RIDGE = 1e-2
_TINY = 1e-6


class _Watching(Thresholds):
    """Removes nothing, and records the tensors to differentiate by: each block's features and its keep mask."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth, LTMPConfig("ltp"))
        self.features: dict[int, Tensor] = {}
        self.stays: dict[int, Tensor] = {}
        self.train().requires_grad_(True)

    # setdefault: under gradient checkpointing blocks run twice, and must find the same tensors

    def probed(self, block: int, x: Tensor) -> None:
        self.features.setdefault(block, x)

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        return self.stays.setdefault(block, torch.ones_like(score).requires_grad_())


@preserved_random_state()
def learn_probe(
    model: nn.Module,
    images: Images,
    *,
    amp: torch.dtype | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> int:
    """Learn the probe that an attached model scores tokens with, and set it: `model.ltmp.probe`.

    Needs no labels: gradients are those of the dense model's own answer. One forward and backward pass over the images;
    no weight of the model changes. A dial of the model is removed, because it belongs to the probe that it had before
    (see `Thresholds.set_probe`).

    Args:
        images: [B, 3, H, W] on the model's device, or keywords; the first `PROBED` are used.
        amp: autocast type of the passes.
        judge: how answers are read; found out by default.
        progress: called with (done, of how many, what).

    Returns:
        Number of images used.

    Raises:
        LTMPError: the model is no classifier, its answers or gradients are not finite, or no gradient reaches a patch.
    """
    made = attachment(model)
    body, thresholds = made.body, made.thresholds
    moments: list[_Moments] = []
    count = min(len(images), PROBED)
    # directions of numbers are drawn
    torch.manual_seed(0)
    judge = Judge.of(model, images[:_BATCH]) if judge is None else judge
    with torch.inference_mode(False), torch.enable_grad():
        for part in images[:count].split(_BATCH):
            watching = _Watching(thresholds.depth).to(images.device)
            cast = torch.autocast(images.device.type, amp) if amp is not None else nullcontext()
            with running(body=replace(body, policy=watching)):
                with cast:
                    # gradients of the images, so that they reach the first block of a frozen model
                    answer = judge(model, with_gradients(part))
                sure = _sureness(answer.float(), judge.distribution)
                if not sure.isfinite().all():
                    raise LTMPError("an answer is not finite: look for NaN or infinity in the images and the weights")
                looks = _gradients(sure.sum(), watching)
            moments = moments or [_Moments(x.shape[-1], x.device) for x, _, _ in looks]
            for own, (x, grad, staying) in zip(moments, looks, strict=True):
                own.add(x[:, body.protected :], grad[:, body.protected :], staying[:, body.protected :])
            if progress is not None:
                progress(min(count, own.images), count, "learning the probe")
    if not moments[0].tokens:
        raise LTMPError("the model's answers do not depend on any patch: no gradient reaches the first block")
    found: list[Tensor] = []
    for own in moments:
        # after the last attention, no patch of a class-token head has a gradient: such a block takes the one before
        found.append(own.probe() if own.tokens else found[-1])
    probe = torch.stack(found)
    if not probe.isfinite().all():
        raise LTMPError("a gradient is not finite: look for infinity in the model's weights, or learn without amp")
    # rank 0's, because other hardware may round differently; in half precision, as files hold it
    thresholds.set_probe(exchange(probe.half().float().cpu())[0])
    return count


def _sureness(logits: Tensor, distribution: Distribution = "categorical") -> Tensor:
    """[B], log-odds of each image's own answer against all others: unlike probabilities, they do not saturate.

    Independent outputs each have an answer of their own, yes or no, whose log-odds are summed. Numbers are projected
    onto a random direction: second moments of its gradient are those of the squared error (the Gauss-Newton matrix).
    """
    if distribution == "gaussian":
        numbers = logits.flatten(1)
        return (numbers * torch.randn(numbers.shape).to(numbers.device)).mean(1)
    if distribution == "bernoulli":
        return logits.abs().sum(1)
    answer = logits.argmax(1, keepdim=True)
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, answer, True), float("-inf"))
    return logits.gather(1, answer)[:, 0] - others.logsumexp(1)


def _gradients(of: Tensor, watching: _Watching) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each block its features [B, N, C], their gradient [B, N, C], and the effect of keeping each token [B, N].

    A token that is kept is read by all later blocks. Their contributions, the differences of the mask's gradient
    between successive blocks, may cancel, so that their absolute values are summed.
    """
    features = list(watching.features.values())
    if not all(x.requires_grad for x in features):
        raise LTMPError(NO_GRADIENTS.format("scores with a probe need them: attach with others, such as 'attention'"))
    asked = [*features, *watching.stays.values()]
    grads = torch.autograd.grad(of, asked, allow_unused=True)
    grads = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(asked, grads, strict=True))
    depth = len(features)
    stays = torch.stack(grads[depth:])
    parts = (stays - F.pad(stays[1:], (0, 0, 0, 0, 0, 1))).abs()
    staying = parts.flip(0).cumsum(0).flip(0)
    return list(zip((x.detach() for x in features), grads[:depth], staying, strict=True))


class _Moments:
    """Sums over the tokens of a block that its probe is computed from.

    Attributes:
        images, tokens: their numbers.
        inside: second moments, centred within each image, of the normed features and of two log saliencies: the length
            of the gradient, and the effect of keeping the token.
        whole: second moments of the normed features; mean: their sum.
        pull: second moments of the gradients, scaled to the same mean length in each image.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.images = self.tokens = 0
        self.inside, self.whole = zeros(width + 2, width + 2), zeros(width, width)
        self.pull, self.mean = zeros(width, width), zeros(width)

    def add(self, x: Tensor, grad: Tensor, staying: Tensor) -> None:
        """Add features and their gradients [B, N, C], and effects of keeping [B, N]; float32 even under autocast."""
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
        """Logarithm of non-negative values relative to their mean."""
        return (values / values.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_TINY).log()

    def probe(self) -> Tensor:
        """float32 [C + 1, WIDTH + 2], see `ops.probe.reference.probe`."""
        width = len(self.mean)
        moment = self.inside[:width, :width]
        ridge = _RIDGE * moment.diagonal().mean().clamp_min(_TINY) * torch.eye(width, device=moment.device)
        saliency = torch.linalg.solve(moment + ridge, self.inside[:width, width:])
        values, directions = torch.linalg.eigh(self.pull)
        kept = min(width, WIDTH - 1)
        metric = directions[:, -kept:] * values[-kept:].clamp_min(0).sqrt()
        square = (metric * (self.whole @ metric)).sum() / self.tokens
        metric = F.pad(metric / (LIFT * square).clamp_min(_TINY**2).sqrt(), (0, WIDTH - kept))
        bias = torch.zeros(WIDTH + 2, dtype=torch.float64, device=moment.device)
        bias[WIDTH - 1] = 1.0
        # saliency is relative to other tokens: log saliencies have mean 0
        bias[WIDTH:] = -(self.mean / self.tokens) @ saliency
        return torch.cat([torch.cat([metric, saliency], 1), bias[None]]).float()
