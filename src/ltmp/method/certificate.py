"""A certificate: the smallest budget shown to have a low enough risk, the tests that showed it, and its conditions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LTMPConfig
from ..errors import LTMPError, UsageError
from ..fingerprint import of_tensors
from .dial import Dial


@dataclass(frozen=True)
class Tested:
    """The test of one budget.

    Attributes:
        budget: FLOPs share.
        risk: mean loss over `images`.
        images: number of images measured; fewer than the certificate's if the risk was clearly too high early on.
        p: p-value of the hypothesis that the risk of all images is the level or more; 1 if the test was stopped early.
        upper: upper bound on that risk at the certificate's confidence, for this budget alone.
    """

    budget: float
    risk: float
    images: int
    p: float
    upper: float


@dataclass(frozen=True)
class Certificate:
    """With `confidence`, the risk at `budget` is at most `at_most`, on images like those that it was measured on.

    Attributes:
        risk: `disagree`, `error`, `embedding`, or the name of a function.
        at_most: the requested level.
        confidence: the requested confidence.
        images: number of images that the budgets were tested on.
        tested: budgets in the order of testing, mildest first.
        budget: the smallest certified budget, or None.
        more: how many more images would certify the next budget, if they are like these; None if none would.
        learned: number of images that the thresholds were learned on and that these were compared with; None if
            unknown.
        data, weights, thresholds: fingerprints of the images, of the model's own weights, and of the dial.
        precision: precision of the model, see `precision_of`.
        engine, machine: what the model ran on; any other of the same precision leaves the certificate valid.
        limit: for `embedding`, the distance 1 - cosine above which an embedding counts as different.
    """

    risk: str
    at_most: float
    confidence: float
    images: int
    tested: tuple[Tested, ...]
    budget: float | None
    more: int | None
    learned: int | None
    data: str
    weights: str | None
    thresholds: str | None
    precision: str
    engine: str
    machine: dict[str, Any]
    limit: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON types."""
        return {**asdict(self), "tested": [asdict(test) for test in self.tested]}

    @classmethod
    def from_dict(cls, values: Any, source: str = "this certificate") -> Certificate:
        """Return the certificate that `to_dict` wrote.

        Raises:
            LTMPError: `values` are not a certificate, or contradict each other.
        """
        try:
            known = {field.name for field in fields(cls)}
            if set(values) != known:
                raise ValueError(f"unexpected or missing {', '.join(sorted(set(values) ^ known))}")
            certificate = cls(**{**values, "tested": tuple(Tested(**test) for test in values["tested"])})
            certificate._check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise LTMPError(f"{source} is not a certificate ({error}): make it again with `ltmp certify`") from error
        return certificate

    def _check(self) -> None:
        """Raise ValueError or TypeError if a value has the wrong type or range."""
        if not self.tested:
            raise ValueError("no budget was tested")
        for name in ("risk", "data", "precision", "engine"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected text")
        for name in ("weights", "thresholds"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected a fingerprint")
        if not (0 < self.at_most < 1 and 0 < self.confidence < 1):
            raise ValueError(f"at most {self.at_most!r} with confidence {self.confidence!r}: expected parts of 1")
        counts = [self.images, *(test.images for test in self.tested)]
        counts += [count for count in (self.more, self.learned) if count is not None]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("numbers of images must be whole and not negative")
        numbers = [number for test in self.tested for number in (test.budget, test.risk, test.p, test.upper)]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("a number of the tests is not finite")
        certified = self.tested[: self._passed]
        if self.budget != (certified[-1].budget if certified else None):
            raise ValueError(f"its budget {self.budget!r} is not the last one that its own tests passed")

    @property
    def _passed(self) -> int:
        """Number of budgets that passed before the first that failed."""
        failed = (i for i, test in enumerate(self.tested) if test.p > 1 - self.confidence)
        return next(failed, len(self.tested))

    @property
    def found(self) -> Tested | None:
        """The test of the certified budget, or None."""
        return self.tested[self._passed - 1] if self._passed else None

    @property
    def failed(self) -> Tested | None:
        """The test that failed and ended testing, or None if all passed."""
        return self.tested[self._passed] if self._passed < len(self.tested) else None

    @property
    def out_of_order(self) -> tuple[float, ...]:
        """Budgets that would have passed if a milder one had not failed: the risk is not monotonic in the budget."""
        return tuple(test.budget for test in self.tested[self._passed + 1 :] if test.p <= 1 - self.confidence)

    def promise(self) -> str:
        """What is certified, in words."""
        percent = f"{100 * self.at_most:.3g}"
        return {
            "disagree": f"at most {percent} % of answers differ from the dense model's",
            "error": f"accuracy is at most {percent} points below the dense model's",
            "embedding": f"at most {percent} % of embeddings are further than {self.limit} from the dense model's",
        }.get(self.risk, f"the mean of {self.risk} is at most {self.at_most:g}")

    def sentence(self) -> str:
        """The result in one sentence."""
        confidence = f"with {100 * self.confidence:.3g} % confidence"
        certified, failed = self.found, self.failed
        if certified is None:
            mildest = f"{self.tested[0].budget:g}"
            sentence = f"no budget is certified: not even {mildest} showed {confidence} that {self.promise()}"
        else:
            sentence = f"budget {certified.budget:g}: {confidence} {self.promise()}"
        measured = certified or self.tested[0]
        sentence += f" ({100 * measured.risk:.3g} % on {measured.images:,} images, {self.precision})"
        if self.out_of_order and failed is not None:
            passed = f"{self.out_of_order[0]:g}"
            sentence += f"; testing stopped at {failed.budget:g}, although {passed} alone would have passed"
        if self.more is not None and failed is not None:
            sentence += f"; about {self.more:,} more images like these would certify {failed.budget:g}"
        return sentence

    def require(self, model: nn.Module, thresholds: str, amp: torch.dtype | None = None, source: str = "it") -> float:
        """Return the certified budget, after checking that the certificate is for these thresholds and this model.

        Args:
            model: with or without thresholds attached.
            thresholds: their fingerprint, see `fingerprint_of`.
            amp: the autocast dtype that the model will run with.
            source: name of the file, for messages.

        Raises:
            UsageError: no budget was certified.
            LTMPError: the certificate is void: thresholds, precision or weights have changed.
        """
        if self.budget is None:
            raise UsageError(f"the certificate of {source} certifies nothing: {self.sentence()}")
        if self.thresholds != thresholds:
            raise LTMPError(f"the certificate of {source} is void, as its thresholds were changed since: {_AGAIN}")
        precision = precision_of(model, amp)
        if self.precision != precision:
            raise LTMPError(
                f"the certificate of {source} is for {self.precision}, but the model runs in {precision}: {_AGAIN}"
            )
        if self.weights != weights_of(model):
            raise LTMPError(f"the certificate of {source} is for other weights than this model's: {_AGAIN}")
        return self.budget


_AGAIN = "certify again with `ltmp certify`, or load it without asking for what is certified"


def precision_of(model: nn.Module, amp: torch.dtype | None = None) -> str:
    """The dtype of a model's weights, and that of autocast, such as "float32" or "float32, autocast bfloat16"."""
    dtypes = [p.dtype for name, p in model.named_parameters() if not name.startswith("ltmp.")]
    weights = str(next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)).removeprefix("torch.")
    return weights if amp is None else f"{weights}, autocast {str(amp).removeprefix('torch.')}"


def weights_of(model: nn.Module) -> str:
    """Fingerprint of a model's own parameters and buffers, without the thresholds."""
    return of_tensors({name: value for name, value in model.state_dict().items() if not name.startswith("ltmp.")})


def fingerprint_of(dial: Dial, probe: Tensor | None, config: LTMPConfig) -> str:
    """Fingerprint of everything that decisions depend on, at every budget: dial, probe and settings."""
    tensors = {**dial.tensors(), **({} if probe is None else {"probe": probe.half()})}
    # scores by value: what a name stands for may change
    settings = {"variant": config.variant, "floor": config.floor, "ceiling": config.ceiling, **asdict(config.scores)}
    return of_tensors({**tensors, repr(sorted(settings.items())): torch.empty(0)})
