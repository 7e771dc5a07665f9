"""Answers of a model, and how far they are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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
"""How answers are read: as one of several classes, by a softmax; as independent yes-or-no answers, each by a sigmoid;
or as numbers (features, depth, heat maps), whose distance counts relative to the variance of the dense model's."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From answers [B, ...] and the dense model's to the loss of each image [B], differentiable."""


@dataclass(frozen=True)
class Judge:
    """How a model's answers are read and compared.

    Attributes:
        distribution: the kind of answers.
        loss: the user's own, in place of the divergence.
        placed: whether answers belong to positions, so that the features of every patch must be put back in its place.
        labelled: whether labels can be compared with the answers.
        next_token: whether the answer is the last of a language model's, which has one for each token of the text.
    """

    distribution: Distribution = "categorical"
    loss: Loss | None = None
    placed: bool = False
    labelled: bool = True
    next_token: bool = False

    @classmethod
    def of(cls, model: nn.Module, images: Images, labels: Tensor | None = None, loss: Loss | None = None) -> Judge:
        """Find out how an attached model's answers are read, from `images`, of which one is enough.

        The answer of a language model is the next token. Answers are numbers if there is one for each position, or if
        the model has no head. They are independent if the model has a single logit, if it is a transformers model whose
        `problem_type` is "multi_label_classification", or if the labels mark several classes, or none, in an image.
        """
        with torch.no_grad(), dense():
            output = call(model, images)
        # retrieval and segmentation by text read a text, but generate none
        generates = isinstance(images, Inputs) and "input_ids" in images.tensors and _can_generate(model)
        answers = _read(output, generates)
        placed = answers.ndim > 2 and attachment(model).body.tokens == "reduced"
        headless = getattr(model, "num_classes", None) == 0 or not (
            isinstance(output, Tensor) or isinstance(getattr(output, "logits", None), Tensor)
        )
        if answers.ndim > 2 or (headless and not generates):
            return cls("gaussian", loss, placed, labelled=False)
        distribution = _distribution(model, answers, labels)
        return cls(distribution, loss, labelled=not generates and loss is None, next_token=generates)

    def answers(self, model: nn.Module, images: Images) -> Tensor:
        """The model's answers [B, ...] to images."""
        with unmerge() if self.placed else nullcontext():
            return _read(call(model, images), self.next_token)

    def divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Kullback-Leibler divergence of answers [B, ...] from the dense model's, or the user's loss; float32 [B].

        Raises:
            LTMPError: the user's loss does not return one number per image.
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
        total = torch.zeros_like(ours)
        for sign in (1, -1):
            our_log, their_log = F.logsigmoid(sign * ours), F.logsigmoid(sign * theirs)
            total = total + F.kl_div(our_log, their_log, log_target=True, reduction="none")
        return total.sum(-1)


CLASSES = Judge()
"""For classifiers whose classes exclude each other."""

NO_GRADIENTS = "this host runs its blocks without gradients, so that none reaches thresholds or tokens: {}"


@torch.no_grad()
def dense_answers(model: nn.Module, images: Images, judge: Judge = CLASSES) -> Tensor:
    """Answers [B, ...] of the same model with nothing removed."""
    with dense():
        return judge.answers(model, images)


def _can_generate(model: nn.Module) -> bool:
    """Whether a transformers model generates text."""
    method = getattr(model, "can_generate", None)
    return bool(method()) if callable(method) else False


def _read(output: Any, next_token: bool) -> Tensor:
    answers = answers_in(output)
    return answers[:, -1] if next_token else answers


def _distribution(model: nn.Module, logits: Tensor, labels: Tensor | None) -> Distribution:
    """Whether a classifier's outputs [B, K] exclude each other or are independent, see `Judge.of`."""
    several = False
    if labels is not None and labels.ndim == 2 and labels.shape[1] == logits.shape[1]:
        several = bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) != 1).any())
    multi_label = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return "bernoulli" if logits.shape[1] == 1 or multi_label or several else "categorical"


def _checked(loss: Any, images: int) -> Tensor:
    """The user's loss as float32, if it is one number per image."""
    if not isinstance(loss, Tensor) or loss.shape != (images,):
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise LTMPError(f"loss= gave {found}: expected a tensor of one number for each of the {images} images")
    return loss.float()
