"""A certificate: the smallest budget whose risk was shown to be low enough, how, and what it is bound to."""

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
    """The measurement of one budget.

    Attributes:
        budget: FLOPs share.
        risk: mean loss over `images`; fewer than the certificate's where it was clearly too high before the end.
        p: p-value of the hypothesis that the risk of all images is the level or more; 1 where it was given up.
        upper: bound on that risk at the certificate's confidence, for this budget alone.
    """

    budget: float
    risk: float
    images: int
    p: float
    upper: float


@dataclass(frozen=True)
class Certificate:
    """With `confidence` the risk at `budget` is `at_most`, on images like those that it was measured on.

    Attributes:
        risk: `disagree`, `error`, `embedding`, or the name of a function.
        at_most: the level asked for.
        images: that the budgets were tested on.
        tested: budgets in the order of testing, mildest first.
        budget: the smallest budget certified, or None.
        more: how many more images would certify the next one, if they are like these; None where none would.
        learned: images that the thresholds were learned on and that these were compared with; None where unknown.
        data, weights, thresholds: fingerprints of the images, of the model's own weights, and of the dial.
        precision: what the model computed in, see `precision_of`.
        engine, machine: what it ran on; others of the same precision do not void it.
        limit: of `embedding`, the distance 1 - cosine above which an embedding counts.
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
        """JSON types."""
        return {**asdict(self), "tested": [asdict(one) for one in self.tested]}

    @classmethod
    def from_dict(cls, values: Any, source: str = "this certificate") -> Certificate:
        """The certificate in what `to_dict` gave.

        Raises:
            LTMPError: it is not one, or contradicts itself.
        """
        try:
            known = {field.name for field in fields(cls)}
            if set(values) != known:
                raise ValueError(f"unexpected or missing {', '.join(sorted(set(values) ^ known))}")
            found = cls(**{**values, "tested": tuple(Tested(**one) for one in values["tested"])})
            found._check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise LTMPError(f"{source} is not a certificate ({error}): make it again with `ltmp certify`") from error
        return found

    def _check(self) -> None:
        """Raise ValueError or TypeError unless types and ranges are right."""
        for name in ("risk", "data", "precision", "engine"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected text")
        for name in ("weights", "thresholds"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected a fingerprint")
        if not (0 < self.at_most < 1 and 0 < self.confidence < 1):
            raise ValueError(f"at most {self.at_most!r} with confidence {self.confidence!r}: expected parts of 1")
        counts = [self.images, *(one.images for one in self.tested)]
        counts += [count for count in (self.more, self.learned) if count is not None]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("numbers of images must be whole and not negative")
        numbers = [number for one in self.tested for number in (one.budget, one.risk, one.p, one.upper)]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("a number of the tests is not finite")
        certified = self.tested[: self._passed]
        if self.budget != (certified[-1].budget if certified else None):
            raise ValueError(f"its budget {self.budget!r} is not the last one that its own tests passed")

    @property
    def _passed(self) -> int:
        """Budgets tested before the first that failed."""
        failed = (i for i, one in enumerate(self.tested) if one.p > 1 - self.confidence)
        return next(failed, len(self.tested))

    @property
    def found(self) -> Tested | None:
        """The measurement of the certified budget, or None."""
        return self.tested[self._passed - 1] if self._passed else None

    @property
    def failed(self) -> Tested | None:
        """The budget that testing stopped at, or None where all passed."""
        return self.tested[self._passed] if self._passed < len(self.tested) else None

    @property
    def out_of_order(self) -> tuple[float, ...]:
        """Budgets that would have passed had a milder one not failed: the risk does not rise steadily."""
        return tuple(one.budget for one in self.tested[self._passed + 1 :] if one.p <= 1 - self.confidence)

    def promise(self) -> str:
        """The level in words."""
        part = f"{100 * self.at_most:.3g} %"
        return {
            "disagree": f"at most {part} of answers differ from the dense model's",
            "error": f"accuracy is at most {100 * self.at_most:.3g} points below the dense model's",
            "embedding": f"at most {part} of embeddings are further than {self.limit} from the dense model's",
        }.get(self.risk, f"the mean of {self.risk} is at most {self.at_most:g}")

    def sentence(self) -> str:
        """The whole result in a sentence or two."""
        sure = f"with {100 * self.confidence:.3g} % confidence"
        found, failed = self.found, self.failed
        told = (
            f"no budget is certified: not even {self.tested[0].budget:g} showed {sure} that {self.promise()}"
            if found is None
            else f"budget {found.budget:g}: {sure} {self.promise()}"
        )
        shown = found or self.tested[0]
        told += f" ({100 * shown.risk:.3g} % on {shown.images:,} images, {self.precision})"
        if self.out_of_order:
            first = f"{failed.budget:g}" if failed else ""
            told += f"; testing stopped at {first}, although {self.out_of_order[0]:g} alone would have passed"
        if self.more is not None and failed is not None:
            told += f"; about {self.more:,} more images like these would certify {failed.budget:g}"
        return told

    def require(self, model: nn.Module, thresholds: str, amp: torch.dtype | None = None, source: str = "it") -> float:
        """The certified budget, after checking that the certificate is one of these thresholds and this model.

        Args:
            model: with or without thresholds attached.
            thresholds: their fingerprint, see `fingerprint_of`.
            amp: the autocast type that the model will run in.

        Raises:
            UsageError: no budget was certified.
            LTMPError: void, because thresholds, precision or weights are others.
        """
        if self.budget is None:
            raise UsageError(f"the certificate of {source} certifies nothing: {self.sentence()}")
        if self.thresholds != thresholds:
            raise LTMPError(f"the certificate of {source} is void, as its thresholds were changed since: {_AGAIN}")
        here = precision_of(model, amp)
        if self.precision != here:
            raise LTMPError(
                f"the certificate of {source} is for {self.precision}, but the model runs in {here}: {_AGAIN}"
            )
        if self.weights != weights_of(model):
            raise LTMPError(f"the certificate of {source} is for other weights than this model's: {_AGAIN}")
        return self.budget


_AGAIN = "certify again with `ltmp certify`, or load it without asking for what is certified"


def precision_of(model: nn.Module, amp: torch.dtype | None = None) -> str:
    """A model's precision: the type of its weights, and that of autocast."""
    kinds = [p.dtype for name, p in model.named_parameters() if not name.startswith("ltmp.")]
    own = str(next((kind for kind in kinds if kind.is_floating_point), torch.float32)).removeprefix("torch.")
    return own if amp is None else f"{own}, autocast {str(amp).removeprefix('torch.')}"


def weights_of(model: nn.Module) -> str:
    """Fingerprint of a model's own weights and buffers, without thresholds."""
    return of_tensors({name: value for name, value in model.state_dict().items() if not name.startswith("ltmp.")})


def fingerprint_of(dial: Dial, probe: Tensor | None, config: LTMPConfig) -> str:
    """Fingerprint of all that decides at every budget: the dial, the probe, and what scores mean."""
    tensors = {**dial.tensors(), **({} if probe is None else {"probe": probe.half()})}
    # in numbers, not by name: a named score may become another one
    settings = {"variant": config.variant, "floor": config.floor, "ceiling": config.ceiling, **asdict(config.scores)}
    return of_tensors({**tensors, repr(sorted(settings.items())): torch.empty(0)})
