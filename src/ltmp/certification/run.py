"""Certification: measure a risk at every budget on images that were not learned on, and test the mildest first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import dense
from ..deploy import deployed, restored
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
"""Spacing of the budgets of a dial that are tested by default."""

Batches = Iterable[tuple[Tensor, Any]]
Progress = Callable[[int, int, str], None]


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
    """Find the smallest budget of a dial whose risk on images like the loader's is at most `at_most`.

    Budgets are tested from the mildest down, each at the full level, up to the first that fails (Angelopoulos et al.,
    Learn then Test, 2021): exactly for losses of 0 and 1, by betting for others. The probability of certifying a budget
    whose risk over all images is above the level is at most 1 - `confidence`, provided that the loader's images are
    drawn independently from those, took no part in learning, and were not chosen after seeing the result.

    >>> certificate = ltmp.certify(model, loader, at_most=0.01)
    >>> model.ltmp.set_budget(certificate.budget)

    Args:
        model: attached, with a dial; its budget does not change, and it gets the certificate as
            `model.ltmp.certificate`, which `ltmp.save` keeps. Or (FLOPs share, model) pairs, such as one model at lower
            resolutions; the others are compared with the one of share 1.
        loader: batches of images [B, C, H, W] and labels [B], -1 for images without a label.
        risk: what is bounded: `disagree`, the share of images whose top-1 class differs from the dense model's;
            `error`, by how much accuracy is below the dense model's (needs labels; a mean of -1, 0 and 1);
            `embedding`, the share of images whose embedding is further than `limit` from the dense model's; or a
            function of (outputs [B, K], the dense model's, labels [B]) that returns bool [B], or numbers in [0, 1].
        at_most: the level that the mean risk must not exceed, in (0, 1).
        confidence: in [0.5, 1).
        budgets: FLOPs shares to test; None tests every 0.05 on the dial.
        limit: for `embedding`, distance as 1 - cosine.
        images: stop after this many; None uses all.
        device: where to run; None is the model's device.
        amp: autocast dtype. A certificate is for one precision.
        progress: called with (images done, total or 0 if unknown, description); None prints a counter in a terminal.

    Raises:
        UsageError: no dial, an unknown risk, a level or a budget out of range, missing labels, a function's value
            outside [0, 1], or too few images; the message gives the number needed.
        LTMPError: images that the thresholds were learned on, or NaN.
    """
    request = _Request(Risk.of(risk, limit), at_most, confidence, amp)
    available = getattr(loader, "images", 0)
    count = min(available or sys.maxsize, images or sys.maxsize)
    request.check_images(count)
    subject = _from_dial(model, budgets) if isinstance(model, nn.Module) else _from_pairs(model, budgets)
    place = torch.device(device) if device else _device_of(subject.modules)
    with _deployed(subject, place, amp):
        keys = _measure(subject, request, loader, count, place, progress or _counter())
    request.check_images(len(keys))
    certificate = _certificate(subject, request, keys, place)
    if subject.thresholds is not None:
        subject.thresholds.certificate = certificate
    return certificate


@dataclass(frozen=True)
class _Request:
    """The requested risk, level and confidence.

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

    def check_images(self, count: int) -> None:
        """Refuse so few images that not even a risk of 0 on all of them would certify the level."""
        least = least_images(binomial_p_value, self.level, self.confidence)
        if count < least:
            raise UsageError(
                f"{count:,} images are too few: at most {self.level:g} with confidence {self.confidence:g} takes at "
                f"least {least:,}, and more where the risk is not 0"
            )


@dataclass
class _Candidate:
    """A budget to test.

    Attributes:
        set_budget: called before the model.
        losses: [B] of each batch, bool or float64.
        hopeless: given up early, because its risk is clearly above the level.
    """

    budget: float
    model: Call
    set_budget: Callable[[], None]
    losses: list[Tensor] = field(default_factory=list)
    hopeless: bool = False

    def give_up_if_hopeless(self, level: float) -> None:
        """Give up if the mean is four standard errors above the level; giving up never certifies more."""
        losses = torch.cat(self.losses).double()
        error = (max(float(losses.var(correction=0)), level * (1 - level)) / len(losses)) ** 0.5
        self.hopeless = float(losses.mean()) > level + 4 * error


@dataclass(frozen=True)
class _Subject:
    """What is certified: models at falling budgets, and the dense model that they are compared with.

    Attributes:
        modules: all models that are modules; the first is the one whose weights the certificate is bound to.
        reference: the dense model, when called inside a `context()`.
        thresholds: those whose dial is certified, or None.
    """

    candidates: list[_Candidate]
    modules: list[nn.Module]
    reference: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    thresholds: Thresholds | None = None


def _from_dial(model: nn.Module, budgets: Sequence[float] | None) -> _Subject:
    """A model at budgets of its dial, compared with itself inside `dense()`."""
    thresholds = attachment(model).policy if is_attached(model) else None
    dial = thresholds.dial if isinstance(thresholds, Thresholds) else None
    if not isinstance(thresholds, Thresholds) or dial is None:
        raise UsageError(
            "there is no dial to certify a budget of: make one with `ltmp dial` (docs/dial.md), or give a list of "
            "(share, model) pairs"
        )
    shares = _default_budgets(dial) if budgets is None else _descending(budgets)
    for share in shares:
        dial.at(share)
    candidates = [_Candidate(share, model, partial(thresholds.set_budget, share)) for share in shares]
    return _Subject(candidates, [model], model, dense, thresholds)


def _from_pairs(pairs: Sequence[tuple[float, Call]], budgets: Sequence[float] | None) -> _Subject:
    """One model per budget, compared with the one of share 1."""
    models = dict(pairs)
    if len(models) != len(pairs) or 1 not in models or len(models) < 2:
        raise UsageError(
            "expected (share, model) pairs with different shares, and one of share 1 that the others are compared with"
        )
    if budgets is not None:
        raise UsageError("budgets are for a model with a dial; of a list of models give those that are to be tested")
    reference = models.pop(1)
    candidates = [_Candidate(share, models[share], lambda: None) for share in _descending(list(models))]
    modules = [model for model in (reference, *models.values()) if isinstance(model, nn.Module)]
    return _Subject(candidates, modules, reference)


def _default_budgets(dial: Dial) -> list[float]:
    """Every `STEP` on the dial, from its upper end down; the two ends of a dial too narrow for that."""
    shares = [round(k * STEP, 4) for k in range(round(1 / STEP) - 1, 0, -1)]
    return [share for share in shares if dial.lowest <= share <= dial.highest] or [dial.highest, dial.lowest]


def _descending(budgets: Sequence[float]) -> list[float]:
    """The budgets in the order of testing, which must not depend on the data.

    Raises:
        UsageError: there are none, duplicates, or one that is not a share.
    """
    shares = sorted(set(budgets), reverse=True)
    if not shares or len(shares) < len(budgets) or not all(0 < share < 1 for share in shares):
        raise UsageError(f"budgets to test are {list(budgets)}: expected different shares between 0 and 1")
    return shares


def _device_of(modules: list[nn.Module]) -> torch.device:
    parameter = next((p for module in modules for p in module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _deployed(subject: _Subject, device: torch.device, amp: torch.dtype | None) -> Iterator[None]:
    """Deploy all modules inside; afterwards restore the thresholds and the budget of the dial."""
    with ExitStack() as stack:
        for module in subject.modules:
            stack.enter_context(deployed(module, device, amp=amp))
        if not subject.modules:
            stack.enter_context(torch.inference_mode())
        if subject.thresholds is not None:
            stack.enter_context(restored(subject.thresholds))
        yield


def _measure(
    subject: _Subject, request: _Request, loader: Batches, count: int, device: torch.device, progress: Progress
) -> Tensor:
    """Collect the candidates' losses in one pass over the images, and return the images' keys, int64 [N].

    Raises:
        LTMPError: the thresholds were learned on some of the images.
    """
    seen = subject.thresholds.seen if subject.thresholds is not None else None
    keys: list[Tensor] = []
    learned = done = 0
    for images, labels in loader:
        images, labels = images[: count - done], _labels(labels, len(images))[: count - done]
        keys.append(image_keys(images))
        learned += seen.count(keys[-1]) if seen is not None else 0
        # after the first image that was learned on, such images are only counted
        if not learned:
            _measure_batch(subject, request, images.to(device), labels.to(device))
        done += len(images)
        progress(done, 0 if count == sys.maxsize else count, "certifying")
        if done >= count:
            break
    if learned:
        raise LTMPError(
            f"{learned:,} of these {done:,} images are among those that the thresholds were learned on, where they "
            "look better than they are: certify on others"
        )
    return torch.cat(keys) if keys else torch.empty(0, dtype=torch.int64)


def _labels(labels: Any, count: int) -> Tensor:
    """Labels [B], -1 if the loader yields anything else."""
    return labels if isinstance(labels, Tensor) and labels.shape == (count,) else torch.full((count,), -1)


def _measure_batch(subject: _Subject, request: _Request, images: Tensor, labels: Tensor) -> None:
    """Run one batch through the dense model, and through each candidate that may still pass."""
    risk = request.risk
    with subject.context():
        answers = risk.output(subject.reference, images)
    for candidate in subject.candidates:
        if candidate.hopeless:
            continue
        candidate.set_budget()
        candidate.losses.append(risk.losses(risk.output(candidate.model, images), answers, labels))
        candidate.give_up_if_hopeless(request.level)


def _certificate(subject: _Subject, request: _Request, keys: Tensor, device: torch.device) -> Certificate:
    """Test the candidates in order, and bind the result to images, weights, thresholds and precision."""
    thresholds, model = subject.thresholds, subject.modules[0] if subject.modules else None
    # shuffled, because images sorted by class are not drawn independently one after the other
    order = np.random.default_rng(0).permutation(len(keys))
    tests = [_test(candidate, order, request.level, request.confidence) for candidate in subject.candidates]
    tested = tuple(test for test, _ in tests)
    passed = fixed_sequence([test.p for test in tested], request.confidence)
    return Certificate(
        risk=request.risk.name,
        at_most=request.level,
        confidence=request.confidence,
        images=len(keys),
        tested=tested,
        budget=tested[passed - 1].budget if passed else None,
        more=tests[passed][1] if passed < len(tested) else None,
        learned=None if thresholds is None or thresholds.seen is None else thresholds.seen.images,
        data=blake2b(keys.sort().values.numpy().tobytes(), digest_size=16).hexdigest(),
        weights=None if model is None else weights_of(model),
        thresholds=_fingerprint_of(thresholds),
        precision="unknown" if model is None else precision_of(model, request.amp),
        engine="none" if thresholds is None else thresholds.config.engine,
        machine={**describe_machine(), "ran on": _device_name(device)},
        limit=request.risk.limit,
    )


def _fingerprint_of(thresholds: Thresholds | None) -> str | None:
    if thresholds is None or thresholds.dial is None:
        return None
    return fingerprint_of(thresholds.dial, thresholds.probe, thresholds.config)


def _test(
    candidate: _Candidate, order: np.ndarray[Any, np.dtype[np.int64]], level: float, confidence: float
) -> tuple[Tested, int | None]:
    """The measured risk of a budget, and how many more images like these would certify it."""
    kinds = {losses.dtype for losses in candidate.losses}
    p_value: PValue = binomial_p_value if kinds == {torch.bool} else betting_p_value
    losses: Floats = torch.cat([part.double() for part in candidate.losses]).numpy()
    risk = float(losses.mean())
    if candidate.hopeless:
        return Tested(candidate.budget, risk, len(losses), 1.0, 1.0), None
    losses = losses[order]
    p = p_value(losses, level, confidence)
    needed = images_needed(p_value, losses, level, confidence) if p > 1 - confidence else None
    tested = Tested(candidate.budget, risk, len(losses), p, upper_bound(p_value, losses, confidence))
    return tested, None if needed is None else max(1, needed - len(losses))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _counter() -> Progress:
    """Print a line that counts images, if this is a terminal."""
    if not sys.stderr.isatty():
        return lambda done, total, text: None

    def draw(done: int, total: int, text: str) -> None:
        of, end = (f" of {total:,}", "\n" if done >= total else "") if total else ("", "")
        print(f"\r{text}: {done:,}{of} images", end=end, file=sys.stderr, flush=True)

    return draw
