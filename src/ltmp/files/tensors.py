"""Tensor files: written whole or not at all; those of others read without running code, and checked before anything is
allocated.

A file may say anything of itself. What it says is held against its own size: no tensor may be larger than the file that
it comes from, so that a small file cannot ask for much memory.
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

_OS_ERROR = re.compile(r"os error (\d+)")


def write_tensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, replaced whole or left alone.

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
            # the library has a text for what the system said, which `atomic_path` explains
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


MAX_HEADER = 1 << 24
"""Bytes of a header: that of 10,000 tensors has one million."""

MAX_DIMENSIONS = 16

MAX_PICKLED = 1 << 26
"""Bytes at the beginning of a file of old torch versions that its tensors' descriptions are looked for in."""

_REFUSED = (b"bytearray", b"_rebuild_sparse_tensor", b"_rebuild_nested_tensor", b"_rebuild_qtensor")
"""What torch itself would unpickle: memory of any size from one number, and tensors that are none of a state dict."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}  # fmt: skip
"""What safetensors calls the types of numbers, and how many bits they take."""

Keep = Callable[[str], bool]


class TensorEntry(NamedTuple):
    """A tensor's entry in a header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors that a safetensors file says it has, and its metadata, after checking that it can have them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none, or contradicts itself.
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
        raise ValueError("its header is no mapping")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its metadata are no texts")
    return {name: _entry(name, said, size - 8 - length) for name, said in header.items()}, about


def _entry(name: str, said: Any, room: int) -> TensorEntry:
    """A tensor's description, held against the bytes that the file has for all of them."""
    name = ascii(name[:100])
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is not described")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name} is of an unknown type")
    if not (_whole(shape) and len(shape) <= MAX_DIMENSIONS and _whole(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name} has no shape")
    if not (offsets[0] <= offsets[1] <= room and (offsets[1] - offsets[0]) * 8 == prod(shape) * _BITS[dtype]):
        raise ValueError(f"tensor {name} is not all in the file")
    return TensorEntry(dtype, tuple(shape))


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_tensors(path: str | os.PathLike[str], keep: Keep) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names `keep` takes; check the file with `read_header` first."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118 (not a dict)


def load_plain(path: str | os.PathLike[str], *, lazy: bool = False) -> Any:
    """Read a file of `torch.save`: tensors, numbers and texts in lists and dictionaries. No code is unpickled.

    Args:
        lazy: read tensors when they are used, where the format allows it.

    Raises:
        FileNotFoundError: no such file.
        LTMPError: it is truncated, or holds anything else.
    """
    try:
        zipped = _check_plain(path)
        # timm's own checkpoints keep the command line they were made with
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy and zipped)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise LTMPError(
            f"{path} is not a checkpoint of plain tensors, and nothing else is unpickled: save its state_dict anew"
        ) from error
    except Exception as error:  # damaged bytes can fail in any way
        raise LTMPError(f"{path} is truncated or not a checkpoint: copy or download it again") from error


def _check_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a file of `torch.save` is a zip file.

    Raises:
        UnpicklingError: it would take more memory than it has bytes.
        ValueError, BadZipFile: it is damaged.
    """
    size = _size(path)
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                if packed or sum(part.file_size for part in parts) > size:
                    raise pickle.UnpicklingError("it unpacks to more than its size, which torch never writes")
                pickled = b"".join(archive.read(part) for part in parts if part.filename.endswith("data.pkl"))
        else:
            file.seek(0)
            pickled = file.read(MAX_PICKLED)
    if any(b"\n%s\n" % name in pickled for name in _REFUSED):
        raise pickle.UnpicklingError("it asks for memory that it does not fill, or for tensors that are not plain")
    return zipped


def read_state_dict(path: str | os.PathLike[str], keep: Keep | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint: safetensors, or torch's format read without unpickling code.

    Understands `.pth.tar` files with `state_dict` (or `state_dict_ema`, `model`) inside and `module.` prefixes.

    Args:
        keep: takes the names of the tensors that are wanted, the prefix removed; None takes all. Others are not read
            where the format allows it.

    Raises:
        LTMPError: no such file, truncated, not a checkpoint, or one that only unpickling would read.
    """
    wanted = keep or (lambda name: True)
    try:
        if Path(path).suffix == ".safetensors":
            read_header(path)
            found = read_tensors(path, lambda name: wanted(name.removeprefix("module.")))
        else:
            found = _state_in(load_plain(path, lazy=keep is not None), path)
    except FileNotFoundError:
        raise UsageError(f"no checkpoint {path}: check the path") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise LTMPError(f"{path} is truncated or not a checkpoint: copy or download it again") from error
    plain = {name.removeprefix("module."): value for name, value in found.items()}
    return {name: _dense(name, value, path) for name, value in plain.items() if wanted(name)}


def _state_in(loaded: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for key in ("state_dict", "state_dict_ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    found = {}
    if isinstance(loaded, dict):
        found = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not found or not all(isinstance(name, str) for name in found):
        raise LTMPError(f"{path} holds no state dict: expected parameter names and tensors")
    return found


def _dense(name: str, value: Tensor, path: str | os.PathLike[str]) -> Tensor:
    """`value`, if all its numbers are in the file."""
    plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)
    if not plain or value.numel() * value.element_size() > min(value.untyped_storage().nbytes(), _size(path)):
        raise LTMPError(
            f"{path} is not a checkpoint of plain tensors: {name[:100]!a} is sparse, quantised or larger than what is "
            "stored of it; save its state_dict anew"
        )
    return value.detach()


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file: reading from a pipe or a device might never end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found.st_size
