"""The schema of thresholds files: which headers and settings are allowed, checked before any tensor is read."""

from __future__ import annotations

from math import prod
from typing import Any

from ..config import LTMPConfig
from ..errors import first_line
from ..files.tensors import TensorEntry
from ..files.text import strict_json
from ..fingerprint import MAX_KEYS
from ..method.dial import PREFIX as DIAL
from .metadata import Metadata, integer, short_repr

MAX_METADATA_BYTES = 1 << 22
"""Limit of a file's metadata in characters: the names of 20,000 classes take one million."""
MAX_NUMBERS = 1 << 26
"""Limit of the elements of one tensor: the probe of a ViT-G has 5 million."""
_FLOATS = ("F32", "F16", "BF16", "F64")


def metadata_in(header: dict[str, str]) -> dict[str, Any]:
    """Parse the metadata of a thresholds file, given its safetensors metadata.

    Raises:
        ValueError: it is too long, not JSON, or not a mapping.
    """
    text = header.get("ltmp", "")
    if len(text) > MAX_METADATA_BYTES:
        raise ValueError(f"its metadata has {len(text):,} characters")
    metadata = strict_json(text)
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a mapping")
    return metadata


def is_part(name: str) -> bool:
    """Whether a tensor of this name belongs to a thresholds file; newer versions may add others."""
    return name in ("merge", "prune", "probe", "seen") or name.startswith(DIAL)


def check_entries(entries: dict[str, TensorEntry]) -> None:
    """Refuse dtypes and shapes that thresholds cannot have, before reading them; unknown names are allowed.

    Raises:
        ValueError: names the tensor.
    """
    for name, (dtype, shape) in entries.items():
        ndim = 3 if name == "probe" else 1 if name in ("merge", "prune", "seen", f"{DIAL}share") else 2
        dtypes, max_numel = (("I64",), MAX_KEYS) if name == "seen" else (_FLOATS, MAX_NUMBERS)
        valid = dtype in dtypes and len(shape) == ndim and prod(shape) <= max_numel
        if is_part(name) and not valid:
            raise ValueError(f"{short_repr(name)} is {dtype} {list(shape)}")


def config_in(settings: Any) -> LTMPConfig:
    """Build the config from a file's settings.

    Raises:
        ValueError: anything about them is wrong.
    """
    if not isinstance(settings, dict):
        raise ValueError("its settings are not a mapping")
    # the general rules for metadata: printable texts, finite numbers, not nested too deep
    Metadata.from_dict({"config": settings})
    check = integer(0, (1 << 31) - 1)
    for name in ("floor", "ceiling", "seed"):
        if settings.get(name) is not None:
            check(name, settings[name])
    try:
        return LTMPConfig.from_dict(settings)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"its settings are broken: {first_line(error)}") from error
