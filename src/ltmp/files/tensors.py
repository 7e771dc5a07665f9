"""Write tensor files atomically, and read untrusted ones without running code or allocating more than they hold.

A file's header may claim anything. Claims are checked against the size of the file: no tensor may be larger than the
file it comes from, so a small file cannot make its reader allocate much memory.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LTMPError, UsageError
from . import atomic_path
from .text import strict_json

MAX_HEADER = 1 << 24
"""Limit of a safetensors header in bytes: that of 10,000 tensors takes one million."""

MAX_DIMENSIONS = 16

MAX_PICKLED = 1 << 26
"""In a file of an old torch version, the bytes at its beginning that are searched for refused types."""

_REFUSED = (b"bytearray", b"_rebuild_sparse_tensor", b"_rebuild_nested_tensor", b"_rebuild_qtensor")
"""Names that torch's restricted unpickler allows, but a state dict does not need.

`bytearray` allocates any size from one number; the others make tensors that are not dense.
"""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}  # fmt: skip
"""Bits per element of each dtype of safetensors."""

_OS_ERROR = re.compile(r"os error (\d+)")

Keep = Callable[[str], bool]
"""Takes a tensor's name, and returns whether to read the tensor."""


def write_tensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        LTMPError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise LTMPError(f"cannot write {path}: {error}") from error
            # safetensors turns system errors into text; `atomic_path` explains them again
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


class TensorEntry(NamedTuple):
    """A tensor's dtype (as safetensors names it) and shape, from the header of a file."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensor entries and the metadata of a safetensors file, checked against the size of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a safetensors file, or contradicts itself.
    """
    size = _size(path)
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"its header would have {length} bytes")
        header = strict_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata does not map names to text")
    return {name: _entry(name, entry, size - 8 - length) for name, entry in header.items()}, metadata


def _entry(name: str, entry: Any, data_bytes: int) -> TensorEntry:
    """Check a tensor's entry in a header; `data_bytes` is the size of the file after the header."""
    name = ascii(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is not described")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name} is of an unknown type")
    if not (_is_size(shape) and len(shape) <= MAX_DIMENSIONS and _is_size(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name} has no shape")
    start, end = offsets
    if not (start <= end <= data_bytes and (end - start) * 8 == prod(shape) * _BITS[dtype]):
        raise ValueError(f"tensor {name} is not all in the file")
    return TensorEntry(dtype, tuple(shape))


def _is_size(values: Any) -> bool:
    """Whether these are non-negative int64 numbers."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_tensors(path: str | os.PathLike[str], keep: Keep) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file for whose names `keep` is true; check it with `read_header` first."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118 (not a dict)


def load_plain(path: str | os.PathLike[str], *, lazy: bool = False) -> Any:
    """Read a file of `torch.save`: tensors, numbers and strings in lists and dictionaries. No code is unpickled.

    Args:
        lazy: memory-map the tensors if the format allows it.

    Raises:
        FileNotFoundError: no such file.
        LTMPError: it is truncated, or holds anything else.
    """
    try:
        zipped = _check_plain(path)
        # timm's checkpoints contain the arguments of the training script
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy and zipped)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise LTMPError(
            f"{path} is not a checkpoint of plain tensors, and nothing else is unpickled: save its state_dict again"
        ) from error
    except Exception as error:  # damaged bytes can fail in any way
        raise LTMPError(f"{path} is truncated or not a checkpoint: copy or download it again") from error


def _check_plain(path: str | os.PathLike[str]) -> bool:
    """Check a file of `torch.save` before it is unpickled, and return whether it is a zip file (torch >= 1.6).

    Raises:
        UnpicklingError: it could take more memory than it has bytes.
        ValueError, BadZipFile: it is damaged.
    """
    size = _size(path)
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                if compressed or sum(part.file_size for part in parts) > size:
                    raise pickle.UnpicklingError("it unpacks to more than its size, which torch never writes")
                pickled = b"".join(archive.read(part) for part in parts if part.filename.endswith("data.pkl"))
        else:
            file.seek(0)
            pickled = file.read(MAX_PICKLED)
    if any(b"\n%s\n" % name in pickled for name in _REFUSED):
        raise pickle.UnpicklingError(
            "it allocates memory that it does not fill, or contains tensors that are not dense"
        )
    return zipped


def read_state_dict(path: str | os.PathLike[str], keep: Keep | None = None) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint: safetensors, or torch's format without unpickling code.

    Understands `.pth.tar` files with `state_dict` (or `state_dict_ema`, `model`) inside and `module.` prefixes.

    Args:
        keep: selects tensors by their names without the prefix; None reads all. The others are not read from disk if
            the format allows it.

    Raises:
        LTMPError: there is no such file, it is truncated or not a checkpoint, or reading it would need unpickling.
    """
    keeps = keep or (lambda name: True)
    try:
        if Path(path).suffix == ".safetensors":
            read_header(path)
            state = read_tensors(path, lambda name: keeps(name.removeprefix("module.")))
        else:
            state = _state_in(load_plain(path, lazy=keep is not None), path)
    except FileNotFoundError:
        raise UsageError(f"no checkpoint {path}: check the path") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise LTMPError(f"{path} is truncated or not a checkpoint: copy or download it again") from error
    state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: _dense(name, value, path) for name, value in state.items() if keeps(name)}


def _state_in(loaded: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint, which may be the checkpoint itself."""
    for key in ("state_dict", "state_dict_ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    state = {}
    if isinstance(loaded, dict):
        state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state or not all(isinstance(name, str) for name in state):
        raise LTMPError(f"{path} holds no state dict: expected parameter names and tensors")
    return state


def _dense(name: str, value: Tensor, path: str | os.PathLike[str]) -> Tensor:
    """Return a dense tensor detached, after checking that all its elements are stored in the file."""
    dense = value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)
    if not dense or value.numel() * value.element_size() > min(value.untyped_storage().nbytes(), _size(path)):
        raise LTMPError(
            f"{path} is not a checkpoint of plain tensors: {name[:100]!a} is sparse, quantised or larger than what is "
            "stored of it; save its state_dict again"
        )
    return value.detach()


def _size(path: str | os.PathLike[str]) -> int:
    """Size of a regular file in bytes; other files are refused, as reading from a pipe or a device might never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    return status.st_size
