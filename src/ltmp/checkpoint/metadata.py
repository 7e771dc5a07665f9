"""Metadata of a thresholds file and its model: a validated value that converts to and from JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UsageError
from ..ranges import MAX_BLOCKS, MAX_CLASSES, MAX_PIXELS

MAX_CHARACTERS = 1000
MAX_NESTED = 8

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
LIBRARIES = ("timm", "torchvision", "open_clip", "transformers")

_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, bidirectional-text controls and lone surrogates."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model, named as in timm's data configs; None means as in the model's own config.

    Attributes:
        mean, std: one number per channel, for pixels in [0, 1].
        crop_pct: fraction of the resized image's side that is kept, in (0, 1].
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are set, as JSON types."""
        return _without_empty({name: getattr(self, name) for name in _PREPROCESSING})

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """Read the known settings from `values` and ignore the rest.

        Raises:
            ValueError: `values` is not a mapping, or a setting is invalid.
        """
        values = mapping("preprocessing", values)
        return cls(**checked({name: values[name] for name in _PREPROCESSING if name in values}, _PREPROCESSING))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Validate options of an image transform; None means not set.

        Raises:
            UsageError: an option is invalid; names the option, and what was expected.
        """
        try:
            cls.from_dict({name: list(map(float, value)) if name in ("mean", "std") else value
                           for name, value in options.items() if value is not None})  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from error


@dataclass(frozen=True)
class Metadata:
    """Metadata of a thresholds file and its model; None, or empty, if unknown.

    Attributes:
        model_name: the name that `--model` takes.
        architecture: the model's name in timm.
        library: one of `LIBRARIES`.
        base_model: the Hugging Face repository of the model's own weights.
        model_kwargs: further arguments that the model is built with.
        depth, width: of the transformer.
        num_classes: number of outputs of the head.
        input_size: height and width in pixels.
        preprocessing: how images are prepared.
        class_names: in the order of the outputs.
        target: FLOPs share that the thresholds were learned for.
        share: measured FLOPs share.
        budget: FLOPs share that the dial is set to.
        dial: the smallest and the largest FLOPs share that the dial can be set to.
        certificate: the result of `ltmp certify`, see `ltmp.method.certificate`.
        other: all other entries, JSON types.
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
        """Return the entries that are known, as JSON types."""
        values = {name: getattr(self, name) for name in _METADATA}
        return {**_without_empty({**values, "preprocessing": self.preprocessing.to_dict()}), **self.other}

    @classmethod
    def from_dict(cls, values: Any) -> Metadata:
        """Validate metadata read from a file.

        Raises:
            ValueError: `values` is not a mapping, or a value is invalid; the message is one short line.
        """
        values = mapping("the metadata", values)
        known = {name: value for name, value in values.items() if name in _METADATA}
        other = {name: value for name, value in values.items() if name not in _METADATA}
        return cls(**checked(known, _METADATA), other=_json("the metadata", other))


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Drop empty values and turn tuples into lists."""
    known = {name: value for name, value in values.items() if value not in (None, (), {})}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


Check = Callable[[str, Any], Any]
"""Takes a name and a value, and returns the value as it is stored or raises ValueError."""


def checked(values: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return the values that are not None, each validated by the check of its name."""
    return {name: checks[name](name, value) for name, value in values.items() if value is not None}


def short_repr(value: Any) -> str:
    """Format a value for an error message: at most 60 ASCII characters."""
    # containers are not printed: repr of a deeply nested one could exceed the recursion limit
    text = f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _invalid(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{short_repr(name)[1:-1]} is {short_repr(value)}, expected {expected}")


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Check for a mapping."""
    if not isinstance(value, Mapping):
        raise _invalid(name, value, "a mapping")
    return dict(value)


def text(name: str, value: Any) -> str:
    """Check for a short text that every terminal can show."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS or _INVISIBLE.search(value):
        raise _invalid(name, value, f"text of at most {MAX_CHARACTERS} characters, without control characters")
    return value


def _one_of(known: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise _invalid(name, value, f"one of {', '.join(known)}")
        return str(value)

    return check


def integer(low: int, high: int) -> Check:
    """Make a check for an integer from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _invalid(name, value, f"an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """Make a check for a finite number from `low` to `high`."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _invalid(name, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def list_of(item: Check, low: int, high: int) -> Check:
    """Make a check for a list of `low` to `high` items, each checked by `item`."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            raise _invalid(name, value, f"a list of {low} to {high} items" if low < high else f"a list of {low} items")
        return tuple(item(name, element) for element in value)

    return check


def _json(name: str, value: Any, nested: int = 0) -> Any:
    """Check for a JSON value whose strings every terminal can show and whose numbers are finite."""
    if nested > MAX_NESTED:
        raise ValueError(f"{name} is nested more than {MAX_NESTED} levels deep")
    if isinstance(value, Mapping):
        return {text("a name", key): _json(key, element, nested + 1) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_json(name, element, nested + 1) for element in value]
    if isinstance(value, str):
        return text(name, value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _invalid(name, value, "a JSON value")


def _model_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Check for arguments of a model, none so large that the model would take much memory because of it alone."""
    kwargs: dict[str, Any] = _json(name, mapping(name, value))
    for key, argument in kwargs.items():
        for element in argument if isinstance(argument, list) else [argument]:
            if isinstance(element, int | float) and abs(element) > MAX_PIXELS:
                raise _invalid(key, element, f"a number of at most {MAX_PIXELS}")
    return kwargs


_SHARE = number(1e-6, 1 + 1e-6)

_PREPROCESSING: dict[str, Check] = {
    "mean": list_of(number(-1e3, 1e3), 1, 16),
    "std": list_of(number(1e-6, 1e3), 1, 16),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop_pct": number(1e-3, 1),
    "crop_mode": _one_of(CROP_MODES),
}

_METADATA: dict[str, Check] = {
    "model_name": text,
    "architecture": text,
    "library": _one_of(LIBRARIES),
    "base_model": text,
    "model_kwargs": _model_kwargs,
    "depth": integer(1, MAX_BLOCKS),
    "width": integer(1, 1 << 16),
    "num_classes": integer(0, MAX_CLASSES),
    "input_size": list_of(integer(1, MAX_PIXELS), 2, 2),
    "preprocessing": lambda name, value: Preprocessing.from_dict(value),
    "class_names": list_of(text, 0, MAX_CLASSES),
    "target": _SHARE,
    "share": _SHARE,
    "budget": _SHARE,
    "dial": list_of(_SHARE, 2, 2),
    "certificate": lambda name, value: _json(name, mapping(name, value)),
}
"""How each field of `Metadata` is checked."""

assert set(_METADATA) == {entry.name for entry in fields(Metadata)} - {"other"}
