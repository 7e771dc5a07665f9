"""The one schema of thresholds files: what their headers and settings may say, checked before anything is read."""

from __future__ import annotations

from math import prod
from typing import Any

from ..config import LTMPConfig
from ..errors import first_line
from ..files.tensors import TensorEntry
from ..files.text import strict_json
from ..fingerprint import MAX_KEYS
from ..method.dial import PREFIX as DIAL
from .metadata import Metadata, shown

MAX_METADATA_BYTES = 1 << 22
"""Letters of what a file says of itself: the names of 20,000 classes have one million."""
MAX_NUMBERS = 1 << 26
"""In one tensor: the probe of a ViT-G has 5 million."""
_FLOATS = ("F32", "F16", "BF16", "F64")


def metadata_in(about: dict[str, str]) -> dict[str, Any]:
    """Read the metadata of a thresholds file."""
    text = about.get("ltmp", "")
    if len(text) > MAX_METADATA_BYTES:
        raise ValueError(f"it says {len(text):,} letters of itself")
    said = strict_json(text)
    if not isinstance(said, dict):
        raise ValueError("what it says of itself is no mapping")
    return said


def is_part(name: str) -> bool:
    return name in ("merge", "prune", "probe", "seen") or name.startswith(DIAL)


def check_entries(entries: dict[str, TensorEntry]) -> None:
    """Refuse types and shapes that no thresholds have, before they are read; names of newer versions are not."""
    for name, (dtype, shape) in entries.items():
        dimensions = 3 if name == "probe" else 1 if name in ("merge", "prune", "seen", f"{DIAL}share") else 2
        types, most = (("I64",), MAX_KEYS) if name == "seen" else (_FLOATS, MAX_NUMBERS)
        fits = dtype in types and len(shape) == dimensions and prod(shape) <= most
        if is_part(name) and not fits:
            raise ValueError(f"{shown(name)} is {dtype} {list(shape)}")


def config_in(settings: Any) -> LTMPConfig:
    """The settings of a file; whatever is wrong with them is a ValueError."""
    if not isinstance(settings, dict):
        raise ValueError("its settings are no mapping")
    Metadata.from_dict({"config": settings})
    for name in ("floor", "ceiling", "seed"):
        value = settings.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            raise ValueError(f"{name} is {shown(value)}, expected a whole number")
    try:
        return LTMPConfig.from_dict(settings)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"its settings are broken: {first_line(error)}") from error
