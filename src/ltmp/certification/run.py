"""Certification: a risk at every budget, on images that took no part in learning, tested from the mildest down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import dense
from ..deploy import deployed
from ..errors import LTMPError, UsageError
from ..evaluate.machine import describe_machine
from ..fingerprint import image_keys
from ..hosts.attach import attachment, is_attached
from ..method.certificate import Certificate, Tested, fingerprint_of, precision_of, weights_of
from ..method.dial import Dial
from ..method.thresholds import Thresholds
from .risks import Call, Loss, Risk
from .statistics import (
    Floats,
    PValue,
    betting_p_value,
    binomial_p_value,
    fixed_sequence,
    images_needed,
    least_images,
    upper_bound,
)

STEP = 0.05
"""Between the budgets of a dial that are tested where nobody says which."""

Batches = Iterable[tuple[Tensor, Any]]
Progress = Callable[[int, int, str], None]


@dataclass
class _Candidate:
    """A budget that is tested.

    Attributes:
        turn: called before the model, to set its budget.
        losses: [B] of each batch, bool or float64.
        hopeless: given up before the end, as its risk is clearly above the level.
    """

    budget: float
    model: Call
    turn: Callable[[], None]
    losses: list[Tensor] = field(default_factory=list)
    hopeless: bool = False

    def look(self, level: float) -> None:
        """Give up where the mean is four standard errors above the level: giving up never certifies more."""
        seen = torch.cat(self.losses).double()
        error = (max(float(seen.var(correction=0)), level * (1 - level)) / len(seen)) ** 0.5
        self.hopeless = float(seen.mean()) > level + 4 * error


@dataclass(frozen=True)
class _Subject:
    """The candidates of a certificate: models at falling budgets, and the one they are compared with.

    Attributes:
        reference: gives the dense model's output by calling what it is given (a way to look at a model) on it.
        own: thresholds whose dial is turned, or None.
    """

    candidates: list[_Candidate]
    modules: list[nn.Module]
    reference: Callable[[Callable[[Call], Tensor]], Tensor]
    own: Thresholds | None = None


def certify(
    model: nn.Module | Sequence[tuple[float, Call]],
    loader: Batches,
    risk: str | Loss = "disagree",
    at_most: float = 0.01,
    confidence: float = 0.95,
    budgets: Sequence[float] | None = None,
    *,
    limit: float = 0.05,
    images: int | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """The smallest budget of a dial whose risk is at most `at_most`, with `confidence`, on images like the loader's.

    Budgets are tested from the mildest down, each at the full level, up to the first that fails (Angelopoulos et al.,
    Learn then Test, 2021): exactly for losses of 0 and 1, by betting for others. The probability that a budget is
    certified whose risk on all images is above the level is at most 1 - `confidence`, provided that the images are
    drawn independently from those, took no part in learning, and were not chosen after looking at the result.

    >>> certificate = ltmp.certify(model, loader, at_most=0.01)
    >>> model.ltmp.set_budget(certificate.budget)

    Args:
        model: attached, with a dial, left at the budget it had, with the certificate as `model.ltmp.certificate`, which
            `ltmp.save` keeps. Or (FLOPs share, model) pairs, such as one model at lower resolutions; the one with share
            1 is what the others are compared with.
        loader: batches of images [B, C, H, W] and labels [B], -1 where there is none.
        risk: what is bounded: `disagree`, the share of images with another first choice than the dense model's;
            `error`, by how much accuracy is lower than the dense model's (needs labels; a mean of -1, 0 and 1);
            `embedding`, the share of images whose embedding is further than `limit` from the dense model's; or a
            function of (outputs [B, K], the dense model's, labels [B]) that gives bool [B], or numbers in [0, 1].
        at_most: the level that the mean risk must not exceed, in (0, 1).
        confidence: in [0.5, 1).
        budgets: FLOPs shares to test; None takes every 0.05 on the dial.
        limit: for `embedding`, distance as 1 - cosine.
        images: stop after this many; None takes all.
        device: where to run; None is where the model lies.
        amp: autocast type. A certificate is for one precision.
        progress: called with (images done, of how many or 0, what); None draws a bar in a terminal.

    Raises:
        UsageError: no dial, an unknown risk, a level or a budget out of range, labels missing, a function's value
            outside [0, 1], or too few images; the message says how many are needed.
        LTMPError: images that the thresholds were learned on, or NaN.
    """
    asked = _Asked(Risk.of(risk, limit), at_most, confidence, amp)
    known = getattr(loader, "images", 0)
    count = min(known or sys.maxsize, images or sys.maxsize)
    asked.check(count)
    subject = _dialled(model, budgets) if isinstance(model, nn.Module) else _listed(model, budgets)
    place = torch.device(device) if device else _place(subject.modules)
    with _running(subject, place, amp):
        keys = _look(subject, asked, loader, count, place, progress or _bar())
    asked.check(len(keys))
    certificate = _certificate(subject, asked, keys, place)
    if subject.own is not None:
        subject.own.certificate = certificate
    return certificate


@dataclass(frozen=True)
class _Asked:
    """The request: risk, level and confidence.

    Raises:
        UsageError: a level or a confidence out of range.
    """

    risk: Risk
    level: float
    confidence: float
    amp: torch.dtype | None

    def __post_init__(self) -> None:
        if not (0 < self.level < 1 and 0.5 <= self.confidence < 1):
            raise UsageError(
                f"at most {self.level:g} with confidence {self.confidence:g}: expected a level in (0, 1), such as 0.01 "
                "for 1 %, and a confidence from 0.5 to below 1, such as 0.95"
            )

    def check(self, count: int) -> None:
        """Refuse so few images that not even a risk of 0 on all of them would certify the level."""
        least = least_images(binomial_p_value, self.level, self.confidence)
        if count < least:
            raise UsageError(
                f"{count:,} images are too few: at most {self.level:g} with confidence {self.confidence:g} takes at "
                f"least {least:,}, and more where the risk is not 0"
            )


def _look(subject: _Subject, asked: _Asked, loader: Batches, count: int, place: torch.device, told: Progress) -> Tensor:
    """One pass over the images, all of whose losses are then in the candidates; returns their keys, int64 [N].

    Raises:
        LTMPError: some are among those that the thresholds were learned on.
    """
    seen = subject.own.seen if subject.own is not None else None
    keys: list[Tensor] = []
    learned = done = 0
    for images, labels in loader:
        images, labels = images[: count - done], _labels(labels, len(images))[: count - done]
        keys.append(image_keys(images))
        learned += seen.count(keys[-1]) if seen is not None else 0
        # what was learned on is only counted from here on
        if not learned:
            _run(subject, asked.risk, images.to(place), labels.to(place), asked.level)
        done += len(images)
        told(done, 0 if count == sys.maxsize else count, "certifying")
        if done >= count:
            break
    if learned:
        raise LTMPError(
            f"{learned:,} of these {done:,} images are among those that the thresholds were learned on, where they "
            "look better than they are: certify on others"
        )
    return torch.cat(keys) if keys else torch.empty(0, dtype=torch.int64)


def _certificate(subject: _Subject, asked: _Asked, keys: Tensor, place: torch.device) -> Certificate:
    """The tests in their order, and what they are bound to."""
    own, first = subject.own, subject.modules[0] if subject.modules else None
    # sorted by class they would not be drawn independently one after the other
    order = np.random.default_rng(0).permutation(len(keys))
    tests = [_test(one, order, asked.level, asked.confidence) for one in subject.candidates]
    tested = tuple(test for test, _ in tests)
    passed = fixed_sequence([one.p for one in tested], asked.confidence)
    return Certificate(
        risk=asked.risk.name,
        at_most=asked.level,
        confidence=asked.confidence,
        images=len(keys),
        tested=tested,
        budget=tested[passed - 1].budget if passed else None,
        more=tests[passed][1] if passed < len(tested) else None,
        learned=None if own is None or own.seen is None else own.seen.images,
        data=blake2b(keys.sort().values.numpy().tobytes(), digest_size=16).hexdigest(),
        weights=None if first is None else weights_of(first),
        thresholds=None if own is None or own.dial is None else fingerprint_of(own.dial, own.probe, own.config),
        precision="unknown" if first is None else precision_of(first, asked.amp),
        engine="none" if own is None else own.config.engine,
        machine={**describe_machine(), "ran on": _name(place)},
        limit=asked.risk.limit,
    )


def _dialled(model: nn.Module, budgets: Sequence[float] | None) -> _Subject:
    """A model with a dial, dense by `dense()`."""
    own = attachment(model).policy if is_attached(model) else None
    dial = own.dial if isinstance(own, Thresholds) else None
    if not isinstance(own, Thresholds) or dial is None:
        raise UsageError(
            "there is no dial to certify a budget of: make one with `ltmp dial` (docs/dial.md), or give a list of "
            "(share, model) pairs"
        )
    shares = _shares(dial) if budgets is None else _falling(budgets)
    for share in shares:
        dial.at(share)

    def reference(look: Callable[[Call], Tensor]) -> Tensor:
        with dense():
            return look(model)

    return _Subject([_Candidate(b, model, partial(own.set_budget, b)) for b in shares], [model], reference, own)


def _listed(pairs: Sequence[tuple[float, Call]], budgets: Sequence[float] | None) -> _Subject:
    """Models one by one, compared with the one whose share is 1."""
    models = dict(pairs)
    if len(models) != len(pairs) or 1 not in models or len(models) < 2:
        raise UsageError(
            "expected (share, model) pairs with different shares, and one of share 1 that the others are compared with"
        )
    if budgets is not None:
        raise UsageError("budgets are for a model with a dial; of a list of models give those that are to be tested")
    whole = models.pop(1)
    candidates = [_Candidate(share, models[share], lambda: None) for share in _falling(list(models))]
    modules = [one for one in (whole, *models.values()) if isinstance(one, nn.Module)]
    return _Subject(candidates, modules, lambda look: look(whole))


def _shares(dial: Dial) -> list[float]:
    """Every `STEP` on the dial, from its upper end down; of a narrow one its ends."""
    found = [round(k * STEP, 4) for k in range(round(1 / STEP) - 1, 0, -1)]
    return [share for share in found if dial.lowest <= share <= dial.highest] or [dial.highest, dial.lowest]


def _falling(budgets: Sequence[float]) -> list[float]:
    """In the order of testing, which must not depend on the data.

    Raises:
        UsageError: none, one twice, or one that is no share.
    """
    shares = sorted(set(budgets), reverse=True)
    if not shares or len(shares) < len(budgets) or not all(0 < share < 1 for share in shares):
        raise UsageError(f"budgets to test are {list(budgets)}: expected different shares between 0 and 1")
    return shares


def _place(modules: list[nn.Module]) -> torch.device:
    parameter = next((p for module in modules for p in module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _labels(labels: Any, count: int) -> Tensor:
    """Labels [B], -1 where the loader gives something else."""
    return labels if isinstance(labels, Tensor) and labels.shape == (count,) else torch.full((count,), -1)


@contextmanager
def _running(subject: _Subject, device: torch.device, amp: torch.dtype | None) -> Iterator[None]:
    """All modules deployed inside; a dial is turned back to where it was."""
    own = subject.own
    before = None if own is None else (own.merge.detach().clone(), own.prune.detach().clone(), own.asked)
    with ExitStack() as stack:
        for module in subject.modules:
            stack.enter_context(deployed(module, device, amp=amp))
        if not subject.modules:
            stack.enter_context(torch.inference_mode())
        try:
            yield
        finally:
            if own is not None and before is not None:
                own.set(before[0], before[1])
                own.asked = before[2]


def _run(subject: _Subject, risk: Risk, images: Tensor, labels: Tensor, level: float) -> None:
    """One batch through the dense model, and through each candidate that may still pass."""
    answers = subject.reference(lambda model: risk.output(model, images))
    for one in subject.candidates:
        if one.hopeless:
            continue
        one.turn()
        one.losses.append(risk.losses(risk.output(one.model, images), answers, labels))
        one.look(level)


def _test(one: _Candidate, order: Any, level: float, confidence: float) -> tuple[Tested, int | None]:
    """The measured risk of a budget, and how many more images like these would certify it."""
    kinds = {losses.dtype for losses in one.losses}
    p_value: PValue = binomial_p_value if kinds == {torch.bool} else betting_p_value
    losses: Floats = torch.cat([part.double() for part in one.losses]).numpy()
    if one.hopeless:
        return Tested(one.budget, float(losses.mean()), len(losses), 1.0, 1.0), None
    losses = losses[order]
    p = p_value(losses, level, confidence)
    needed = images_needed(p_value, losses, level, confidence) if p > 1 - confidence else None
    shown = Tested(one.budget, float(losses.mean()), len(losses), p, upper_bound(p_value, losses, confidence))
    return shown, None if needed is None else max(1, needed - len(losses))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _bar() -> Progress:
    """A line that counts, where somebody may look at it."""
    if not sys.stderr.isatty():
        return lambda done, total, text: None

    def draw(done: int, total: int, text: str) -> None:
        of, end = (f" of {total:,}", "\n" if done >= total else "") if total else ("", "")
        print(f"\r{text}: {done:,}{of} images", end=end, file=sys.stderr, flush=True)

    return draw
