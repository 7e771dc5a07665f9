"""The manifest of a run: its settings and source, kept beside its results so that no other run mixes with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..errors import LTMPError, UsageError
from ..files import atomic_path, check_writable, sweep
from ..files.text import read_json
from ..hosts.attach import attachment
from .predictor import Predictor
from .shards import Shard
from .writer import ERRORS

MANIFEST = "_run.json"
# What each setting is called in a message.
_NAMES = {"batch_size": "batch size", "class_names": "class names", "amp": "--amp", "top": "--top"}


def settings_of(predictor: Predictor) -> dict[str, Any]:
    """Settings that decide the results, down to rounding, except the device; those of speed alone are left out."""
    scoring, deployment = predictor.scoring, predictor.deployment
    model = deployment.model
    attached = attachment(model).policy if deployment.attached else None
    names = None if scoring.embeddings else deployment.names
    return {
        "model": type(model).__name__,
        **scoring.about,
        "weights": _digest((name, value) for name, value in model.state_dict().items() if not name.startswith("ltmp.")),
        "thresholds": _digest(attached.state_dict().items()) if attached else None,
        "method": attached.config.to_dict() if attached else None,
        "transform": " ".join(str(deployment.transform).split()),
        "embeddings": scoring.embeddings,
        "top": None if scoring.embeddings else predictor.top,
        "class_names": sha256("\n".join(names).encode()).hexdigest()[:16] if names else None,
        "batch_size": scoring.batch_size,
        "amp": scoring.amp,
    }


def _digest(tensors: Iterator[tuple[str, Tensor]] | Any) -> str:
    digest = sha256()
    for name, value in sorted(tensors):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def begin(out: Path, shards: Sequence[Shard], settings: dict[str, Any]) -> None:
    """Make `out` the folder of this run, or check that it is.

    Raises:
        UsageError: it holds a run with other settings or of another source.
        LTMPError: it cannot be read or written.
    """
    source = {shard.name: shard.fingerprint for shard in shards}
    path = out / MANIFEST
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"ltmp": __version__, "settings": settings, "source": source}, indent=1))
        return
    try:
        earlier = read_json(path)
        before, images = dict(earlier["settings"]), dict(earlier["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LTMPError(
            f"{path} cannot be read ({error}): choose another --out, or --overwrite what is there"
        ) from error
    way_out = "continue with what it was begun with, choose another --out, or start anew with --overwrite"
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            what = _NAMES.get(name, name)
            values = f": {_short(before.get(name))} then, {_short(value)} now"
            raise UsageError(f"{out} holds a run with another {what}{values}; {way_out}")
    if images != source:
        raise UsageError(f"{out} holds a run of other images: {_difference(images, source, shards)}; {way_out}")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def _difference(before: dict[str, str], now: dict[str, str], shards: Sequence[Shard]) -> str:
    if len(before) != len(now):
        return f"{len(before)} shards then, {len(now)} now"
    changed = next(shard for shard in shards if before.get(shard.name) != shard.fingerprint)
    return f"{changed.source} has changed since"


def prepare(out: Path, sources: Sequence[str | Path], shards: Sequence[Shard]) -> None:
    """Make the folder, before any work is done, and remove what a killed run had not finished there.

    Raises:
        UsageError: it is a file, lies in the source, or holds other things than a run, such as links for its files.
        LTMPError: it cannot be written.
    """
    real = out.resolve()
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in (real, *real.parents):
            raise UsageError(f"{out} lies inside the source {source}: choose an --out beside it")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: --out is a folder")
    held = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    if held and MANIFEST not in held:
        raise UsageError(f"{out} holds other files, but no run to continue: choose an empty or a new folder")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    _check_plain(out, {MANIFEST, f"{ERRORS}.csv", *(f"{shard.name}.parquet" for shard in shards)}, ERRORS)
    if (out / ERRORS).exists():
        _check_plain(out / ERRORS, {f"{shard.name}.csv" for shard in shards})
        sweep(out / ERRORS)


def _check_plain(folder: Path, files: set[str], folder_in: str | None = None) -> None:
    """Refuse what lies under the names that a run writes and is none of its making: links would be written through."""
    for entry in list(os.scandir(folder)):
        if entry.name in files and not entry.is_file(follow_symlinks=False):
            raise UsageError(f"{entry.path} is no plain file, as runs write: remove it, or choose another --out")
        if entry.name == folder_in and not entry.is_dir(follow_symlinks=False):
            raise UsageError(f"{entry.path} is no plain folder, as runs make: remove it, or choose another --out")


def clear(out: Path, shards: Sequence[Shard]) -> None:
    """Remove a run and nothing else; the manifest goes last, so that a killed clearing can be repeated."""
    for name in _names_of(out, shards):
        for path in (out / f"{name}.parquet", out / ERRORS / f"{name}.csv"):
            path.unlink(missing_ok=True)
    for path in (out / f"{ERRORS}.csv", out / MANIFEST):
        path.unlink(missing_ok=True)


def _names_of(out: Path, shards: Sequence[Shard]) -> list[str]:
    """The shards that the manifest in `out` names, or those of this run where it cannot be read."""
    try:
        names = [str(name) for name in read_json(out / MANIFEST)["source"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = [shard.name for shard in shards]
    # a manifest of somebody else's making reaches no other folder
    return [name for name in names if name == os.path.basename(name)]
