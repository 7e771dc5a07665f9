"""The metadata of a thresholds file and its model: one checked value, to and from JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UsageError
from ..ranges import MAX_BLOCKS, MAX_CLASSES, MAX_PIXELS

MAX_LETTERS = 1000
MAX_NESTED = 8

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
LIBRARIES = ("timm", "torchvision", "open_clip", "transformers")

_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls of terminals, line ends, controls of the writing direction, halves of letters."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model, in the words of timm's data configs; None is as the model's own config says.

    Attributes:
        mean, std: one number a channel, of pixels in [0, 1].
        crop_pct: part of the resized image's side that is kept, in (0, 1].
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The known settings, as JSON types."""
        return _plain({name: getattr(self, name) for name in _PREPROCESSING})

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """Those in `values`; other names in it are left out.

        Raises:
            ValueError: no mapping, or a value that makes no sense.
        """
        known = mapping("preprocessing", values)
        return cls(**checked({name: known[name] for name in _PREPROCESSING if name in known}, _PREPROCESSING))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Refuse options of an image transform that make no sense; None is not asked for.

        Raises:
            UsageError: names the option, and what was expected.
        """
        try:
            cls.from_dict({name: list(map(float, value)) if name in ("mean", "std") else value
                           for name, value in options.items() if value is not None})  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Metadata:
    """The metadata that whoever opens a thresholds file needs; None, or empty, where unknown.

    Attributes:
        model_name: what `--model` takes; architecture: what timm calls it; library: one of `LIBRARIES`.
        base_model: the Hugging Face repository of the model's own weights.
        model_kwargs: more arguments that the model is built with.
        depth, width: of the transformer; num_classes: outputs of the head; input_size: height and width in pixels.
        class_names: in the order of the outputs.
        target, share, budget: FLOPs shares: asked for, measured, and what the dial is set to.
        dial: the smallest and the largest share that it can be set to.
        certificate: what `ltmp certify` found, see `ltmp.method.certificate`.
        other: whatever else is there, JSON types.
    """

    model_name: str | None = None
    architecture: str | None = None
    library: str | None = None
    base_model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    depth: int | None = None
    width: int | None = None
    num_classes: int | None = None
    input_size: tuple[int, ...] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: tuple[str, ...] = ()
    target: float | None = None
    share: float | None = None
    budget: float | None = None
    dial: tuple[float, ...] | None = None
    certificate: dict[str, Any] | None = None
    other: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The known settings, as JSON types."""
        known = {name: getattr(self, name) for name in _METADATA}
        return {**_plain({**known, "preprocessing": self.preprocessing.to_dict()}), **self.other}

    @classmethod
    def from_dict(cls, values: Any) -> Metadata:
        """Check the metadata read from a file.

        Raises:
            ValueError: no mapping, or a value that cannot be right; the message is one short line.
        """
        values = mapping("what it says of itself", values)
        known = {name: value for name, value in values.items() if name in _METADATA}
        other = {name: value for name, value in values.items() if name not in _METADATA}
        return cls(**checked(known, _METADATA), other=_json("what it says of itself", other))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what nobody knows, and lists for tuples."""
    known = {name: value for name, value in values.items() if value not in (None, (), {})}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


Check = Callable[[str, Any], Any]
"""From a name and a value to the value as it is kept; raises ValueError."""


def checked(values: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Those that are known, each by its check."""
    return {name: checks[name](name, value) for name, value in values.items() if value is not None}


def shown(value: Any) -> str:
    """A value in a message: short, and in letters that every terminal shows."""
    # the text of a deeply nested value would itself be nested too deep
    found = f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else ascii(value)
    return found if len(found) <= 60 else f"{found[:57]}..."


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{shown(name)[1:-1]} is {shown(value)}, expected {expected}")


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping")
    return dict(value)


def text(name: str, value: Any) -> str:
    """A name, as every terminal shows it."""
    if not isinstance(value, str) or len(value) > MAX_LETTERS or _INVISIBLE.search(value):
        raise _wrong(name, value, f"text of {MAX_LETTERS} letters at most, without control characters")
    return value


def _one_of(known: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise _wrong(name, value, f"one of {', '.join(known)}")
        return str(value)

    return check


def whole(low: int, high: int) -> Check:
    """A whole number in these bounds."""

    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number in these bounds."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def several(of: Check, low: int, high: int) -> Check:
    """A list of so many."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            raise _wrong(name, value, f"a list of {low} to {high}" if low < high else f"a list of {low}")
        return tuple(of(name, each) for each in value)

    return check


def _json(name: str, value: Any, nested: int = 0) -> Any:
    """A JSON value whose texts can be shown and whose numbers are finite."""
    if nested > MAX_NESTED:
        raise ValueError(f"{name} is nested more than {MAX_NESTED} deep")
    if isinstance(value, Mapping):
        return {text("a name", key): _json(key, each, nested + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(name, each, nested + 1) for each in value]
    if isinstance(value, str):
        return text(name, value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _wrong(name, value, "a JSON value")


def _settings(name: str, value: Any) -> dict[str, Any]:
    """Arguments of a model: none of them so large that it alone takes much memory."""
    found: dict[str, Any] = _json(name, mapping(name, value))
    for key, each in found.items():
        for number in each if isinstance(each, list) else [each]:
            if isinstance(number, int | float) and abs(number) > MAX_PIXELS:
                raise _wrong(key, number, f"a number of {MAX_PIXELS} at most")
    return found


_SHARE = number(1e-6, 1 + 1e-6)

_PREPROCESSING: dict[str, Check] = {
    "mean": several(number(-1e3, 1e3), 1, 16),
    "std": several(number(1e-6, 1e3), 1, 16),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop_pct": number(1e-3, 1),
    "crop_mode": _one_of(CROP_MODES),
}

_METADATA: dict[str, Check] = {
    "model_name": text,
    "architecture": text,
    "library": _one_of(LIBRARIES),
    "base_model": text,
    "model_kwargs": _settings,
    "depth": whole(1, MAX_BLOCKS),
    "width": whole(1, 1 << 16),
    "num_classes": whole(0, MAX_CLASSES),
    "input_size": several(whole(1, MAX_PIXELS), 2, 2),
    "preprocessing": lambda name, value: Preprocessing.from_dict(value),
    "class_names": several(text, 0, MAX_CLASSES),
    "target": _SHARE,
    "share": _SHARE,
    "budget": _SHARE,
    "dial": several(_SHARE, 2, 2),
    "certificate": lambda name, value: _json(name, mapping(name, value)),
}
"""How each field of `Metadata` is checked."""

assert set(_METADATA) == {each.name for each in fields(Metadata)} - {"other"}
