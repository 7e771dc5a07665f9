"""Checkpoints of learning runs: a killed run can be resumed, and ends as it would have without the interruption."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Loader
from ..errors import LTMPError, first_line
from ..files import atomic_path
from ..files.tensors import load_plain
from ..fingerprint import image_keys, of_tensors

MATCHING = 0.5
"""Part of the images that must match the saved ones: another machine may decode a few slightly differently."""

_SUBJECTS = {
    "weights": "other weights",
    "listing": "another data set",
    "images": "other images",
    "transform": "another transform of its images",
}
"""Fingerprints of `subject`, with the words that report a difference."""


def save_run(path: str | Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a run's settings and state, which hold only plain tensors, numbers and strings."""
    # through memory, because torch itself reports a full disk as "unexpected pos 768 vs 662"
    buffer = io.BytesIO()
    torch.save({"format": "ltmp-run", "settings": settings, "state": frozen(state)}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_run(path: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved at `path`, or None if there is no file.

    Raises:
        LTMPError: the file is damaged or not a run, or its settings, weights or data differ; the message names them.
    """
    if not Path(path).exists():
        return None
    try:
        saved = load_plain(path)
        # torch does not verify the checksums
        with zipfile.ZipFile(path) as parts:
            if parts.testzip() is not None:
                raise ValueError("its sums are wrong")
        is_run = saved["format"] == "ltmp-run"
        before, state = dict(saved["settings"]), dict(saved["state"])
    except (LTMPError, TypeError, KeyError, ValueError, IndexError, RuntimeError, zipfile.BadZipFile) as error:
        raise LTMPError(f"{path} is truncated or not a learning run: delete it to start over") from error
    if not is_run:
        raise LTMPError(f"{path} is not a learning run: choose another checkpoint file")
    others = differences(before, settings)
    changed = [
        f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
        # of both, because some settings are saved only if they differ from the default
        for name in {**settings, **before}
        if name not in _SUBJECTS and before.get(name) != settings.get(name)
    ]
    if changed:
        others.append(f"other settings ({'; '.join(changed)})")
    if others:
        raise LTMPError(f"{path} is of a run with {' and '.join(others)}: repeat those, or delete it")
    return state


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed between two results of `subject`, in words, such as "other weights"."""
    return [text for name, text in _SUBJECTS.items() if not _same(before.get(name), now.get(name))]


def _same(before: Any, now: Any) -> bool:
    """Whether fingerprints match; an unknown one, as in runs of older versions, matches any other."""
    if before is None or now is None:
        return True
    if isinstance(now, list):
        matches = isinstance(before, list) and len(before) == len(now)
        return matches and sum(a == b for a, b in zip(before, now, strict=True)) >= MATCHING * len(now)
    return bool(before == now)


@contextmanager
def restoring(path: str | Path | None) -> Iterator[None]:
    """Use the result of `load_run` inside; what goes wrong is reported as damage.

    Raises:
        LTMPError: a part of the state is missing or broken.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise LTMPError(f"{path} is damaged ({first_line(error)[:100]}): delete it to start over") from error


def frozen(value: Any) -> Any:
    """A copy of a state that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: frozen(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def subject(model: nn.Module, loader: Any, images: Tensor, amp: torch.dtype | None) -> dict[str, Any]:
    """Fingerprints of a run's weights and images, leaving out what differs from one start to the next.

    Args:
        images: the loader's first images [N, C, H, W].
        amp: the autocast dtype.
    """
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("ltmp.")}
    dataset = getattr(loader, "dataset", None)
    settings = getattr(getattr(dataset, "transform", None), "settings", None)
    return {
        "amp": None if amp is None else str(amp),
        "weights": of_tensors(weights),
        "listing": _listing(dataset),
        "images": image_keys(images).tolist() if _repeats(loader) else None,
        "transform": None if settings is None else repr(sorted(settings.items())),
    }


def _listing(dataset: Any) -> str | None:
    """Fingerprint of the file names in a dataset, in order; None if it does not name its images."""
    source = getattr(dataset, "source", dataset)
    if hasattr(source, "filename") and hasattr(source, "__len__"):
        names = (source.filename(i) for i in range(len(source)))
    elif isinstance(getattr(source, "samples", None), list):
        names = (Path(sample[0]).name if isinstance(sample, tuple) else sample for sample in source.samples)
    else:
        return None
    digest = blake2b(digest_size=16)
    for name in names:
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _repeats(loader: Any) -> bool:
    """Whether a loader yields the same images each time, which random transforms prevent."""
    if isinstance(loader, list | tuple):
        return True
    if not isinstance(loader, Loader) or not loader.images:
        return False
    first, second = (loader.dataset[0] for _ in range(2))
    return not isinstance(first, tuple) or (isinstance(first[0], Tensor) and torch.equal(first[0], second[0]))
