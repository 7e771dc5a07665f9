"""Learn a linear probe per block from the dense model's gradients: which differences between tokens change its answer.

Merging moves two tokens by a part of their difference, which to first order changes the answer by the product of the
gradient with that part. So the probe maps tokens to a metric in which distance is measured along the directions of
gradients (the square root of their second moment, as in a natural gradient: Amari, Neural Computation 1998), and
predicts a token's saliency, the size of its gradient. A deployed model has no gradients, but a linear map of a token's
features predicts most of this, at the cost of 66 columns of a matrix product per block (docs/accuracy.md).
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


@preserved_random_state()
def learn_probe(
    model: nn.Module,
    images: Images,
    *,
    amp: torch.dtype | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> int:
    """Learn the probe that an attached model scores tokens with, and set it as `model.ltmp.probe`.

    Needs no labels: gradients are those of the dense model's own answer. Takes one forward and backward pass over the
    images and changes no weight of the model. If the probe differs from the model's earlier one, the dial is removed,
    because it belongs to that (see `Thresholds.set_probe`).

    Args:
        images: [B, 3, H, W] on the model's device, or keyword inputs; the first `PROBED` are used.
        amp: autocast dtype of the passes.
        judge: how answers are read; by default found out from the first images.
        progress: called with (done, total, description).

    Returns:
        Number of images used.

    Raises:
        LTMPError: the model's output has no answer, its answers or gradients are not finite, or no gradient reaches a
            patch.
    """
    attached = attachment(model)
    body, thresholds = attached.body, attached.thresholds
    moments: list[_Moments] = []
    count = min(len(images), PROBED)
    # answers that are numbers are projected onto random directions
    torch.manual_seed(0)
    judge = Judge.of(model, images[:_BATCH]) if judge is None else judge
    with torch.inference_mode(False), torch.enable_grad():
        for part in images[:count].split(_BATCH):
            recorder = _Recorder(thresholds.depth).to(images.device)
            cast = torch.autocast(images.device.type, amp) if amp is not None else nullcontext()
            with running(body=replace(body, policy=recorder)):
                with cast:
                    # gradients of the images, so that they reach the first block of a frozen model
                    answer = judge.answers(model, with_gradients(part))
                confidence = _confidence(answer.float(), judge.distribution)
                if not confidence.isfinite().all():
                    raise LTMPError("an answer is not finite: look for NaN or infinity in the images and the weights")
                blocks = _gradients(confidence.sum(), recorder)
            moments = moments or [_Moments(x.shape[-1], x.device) for x, _, _ in blocks]
            for block, (x, grad, keeping) in zip(moments, blocks, strict=True):
                block.add(x[:, body.protected :], grad[:, body.protected :], keeping[:, body.protected :])
            if progress is not None:
                progress(min(count, moments[0].images), count, "learning the probe")
    if not moments[0].tokens:
        raise LTMPError("the model's answers do not depend on any patch: no gradient reaches the first block")
    probes: list[Tensor] = []
    for block in moments:
        # with a class-token head, no patch has a gradient after the last attention: such a block takes the one before
        probes.append(block.probe() if block.tokens else probes[-1])
    probe = torch.stack(probes)
    if not probe.isfinite().all():
        raise LTMPError("a gradient is not finite: look for infinity in the model's weights, or learn without amp")
    # rank 0's, because different hardware may round differently; in half precision, as files store it
    thresholds.set_probe(exchange(probe.half().float().cpu())[0])
    return count


class _Recorder(Thresholds):
    """Removes nothing, and records the tensors to differentiate by: each block's features and its keep mask."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth, LTMPConfig("ltp"))
        self.features: dict[int, Tensor] = {}
        self.keeps: dict[int, Tensor] = {}
        self.train().requires_grad_(True)

    # setdefault: under gradient checkpointing blocks run twice, and must get the same tensors

    def probed(self, block: int, x: Tensor) -> None:
        self.features.setdefault(block, x)

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        return self.keeps.setdefault(block, torch.ones_like(score).requires_grad_())


def _confidence(logits: Tensor, distribution: Distribution = "categorical") -> Tensor:
    """Log-odds of each image's own answer against all others, [B]: unlike probabilities, they do not saturate.

    Independent outputs each have an answer of their own, yes or no, and their log-odds are summed. Numbers are
    projected onto a random direction: the second moments of its gradient are those of the squared error (the
    Gauss-Newton matrix).
    """
    if distribution == "gaussian":
        numbers = logits.flatten(1)
        return (numbers * torch.randn(numbers.shape).to(numbers.device)).mean(1)
    if distribution == "bernoulli":
        return logits.abs().sum(1)
    answer = logits.argmax(1, keepdim=True)
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, answer, True), float("-inf"))
    return logits.gather(1, answer)[:, 0] - others.logsumexp(1)


