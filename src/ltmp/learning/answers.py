"""What a model answers, and how far that is from the dense model's answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import dense, unmerge
from ..errors import LTMPError
from ..hosts.attach import attachment
from ..hosts.outputs import answers_in
from .inputs import Images, Inputs, call

Distribution = Literal["categorical", "bernoulli", "gaussian"]
"""How answers are read: one of several classes, by a softmax; independent yes-or-no answers, each by a sigmoid; or
numbers (features, depth, heat maps), whose distance counts relative to how much the dense model's vary."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(answers [B, ...], the dense model's) to a loss [B] of each image, which gradients go through."""


@dataclass(frozen=True)
class Judge:
    """How a model's answers are read and compared.

    Attributes:
        distribution: what they are.
        loss: the user's own, in place of the divergence.
        placed: whether there is one for each place, so that every patch must be in its own.
        labelled: whether labels can be compared with them.
        next_token: whether of a language model's answers, one for each token of the text, the last is the one.
    """

    distribution: Distribution = "categorical"
    loss: Loss | None = None
    placed: bool = False
    labelled: bool = True
    next_token: bool = False

    @classmethod
    def of(cls, model: nn.Module, images: Images, labels: Tensor | None = None, loss: Loss | None = None) -> Judge:
        """How an attached model answers `images`, of which one is enough.

        Numbers are the answers with one for each place, and those of a model without a head; of a language model, the
        answer is the next token. Independent are a single logit, the outputs of a transformers model whose
        `problem_type` is "multi_label_classification", and outputs of which labels mark several in an image, or none.
        """
        with torch.no_grad(), dense():
            output = call(model, images)
        # retrieval and segmentation by text say nothing
        speaks = isinstance(images, Inputs) and "input_ids" in images.tensors and can_generate(model)
        answers = _read(output, speaks)
        placed = answers.ndim > 2 and attachment(model).body.tokens == "reduced"
        headless = getattr(model, "num_classes", None) == 0 or not (
            isinstance(output, Tensor) or isinstance(getattr(output, "logits", None), Tensor)
        )
        if answers.ndim > 2 or (headless and not speaks):
            return cls("gaussian", loss, placed, labelled=False)
        distribution = distribution_of(model, answers, labels)
        return cls(distribution, loss, labelled=not speaks and loss is None, next_token=speaks)

    def __call__(self, model: nn.Module, images: Images) -> Tensor:
        """The model's answers [B, ...] to images."""
        with self._placing():
            return _read(call(model, images), self.next_token)

    def _placing(self) -> AbstractContextManager[Any]:
        return unmerge() if self.placed else nullcontext()

    def divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """float32 [B], Kullback-Leibler divergence of answers [B, ...] from the dense model's, or the user's loss.

        Raises:
            LTMPError: the user's loss is not one number an image.
        """
        ours, theirs = ours.float(), theirs.float()
        if self.loss is not None:
            return _checked(self.loss(ours, theirs), len(ours))
        if self.distribution == "gaussian":
            ours, theirs = ours.flatten(1), theirs.flatten(1)
            spread = theirs.var(1, unbiased=False).clamp_min(torch.finfo(torch.float32).tiny)
            return (ours - theirs).square().mean(1) / (2 * spread)
        if self.distribution == "categorical":
            return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        found = torch.zeros_like(ours)
        for sign in (1, -1):
            own, other = F.logsigmoid(sign * ours), F.logsigmoid(sign * theirs)
            found = found + F.kl_div(own, other, log_target=True, reduction="none")
        return found.sum(-1)


NO_GRADIENTS = "this host runs its blocks without gradients, so that none reaches thresholds or tokens: {}"

CLASSES = Judge()
"""Reads a classifier, whose answers exclude each other."""


@torch.no_grad()
def teacher(model: nn.Module, images: Images, judge: Judge = CLASSES) -> Tensor:
    """Answers [B, ...] of the same model with nothing removed."""
    with dense():
        return judge(model, images)


def can_generate(model: nn.Module) -> bool:
    """Whether a model of transformers goes on with a text."""
    asked = getattr(model, "can_generate", None)
    return bool(asked()) if callable(asked) else False


def _read(output: Any, next_token: bool) -> Tensor:
    answers = answers_in(output)
    return answers[:, -1] if next_token else answers


def _checked(loss: Any, images: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.shape != (images,):
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise LTMPError(f"loss= gave {found}: expected a tensor of one number for each of the {images} images")
    return loss.float()


def distribution_of(model: nn.Module, logits: Tensor, labels: Tensor | None = None) -> Distribution:
    """Whether a classifier's outputs exclude each other or are independent of each other; see `Judge.of`.

    Args:
        logits: [B, K].
        labels: some of the data set's, or None.
    """
    several = False
    if labels is not None and labels.ndim == 2 and labels.shape[1] == logits.shape[1]:
        several = bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) != 1).any())
    told = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return "bernoulli" if logits.shape[1] == 1 or told or several else "categorical"