def _gradients(of: Tensor, recorder: _Recorder) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each block its features [B, N, C], their gradient [B, N, C], and the effect of keeping each token [B, N].

    All later blocks read a token that is kept. Their contributions, the differences of the mask's gradient between
    successive blocks, may cancel, so their absolute values are summed.
    """
    features = list(recorder.features.values())
    if not all(x.requires_grad for x in features):
        raise LTMPError(NO_GRADIENTS.format("scores with a probe need them: attach with others, such as 'attention'"))
    inputs = [*features, *recorder.keeps.values()]
    grads = torch.autograd.grad(of, inputs, allow_unused=True)
    grads = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))
    depth = len(features)
    keeps = torch.stack(grads[depth:])
    contributions = (keeps - F.pad(keeps[1:], (0, 0, 0, 0, 0, 1))).abs()
    keeping = contributions.flip(0).cumsum(0).flip(0)
    return list(zip((x.detach() for x in features), grads[:depth], keeping, strict=True))


class _Moments:
    """Sums over the tokens of a block, from which its probe is computed.

    Attributes:
        images, tokens: numbers of images and of tokens with a gradient.
        centred: second moments, centred within each image, of the normalised features and of two log saliencies: the
            length of the gradient, and the effect of keeping the token.
        plain: second moments of the normalised features, not centred.
        sum: sum of the normalised features.
        gradients: second moments of the gradients, scaled to the same mean length in each image.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.images = self.tokens = 0
        self.centred, self.plain = zeros(width + 2, width + 2), zeros(width, width)
        self.gradients, self.sum = zeros(width, width), zeros(width)

    def add(self, x: Tensor, grad: Tensor, keeping: Tensor) -> None:
        """Add features and their gradients [B, N, C], and effects of keeping [B, N]; float32 even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(x.float(), grad, keeping)

    def _add(self, x: Tensor, grad: Tensor, keeping: Tensor) -> None:
        spread = (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        normed, grad = F.layer_norm(x, x.shape[-1:], eps=EPS), grad.float() * spread
        length = grad.norm(dim=-1)
        self.images += len(x)
        for u, g, n, s in zip(normed, grad, length, keeping.float(), strict=True):
            reached = n > 0
            if not reached.any():
                continue
            u, g, n, s = u[reached], g[reached], n[reached], s[reached]
            self.tokens += len(u)
            columns = torch.cat([u, self._log(n)[:, None], self._log(s)[:, None]], 1)
            columns = columns - columns.mean(0)
            self.centred += (columns.T @ columns).double()
            self.plain += (u.T @ u).double()
            self.sum += u.sum(0).double()
            g = g / n.square().mean().sqrt()
            self.gradients += (g.T @ g).double()

    @staticmethod
    def _log(values: Tensor) -> Tensor:
        """Logarithm of non-negative values relative to their mean."""
        return (values / values.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_TINY).log()

    def probe(self) -> Tensor:
        """float32 [C + 1, WIDTH + 2], see `ops.probe.reference.probe`."""
        width = len(self.sum)
        moment = self.centred[:width, :width]
        ridge = _RIDGE * moment.diagonal().mean().clamp_min(_TINY) * torch.eye(width, device=moment.device)
        saliency = torch.linalg.solve(moment + ridge, self.centred[:width, width:])
        values, directions = torch.linalg.eigh(self.gradients)
        kept = min(width, WIDTH - 1)
        metric = directions[:, -kept:] * values[-kept:].clamp_min(0).sqrt()
        square = (metric * (self.plain @ metric)).sum() / self.tokens
        metric = F.pad(metric / (LIFT * square).clamp_min(_TINY**2).sqrt(), (0, WIDTH - kept))
        bias = torch.zeros(WIDTH + 2, dtype=torch.float64, device=moment.device)
        bias[WIDTH - 1] = 1.0
        # saliency is relative to other tokens: log saliencies have mean 0
        bias[WIDTH:] = -(self.sum / self.tokens) @ saliency
        return torch.cat([torch.cat([metric, saliency], 1), bias[None]]).float()
